"""A decoder-only transformer for Qwen3, Qwen2 / 2.5 and Llama shapes, over a paged KV cache.

What differs between the families (norms on queries and keys, biases, tied embeddings, RoPE scaling) is
configuration, not classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit.kernels.aligned import Aligned
from agentkit.kernels.attention import Parts, Work, paged_attention
from agentkit.kernels.cache import HeadNorms, rotate_and_write
from agentkit.kernels.chunked import Chunked
from agentkit.kernels.compact import Int8, compact_linear
from agentkit.kernels.decode import Decode
from agentkit.kernels.flash import Layout
from agentkit.kernels.linear import (
    Int4,
    dense_linear,
    half_linear,
    int4_linear,
    int4_rows,
    pack_dense,
    pack_half,
    pack_int4,
)
from agentkit.kernels.norm import residual, residual_weight, rms_norm
from agentkit.kernels.plan import Plan
from agentkit.kernels.quant import Quantised, quant_linear
from agentkit.kernels.rope import angles, whole
from agentkit.kernels.silu import silu_mul
from agentkit.kernels.windowed import Windowed
from agentkit.runtime.config import ModelConfig
from agentkit.runtime.quantise import Weights, form_of, from_file, join, quantised
from agentkit.runtime.rope import inverse_frequencies
from agentkit.runtime.weights import Blocks, Checkpoint

Attention = Work | Layout | Aligned | Windowed | Chunked | Plan | Parts


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step, flattened over sequences.

    A token may have several queries, each rotated by another position: positions and slots then are those of all first
    queries, followed by those of all second ones, and so on, and only the first of a token has a slot.

    Attributes:
        ids: ``[t]`` int64 token ids.
        positions: ``[queries * t]`` int64, each token's place in its own sequence.
        slots: ``[queries * t]`` int64, where each token's key and value are written, −1 for nowhere.
        work: which rows attend to which slots; on the CPU the work of a step of one row as it is.
        sampled: ``[r]`` int64, the rows whose logits are wanted.
        upper: a layer, and the work from it on; None where it is the same for all.
        sharpness: ``[queries * t, 1, 1]`` fp32, what queries are multiplied by; None for nothing.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    work: Attention
    sampled: Tensor
    upper: tuple[int, Attention] | None = None
    sharpness: Tensor | None = None


class Linear:
    """``y = x @ W.T + b`` with a matrix as it was loaded.

    Args:
        weight: ``[outputs, inputs]``, dense or quantised; on the CPU Int4 or Int8.
        bias: ``[outputs]``.
        nibbles: the same matrix in 4 bits, for steps of few rows on the CPU; they come out in bf16.
        half: on the CPU, allow fp16 in place of fp32.

    Attributes:
        weight_bytes: what a step of one row reads.
    """

    def __init__(
        self,
        weight: Tensor | Quantised | Int4 | Int8,
        bias: Tensor | None = None,
        nibbles: Int4 | None = None,
        half: bool = False,
    ) -> None:
        self._bias, self._nibbles = bias, nibbles
        self._few = int4_rows(weight.dtype) if isinstance(weight, Tensor) else 0
        self._product, stored = _product(weight, bias, half)
        self.weight_bytes = stored if nibbles is None else _bytes(nibbles.nibbles, nibbles.scales)

    def __call__(self, x: Tensor) -> Tensor:
        if self._nibbles is not None and x.shape[0] <= self._few:
            y = int4_linear(x, self._nibbles)
            return y if self._bias is None else y + self._bias
        return self._product(x)


def _product(
    weight: Tensor | Quantised | Int4 | Int8, bias: Tensor | None, half: bool
) -> tuple[Callable[[Tensor], Tensor], int]:
    """The product with a matrix in the form that is fastest where it lies, and the bytes of that form."""
    if isinstance(weight, Quantised):
        return partial(quant_linear, matrix=weight, bias=bias), weight.nbytes
    if isinstance(weight, Int4):
        return partial(compact_linear, weight=weight, bias=bias), _bytes(weight.nibbles, weight.scales)
    if isinstance(weight, Int8):
        return partial(compact_linear, weight=weight, bias=bias), _bytes(weight.values, weight.scale)
    packed = pack_half(weight) if half and weight.dtype is torch.float32 else None
    if packed is not None:
        return partial(_half, weight=packed, bias=bias), 2 * weight.numel()
    return partial(dense_linear, weight=pack_dense(weight), bias=bias), _bytes(weight)


class Joined:
    """Products of one input, side by side: matrices that are kept in different forms."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = parts
        self.weight_bytes = sum(part.weight_bytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self._parts], 1)


def _half(x: Tensor, weight: torch.ScriptObject, bias: Tensor | None) -> Tensor:
    y = half_linear(x, weight)
    return y if bias is None else y + bias


