"""Reading weights: what a checkpoint offers, which tensors a configuration needs, and quantised blocks.

The weights stay in the file and are mapped into memory. They are read when used, in their own type.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentkit.runtime.config import ModelConfig
from agentkit.runtime.errors import ModelError

if TYPE_CHECKING:
    from agentkit.runtime.vocab import Vocabulary

BlockKind = Literal["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"]
_SAMPLES, _SAMPLE_BYTES = 16, 64  # of a tensor, for its model's digest
_WIDEN_AT_ONCE = 1 << 18  # elements: a megabyte of float32, which stays in a cache and makes Python's part small


class Checkpoint(Protocol):
    """The weights, configuration and tokenizer of one model on disk."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def digest(self) -> str:
        """Cheap identity, hex: SHA-256 over configuration, headers and samples of every tensor; see `identity`."""
        ...

    def vocabulary(self) -> Vocabulary:
        """The tokenizer stored with the weights. Raises ModelError if it is missing or not supported."""
        ...

    def names(self) -> Collection[str]:
        """Canonical (Hugging Face) tensor names: exactly those of `required_tensors`."""
        ...

    def tensor(self, name: str) -> Tensor | Blocks:
        """One tensor, mapped from the file in the type it is stored in. Do not write to it."""
        ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix in one of ggml's quantised types, as stored.

    Attributes:
        shape: (rows, columns) of the matrix it stands for.
        data: uint8 [rows, bytes of a row]; a row is a whole number of blocks.
    """

    kind: BlockKind
    shape: tuple[int, int]
    data: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [rows, columns], computed in float32 as ggml does and then rounded to `dtype`."""
        rows, columns = self.shape
        out = torch.empty(self.shape, dtype=dtype)
        step = max(1, _WIDEN_AT_ONCE // columns)
        for start in range(0, rows, step):
            wide = _widen(self.kind, self.data[start : start + step].numpy())
            out[start : start + step] = torch.from_numpy(wide)  # pyright: ignore[reportUnknownMemberType]
        return out

    def nibbles(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The 4-bit codes as stored: ``w = q * scale + minimum``; None for kinds that are not plain 4-bit.

        Returns:
            q uint8 [rows, columns] of 0..15; scale and minimum float32 [rows, columns / 32]. The product is
            exact in float32 (at most 17 significant bits times 4), so the sum is rounded once, as in `dense`.
        """
        if self.kind == "Q4_K":
            return self._nibbles_of_super_blocks()
        if self.kind not in ("Q4_0", "Q4_1"):
            return None
        rows, columns = self.shape
        header = 2 if self.kind == "Q4_0" else 4  # bytes of the float16 scale, and of the minimum in Q4_1
        blocks = self.data.view(rows, columns // 32, header + 16)
        halves = blocks[..., :header].contiguous().view(torch.float16).float()
        codes = blocks[..., header:]
        # Byte i of a block holds element i in its low half and element i + 16 in its high half.
        q = torch.cat([codes & 0xF, codes >> 4], dim=-1).view(rows, columns)
        scale = halves[..., 0]
        return q, scale, halves[..., 1] if self.kind == "Q4_1" else -8.0 * scale

    def _nibbles_of_super_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """`nibbles` of Q4_K: 256 elements share two float16 factors, by which each 32 scale 6 bits of their own."""
        rows, columns = self.shape
        blocks = self.data.view(rows, columns // 256, 144)
        factors = blocks[..., :4].contiguous().view(torch.float16).float()
        # Twelve bytes: the low 6 bits of four scales, of four minima, and four times the low 4 bits of another scale
        # and minimum, whose high 2 bits lie above the first eight.
        first, second, third = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
        scale = torch.cat([first & 0x3F, third & 0xF | first >> 6 << 4], dim=-1)
        minimum = torch.cat([second & 0x3F, third >> 4 | second >> 6 << 4], dim=-1)
        codes = blocks[..., 16:].reshape(
            rows, columns // 256, 4, 32
        )  # low halves are one group of 32, high halves the next
        q = torch.stack([codes & 0xF, codes >> 4], dim=-2).view(rows, columns)
        return q, (factors[..., :1] * scale).flatten(1), (-factors[..., 1:] * minimum).flatten(1)


# `gguf` is imported where its blocks are read: the model itself needs none of it.


def _widen(kind: BlockKind, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows of `data`, widened. The package's own `dequantize` goes through 16 rows at a time: 5 to 10 times as long."""
    import gguf.quants
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    with np.errstate(all="ignore"):  # infinities in a file are the file's, not a fault of the arithmetic
        wide: NDArray[np.float32] = getattr(gguf.quants, kind).dequantize_blocks(data.reshape(-1, size))
    return wide.reshape(len(data), -1)


def required_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the model needs; ``lm_head.weight`` only where it is not tied."""
    hidden, wide = config.hidden, config.intermediate
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }
    if config.qkv_bias:
        layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in (("q", queries), ("k", keys), ("v", keys))}
    if config.qk_norm:
        layer |= {f"self_attn.{p}_norm.weight": (config.head_dim,) for p in "qk"}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.layers):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not config.tied:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder with safetensors, or a ``.gguf`` file. Headers are validated.

    Raises:
        ModelError: neither of the two, or a file that is damaged, lies about its content or is not supported.
    """
    # Imported here because both build on this module.
    from agentkit.runtime.gguf import GgufCheckpoint
    from agentkit.runtime.safetensors import SafetensorsCheckpoint

    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.is_file() and path.suffix == ".gguf":
        return GgufCheckpoint(path)
    state = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise ModelError(f"{path} {state}. Name a model folder with safetensors, or a .gguf file.")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: `start` and `end` in bytes from the beginning of the mapped file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def map_file(path: Path) -> mmap.mmap:
    """Map a file privately: pages are shared until written, and a write never reaches the file.

    Raises:
        ModelError: the file is empty or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Download the model again.") from error


def mapped(file: mmap.mmap, stored: Stored, dtype: torch.dtype) -> Tensor:
    """The bytes of one tensor as a view on the mapping, flat, of `dtype`. The view keeps the mapping open."""
    count = (stored.end - stored.start) // dtype.itemsize
    return torch.frombuffer(file, dtype=dtype, count=count, offset=stored.start)


def refuse_overlap(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise ModelError if two tensors of a file share bytes."""
    end, before = 0, ""
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start < end:
            raise ModelError(f"{path}: the tensors {before!r} and {name!r} overlap. Download the file again.")
        end, before = max(end, stored.end), name


def identity(config: ModelConfig, tensors: Mapping[str, tuple[Stored, mmap.mmap]]) -> str:
    """Digest for `Checkpoint.digest`: configuration, names, types and shapes, and samples of the values.

    Samples, as hashing 8 GB takes longer than to load them. Of every tensor 16 stretches of 64 bytes are taken at even
    distances from its beginning to its end, which tells apart a model and its fine-tunes, merges or other
    quantisations. Checkpoints that differ in a few values between the samples only, as one made by hand might, have
    the same digest.
    """
    digest = hashlib.sha256(json.dumps(asdict(config), default=sorted, sort_keys=True).encode())
    for name, (stored, file) in sorted(tensors.items()):
        size = stored.end - stored.start
        digest.update(f"{name} {stored.dtype} {stored.shape} {size}\n".encode())
        for i in range(_SAMPLES):
            start = stored.start + max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1)
            digest.update(file[start : min(stored.end, start + _SAMPLE_BYTES)])
    return digest.hexdigest()


def require_tensors(source: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Collection[str]:
    """Compare the tensors a checkpoint has with those its configuration needs, and return the names of these.

    Raises:
        ModelError: one is missing, has another shape, or is there but has no place in the model: then the
            model is not what its configuration says, and leaving the tensor out would change its answers.
    """
    required = required_tensors(config)
    for name, shape in required.items():
        if name not in shapes:
            raise ModelError(f"{source}: the tensor {name!r} is missing. Download the model again.")
        if shapes[name] != shape:
            raise ModelError(
                f"{source}: the tensor {name!r} has the shape {shapes[name]}, but the configuration asks for "
                f"{shape}. Download the model again, weights and configuration from the same place."
            )
    # Old Llama files carry the rotary frequencies; tied ones may repeat the embedding as lm_head.
    harmless = ("lm_head.weight", "rotary_emb.inv_freq")
    for name in shapes.keys() - required.keys():
        if not name.endswith(harmless):
            raise ModelError(
                f"{source}: the tensor {name!r} has no place in a {config.family} model as its configuration "
                "describes it. Use a checkpoint of a dense Qwen3, Qwen2/2.5 or Llama model."
            )
    return required.keys()