class Head:
    """Logits in fp32 from the last hidden states.

    A GPU product can return fp32 from a table of fewer bits. On the CPU torch's cannot, so there the table is fp16
    multiplied in fp32, or, where the results have to be exact, fp32 itself.

    Args:
        table: ``[vocab_size, hidden]``, the embedding's own tensor where the model ties them.
        half: allow fp16.
    """

    def __init__(self, table: Tensor, half: bool) -> None:
        self._half = pack_half(table) if half else None
        wide = table.device.type == "cpu" and self._half is None
        self._table = table.float() if wide else table  # the same tensor if it is fp32 already
        self.weight_bytes = table.numel() * (2 if self._half is not None else self._table.element_size())

    def __call__(self, x: Tensor) -> Tensor:
        if self._half is not None:
            return half_linear(x.float(), self._half)
        if x.device.type == "cpu":
            return F.linear(x.float(), self._table)
        return torch.mm(x, self._table.T, out_dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block. Its norms are those of `agentkit.kernels.norm.residual`."""

    attention_norm: Tensor
    qkv: Linear | Joined
    head_norms: HeadNorms | None
    out: Linear | Joined
    mlp_norm: Tensor
    gate_up: Linear | Joined
    down: Linear | Joined


class Model:
    """The weights on one device and the forward pass over them.

    Args:
        checkpoint: where configuration and weights come from.
        device: where to run.
        dtype: of activations and dense weights.
        packed: use GGUF weights of 4 and 8 bits as they are on a GPU; on a CPU those of 4 bits for steps of few rows,
            and fp16 in place of fp32.
        weights: the form that the matrices of the layers are quantised to. Embedding and head stay as they are: logits
            are needed in fp32, and the products of quantised matrices give activations.
        config: the shape, where it is not quite the checkpoint's.

    Attributes:
        config: the shape.
        digest: of the checkpoint.
        weights: the form of the layers' matrices.
        kv_shape: ``(2, kv_heads, head_dim)``, what one token stores in one layer.
        weight_bytes: bytes that one decode step of one row reads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        packed: bool,
        weights: Weights = "auto",
        config: ModelConfig | None = None,
    ) -> None:
        self.config = config or checkpoint.config
        self.device, self.dtype, self.packed, self.weights = device, dtype, packed, weights
        self.digest = checkpoint.digest
        load = _Loader(checkpoint, device, dtype, packed, weights)
        self.embedding = load.tensor("model.embed_tokens.weight")
        self.head = Head(self.embedding if self.config.tied else load.tensor("lm_head.weight"), packed)
        self.layers = [load.layer(i) for i in range(self.config.layers)]
        self.norm = load.tensor("model.norm.weight")
        frequencies, self.rope_scale = inverse_frequencies(self.config)
        self.frequencies = frequencies.to(device)
        self.kv_shape = (2, self.config.kv_heads, self.config.head_dim)
        self.weight_bytes = self.head.weight_bytes + sum(
            linear.weight_bytes for x in self.layers for linear in (x.qkv, x.out, x.gate_up, x.down)
        )

    def forward(self, batch: Batch, kv: Tensor) -> Tensor:
        """`hidden`, and the logits of the sampled rows: ``[r, vocab_size]`` fp32."""
        return self.logits(self.hidden(batch, kv)[batch.sampled])

    def hidden(self, batch: Batch, kv: Tensor) -> Tensor:
        """Write the keys and values of the batch's tokens.

        Call it in inference mode.

        Args:
            batch: the step's tokens.
            kv: ``[layers, slots, 2, kv_heads, head_dim]``, written at ``batch.slots``.

        Returns:
            ``[t, hidden]``, what the last layer gives, as `logits` takes it; on the CPU fp32.
        """
        tables = angles(batch.positions, self.frequencies, self.rope_scale)
        eps = self.config.norm_eps
        stream = residual(F.embedding(batch.ids, self.embedding))
        x = stream.norm(self.layers[0].attention_norm, eps)
        following = [*(layer.attention_norm for layer in self.layers[1:]), None]
        attend = self._attend(batch, batch.work, kv, *tables)
        for index, (layer, norm) in enumerate(zip(self.layers, following, strict=True)):
            if batch.upper is not None and index == batch.upper[0]:
                attend = self._attend(batch, batch.upper[1], kv, *tables)
            x = layer.out(attend(index, layer.qkv(x), layer.head_norms))
            x = stream.add_norm(x, layer.mlp_norm, eps)
            x = layer.down(silu_mul(layer.gate_up(x)))
            if norm is not None:
                x = stream.add_norm(x, norm, eps)
        return stream.plus(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of some rows of `hidden`: ``[r, vocab_size]`` fp32."""
        return self.head(rms_norm(hidden, self.norm, self.config.norm_eps))

    def _attend(
        self, batch: Batch, work: Attention, kv: Tensor, cos: Tensor, sin: Tensor
    ) -> Callable[[int, Tensor, HeadNorms | None], Tensor]:
        """What a step's layers make of queries, keys and values.

        Returns:
            a function of the layer's number, ``[t, (heads + 2 * kv_heads) * head_dim]`` and the norms of queries and
            keys; it gives ``[t, heads * head_dim]``.
        """
        c = self.config
        if isinstance(work, Work):
            return Decode(kv, work.runs, *whole(cos, sin, torch.float32), c.heads, self.dtype)
        if self.device.type == "cpu":
            cos, sin = whole(cos, sin, self.dtype)
        layers, scale, queries = kv.unbind(0), c.head_dim**-0.5, len(batch.slots) // len(batch.ids)

        def attend(layer: int, qkv: Tensor, norms: HeadNorms | None) -> Tensor:
            heads = qkv.to(self.dtype).view(len(qkv), -1, c.head_dim)
            if queries > 1:
                heads = heads.repeat(queries, 1, 1)
            query = rotate_and_write(heads, cos, sin, batch.slots, layers[layer], norms)
            if batch.sharpness is not None:
                query = query.mul_(batch.sharpness)
            keys, values = layers[layer].unbind(1)
            return paged_attention(query, keys, values, work, scale).flatten(1)

        return attend


class _Loader:
    """Reads the tensors of a checkpoint into the forms the forward pass wants."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, packed: bool, weights: Weights
    ) -> None:
        self.checkpoint, self.device, self.dtype, self.packed = checkpoint, device, dtype, packed
        self.weights: Weights = weights

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        source = self.checkpoint.tensor(name)
        dense = source.dense(dtype or self.dtype) if isinstance(source, Blocks) else source
        return dense.to(device=self.device, dtype=dtype or self.dtype)

    def linear(self, *names: str, bias: bool = False) -> Linear | Joined:
        """One product for several matrices of the same input, or one for each form that they are quantised to."""
        if self.weights != "auto":
            return self._quantised(names, bias)
        b = torch.cat([self.tensor(f"{name}.bias") for name in names]) if bias else None
        sources = [self.checkpoint.tensor(f"{name}.weight") for name in names]
        if self.packed and self.device.type == "cuda":
            stored = _quantised(sources, self.device)
            if stored is not None:
                return Linear(stored, b)
        weight = torch.cat([self.tensor(f"{name}.weight") for name in names])
        on_cpu = self.packed and self.device.type == "cpu"
        return Linear(weight, b, _int4(sources) if on_cpu else None, on_cpu)

    def _quantised(self, names: Sequence[str], bias: bool) -> Linear | Joined:
        sources = {name: self.checkpoint.tensor(f"{name}.weight") for name in names}
        parts: list[Linear] = []

        def form_wanted(name: str) -> Weights:
            return form_of(name, sources[name], self.weights)

        for form, alike in groupby(names, form_wanted):
            own = list(alike)
            b = torch.cat([self.tensor(f"{name}.bias") for name in own]) if bias else None
            parts.append(Linear(quantised([(name, sources[name]) for name in own], form, self.device), b))
        return parts[0] if len(parts) == 1 else Joined(parts)

    def layer(self, index: int) -> Layer:
        c, at = self.checkpoint.config, f"model.layers.{index}."
        attention, mlp = at + "self_attn.", at + "mlp."
        return Layer(
            attention_norm=residual_weight(self.tensor(at + "input_layernorm.weight")),
            qkv=self.linear(*(f"{attention}{x}_proj" for x in "qkv"), bias=c.qkv_bias),
            head_norms=self._head_norms(attention) if c.qk_norm else None,
            out=self.linear(attention + "o_proj"),
            mlp_norm=residual_weight(self.tensor(at + "post_attention_layernorm.weight")),
            gate_up=self.linear(mlp + "gate_proj", mlp + "up_proj"),
            down=self.linear(mlp + "down_proj"),
        )

    def _head_norms(self, attention: str) -> HeadNorms:
        query, key = (self.tensor(f"{attention}{x}_norm.weight") for x in "qk")
        return HeadNorms(query, key, self.checkpoint.config.norm_eps)


def _int4(sources: Sequence[Tensor | Blocks]) -> Int4 | None:
    """Matrices of 4 bits, one below the other, for the CPU; None if one has another form."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for source in sources:
        nibbles = source.nibbles() if isinstance(source, Blocks) else None
        if nibbles is None:
            return None
        parts.append(nibbles)
    q, scale, minimum = (torch.cat(column) for column in zip(*parts, strict=True))
    return pack_int4(q, scale, minimum) if q.shape[0] % 16 == 0 else None


def _quantised(sources: Sequence[Tensor | Blocks], device: torch.device) -> Quantised | None:
    """Matrices of one quantised form, one below the other, for a GPU; None if their forms differ or have no kernel."""
    parts = [from_file(source) for source in sources if isinstance(source, Blocks)]
    forms = [part for part in parts if part is not None]
    if len(forms) < len(sources) or len({form.kind for form in forms}) != 1:
        return None
    return join(forms).to(device)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
