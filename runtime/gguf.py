"""Model files in GGUF, the format of llama.cpp, for the families that agentkit runs.

The file is parsed here rather than by the ``gguf`` package's reader, which trusts every count it meets; that
package supplies the arithmetic of the quantised types. Format: ggml/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from agentkit.runtime.config import (
    Family,
    ModelConfig,
    RopeScaling,
    even_share,
    integer,
    number,
    yarn_magnitude,
)
from agentkit.runtime.errors import ModelError
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import (
    BlockKind,
    Blocks,
    Stored,
    identity,
    map_file,
    mapped,
    refuse_overlap,
    require_tensors,
)

# Bounds on what a header may claim, far above any real model, far below what would exhaust memory.
_MOST_TENSORS = 1 << 16
_MOST_KEYS = 1 << 16
_MOST_ELEMENTS = 1 << 22  # of all arrays together
_MOST_HEADER = 1 << 28  # bytes

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_FAMILIES: Mapping[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PLAIN: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED: tuple[BlockKind, ...] = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_CONTROL, _USER_DEFINED, _NORMAL, _UNUSED = 3, 4, 1, 5  # tokenizer.ggml.token_type
_Item = TypeVar("_Item", str, int)
_END_TEXTS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


class GgufCheckpoint:
    """A GGUF file whose header has been validated and whose weights are mapped.

    Raises:
        ModelError: the file is damaged or lies about its content, a tensor is missing or has the wrong shape
            or type, or the architecture or one of its options is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = map_file(path)
        header = read_header(path, self._file)
        self._metadata = header.metadata
        self._stored = {_canonical_name(path, name): stored for name, stored in header.tensors.items()}
        self.config: ModelConfig = _config(path, header.metadata, self._stored)
        shapes = {name: stored.shape for name, stored in self._stored.items()}
        self._names = require_tensors(str(path), self.config, shapes)
        for name in self._names:
            _require_type(path, name, self._stored[name])
        self.digest: str = identity(self.config, {name: (self._stored[name], self._file) for name in self._names})

    def vocabulary(self) -> Vocabulary:
        return _vocabulary(self._path, self._metadata)

    def names(self) -> Collection[str]:
        return self._names

    def tensor(self, name: str) -> Tensor | Blocks:
        stored = self._stored[name]
        if stored.dtype in _PLAIN:
            plain = mapped(self._file, stored, _PLAIN[stored.dtype]).view(stored.shape)
            return self._rows_in_order(name, plain)
        rows, columns = stored.shape
        data = self._rows_in_order(name, mapped(self._file, stored, torch.uint8).view(rows, -1))
        return Blocks(cast("BlockKind", stored.dtype), (rows, columns), data)

    def _rows_in_order(self, name: str, matrix: Tensor) -> Tensor:
        """Undo llama.cpp's reordering of query and key rows, which the architecture "llama" alone undergoes.

        It interleaves the two halves of every head so that neighbours are rotated together (``permute`` in
        convert_hf_to_gguf.py). Rows are quantised one by one, so they can be moved as they are.
        """
        if self.config.family != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return matrix
        rows, width = matrix.shape
        half = self.config.head_dim // 2
        return matrix.view(-1, half, 2, width).transpose(1, 2).reshape(rows, width)


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says about itself; tensor shapes in the order of torch, rows first."""

    metadata: dict[str, object]
    tensors: dict[str, Stored]


def read_header(path: Path, file: mmap.mmap) -> Header:
    """Parse a GGUF header in bounded time and memory, and check every tensor against the size of the file.

    Raises:
        ModelError: not GGUF, cut off, or a claim that cannot be true.
    """
    cursor = _Cursor(path, file)
    if file[:4] != b"GGUF":
        raise _lie(path, "does not begin as a GGUF file")
    cursor.at = 4
    version = cursor.whole("I")
    if version not in (2, 3):
        raise _lie(path, f"is GGUF version {version}, not 2 or 3 in little-endian order")
    tensor_count, key_count = cursor.count(_MOST_TENSORS), cursor.count(_MOST_KEYS)
    metadata: dict[str, object] = {}
    for _ in range(key_count):
        key = cursor.string()
        if key in metadata:
            raise _lie(path, f"holds the key {key!r} twice")
        metadata[key] = cursor.value(cursor.whole("I"))
    entries = [cursor.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise _lie(path, f"asks for the alignment {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for name, stored in entries:
        if name in tensors:
            raise _lie(path, f"holds the tensor {name!r} twice")
        if stored.start % alignment or base + stored.end > len(file):
            raise _lie(path, f"places the tensor {name!r} outside the file or off the alignment")
        tensors[name] = Stored(stored.dtype, stored.shape, base + stored.start, base + stored.end)
    refuse_overlap(path, tensors)
    return Header(metadata, tensors)


class _Cursor:
    """Reads a header from the front, refusing whatever would run past its end."""

    def __init__(self, path: Path, file: mmap.mmap) -> None:
        self.at = 0
        self._path = path
        self._file = file
        self._end = min(len(file), _MOST_HEADER)
        self._elements = 0

    def take(self, size: int) -> bytes:
        if size > self._end - self.at:
            raise _lie(self._path, f"ends inside its header, at byte {self.at:,}")
        self.at += size
        return self._file[self.at - size : self.at]

    def scalar(self, kind: str) -> object:
        return struct.unpack("<" + kind, self.take(struct.calcsize(kind)))[0]

    def whole(self, kind: str) -> int:
        return cast("int", self.scalar(kind))

    def count(self, most: int) -> int:
        value = self.whole("Q")
        if value > most:
            raise _lie(self._path, f"claims a count of {value:,} at byte {self.at - 8:,}")
        return value

    def string(self) -> str:
        data = self.take(self.whole("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise _lie(self._path, f"holds text that is not UTF-8 before byte {self.at:,}") from None

    def value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.whole("I"))
        raise _lie(self._path, f"holds a value of the unknown kind {kind}")

    def _array(self, kind: int) -> list[object]:
        count = self.count(_MOST_ELEMENTS)
        self._elements += count
        if self._elements > _MOST_ELEMENTS:
            raise _lie(self._path, f"holds more than {_MOST_ELEMENTS:,} array elements")
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * size)))
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        raise _lie(self._path, f"holds an array of the unsupported kind {kind}")

    def tensor(self) -> tuple[str, Stored]:
        """One tensor's entry, its byte range still counted from the beginning of the data."""
        name = self.string()
        dimensions = self.whole("I")
        if not 1 <= dimensions <= 4:
            raise _lie(self._path, f"gives the tensor {name!r} {dimensions} dimensions")
        shape = tuple(reversed([self.whole("Q") for _ in range(dimensions)]))
        try:
            kind = GGMLQuantizationType(self.whole("I"))
        except ValueError as error:
            raise _lie(self._path, f"gives the tensor {name!r} an unknown type ({error})") from error
        start = self.whole("Q")
        elements, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % elements or not math.prod(shape):
            raise _lie(self._path, f"gives the {kind.name} tensor {name!r} the impossible shape {shape}")
        return name, Stored(kind.name, shape, start, start + math.prod(shape) // elements * size)


def _canonical_name(path: Path, name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    found = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)", name)
    if found and found[2] in _LAYER_NAMES:
        return f"model.layers.{found[1]}.{_LAYER_NAMES[found[2]]}.{found[3]}"
    if name == "rope_freqs.weight":
        raise ModelError(
            f"{path} stores its rotary scaling as a table (rope_freqs.weight, Llama 3.1 and later). Use the "
            "same model as a safetensors folder, whose config.json states the scaling."
        )
    raise _lie(path, f"holds the tensor {name!r}, which has no place in a Llama, Qwen2 or Qwen3 model")


def _require_type(path: Path, name: str, stored: Stored) -> None:
    if stored.dtype in _PLAIN or (stored.dtype in _QUANTISED and len(stored.shape) == 2):
        return
    raise ModelError(
        f"{path}: the tensor {name!r} is {stored.dtype}; agentkit reads {', '.join([*_PLAIN, *_QUANTISED])} "
        "(the last six for matrices only). Use a file quantised as one of these, for instance Q4_K_M or Q8_0."
    )


def _config(path: Path, metadata: Mapping[str, object], tensors: Mapping[str, Stored]) -> ModelConfig:
    arch = str(metadata.get("general.architecture"))
    if arch not in _FAMILIES:
        raise ModelError(f"{path} holds the architecture {arch!r}. Use a Llama, Qwen2 or Qwen3 model.")
    if "model.embed_tokens.weight" not in tensors:
        raise _lie(path, "holds no embedding (token_embd.weight)")
    family, own = _FAMILIES[arch], {k.removeprefix(arch + "."): v for k, v in metadata.items()}
    for key in ("attention.sliding_window", "expert_count", "attention.scale", "attention.clamp_kqv"):
        if own.get(key):
            raise ModelError(f"{path} sets {arch}.{key}, which agentkit does not run. Use a plain dense model.")
    hidden, heads = integer(own, "embedding_length"), integer(own, "attention.head_count")
    key_length = "attention.key_length"
    head_dim = integer(own, key_length) if key_length in own else even_share(hidden, heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise ModelError(f"{path}: {arch}.{key} is {own[key]}, but agentkit needs the head size, {head_dim}.")
    return ModelConfig(
        family=family,
        vocab_size=tensors["model.embed_tokens.weight"].shape[0],
        hidden=hidden,
        layers=integer(own, "block_count"),
        heads=heads,
        kv_heads=integer(own, "attention.head_count_kv"),
        head_dim=head_dim,
        intermediate=integer(own, "feed_forward_length"),
        max_positions=integer(own, "context_length"),
        rope_theta=number(own, "rope.freq_base"),
        rope_scaling=_scaling(path, own),
        norm_eps=number(own, "attention.layer_norm_rms_epsilon"),
        tied="lm_head.weight" not in tensors,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        end_ids=_end_ids(path, metadata),
    )


def _scaling(path: Path, own: Mapping[str, object]) -> RopeScaling | None:
    """llama.cpp's scaling of the rotary frequencies, where it means the same as in transformers."""
    prefix = "rope.scaling."
    given = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
    # A file without a type but with a factor is linear, by llama.cpp's rule.
    kind = given.pop("type", "linear" if given.get("factor") else "none")
    given.pop("finetuned", None)  # says how the model was made, not how to run it
    known = {"factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"}
    if kind == "none" and not own.get("rope.scale_linear"):
        return None
    if kind not in ("linear", "yarn") or not given.keys() <= known or own.get("rope.scale_linear"):
        raise ModelError(
            f"{path} scales its rotary embedding in a way that agentkit does not read from GGUF: {kind} with "
            f"{sorted(given)}. Use the same model as a safetensors folder."
        )
    factor = number(given, "factor")
    if not (math.isfinite(factor) and factor > 0):
        raise _lie(path, f"scales its rotary embedding by {factor}")
    if kind == "linear":
        return RopeScaling("linear", factor)
    return RopeScaling(
        "yarn",
        factor,
        integer(given, "original_context_length"),
        attention_factor=yarn_magnitude(factor),
        beta_fast=number(given, "yarn_beta_fast") if "yarn_beta_fast" in given else 32.0,
        beta_slow=number(given, "yarn_beta_slow") if "yarn_beta_slow" in given else 1.0,
    )


def _vocabulary(path: Path, metadata: Mapping[str, object]) -> Vocabulary:
    kind, split = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre"))
    if kind != "gpt2" or split not in _SPLITTERS:
        raise ModelError(
            f"{path} holds a tokenizer of the kind {kind!r} with the pre-tokenizer {split!r}; agentkit reads "
            f"'gpt2' with {', '.join(map(repr, _SPLITTERS))}. Use the same model as a safetensors folder."
        )
    tokens, types = _list(path, metadata, "tokens", str), _list(path, metadata, "token_type", int)
    merges = [tuple(merge.split(" ")) for merge in _list(path, metadata, "merges", str)]
    # Unused ids pad the embedding to a round number; the tokenizer must not know them.
    ids = {text: i for i, text in enumerate(tokens) if types[i : i + 1] != [_UNUSED]}
    if len(types) != len(tokens) or not set(types) <= {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise _lie(path, "gives its tokens kinds that a byte-level vocabulary does not have")
    if len(ids) != len(tokens) - types.count(_UNUSED) or any(len(pair) != 2 for pair in merges):
        raise _lie(path, "holds a token twice, or a merge that does not join two tokens")
    try:
        model = BPE(ids, cast("list[tuple[str, str]]", merges), ignore_merges=split == "llama-bpe")
    except Exception as error:  # the package raises bare Exception
        raise _lie(path, f"holds a vocabulary that does not fit together ({error})") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC() if split == "qwen2" else None
    tokenizer.pre_tokenizer = _splitter(split)
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(text, normalized=False, special=kind == _CONTROL)
        for text, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)  # pyright: ignore[reportUnknownMemberType]
    eos, bos = integer(metadata, "tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.bos_token_id")
    template = metadata.get("tokenizer.chat_template")
    return Vocabulary(
        tokenizer,
        eos=tokens[eos] if 0 <= eos < len(tokens) else "",
        bos=tokens[bos] if isinstance(bos, int) and 0 <= bos < len(tokens) else "",
        chat_template=template if isinstance(template, str) else None,
        end_ids=_end_ids(path, metadata),
    )


# How text is cut before merging: the pattern, or None for GPT-2's own. From the tokenizer.json of SmolLM2,
# GPT-2, Qwen2/3 and Llama 3, which llama.cpp knows by these names.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITTERS: Mapping[str, str | None] = {
    "smollm": None,
    "gpt-2": None,
    "qwen2": _WORDS.format(digits=r"\p{N}"),
    "llama-bpe": _WORDS.format(digits=r"\p{N}{1,3}"),
}


def _splitter(name: str) -> pre_tokenizers.PreTokenizer:
    pattern = _SPLITTERS[name]
    if pattern is None:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, words]) if name == "smollm" else words
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _end_ids(path: Path, metadata: Mapping[str, object]) -> frozenset[int]:
    """The end ids the file names, and control tokens that end a turn or a text in every known template."""
    tokens, types = _list(path, metadata, "tokens", str), _list(path, metadata, "token_type", int)
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot")]
    named = {integer(metadata, key) for key in keys if key in metadata}
    ends = {i for i, text in enumerate(tokens[: len(types)]) if text in _END_TEXTS and types[i] == _CONTROL}
    return frozenset(named | ends)


def _list(path: Path, metadata: Mapping[str, object], name: str, kind: type[_Item]) -> list[_Item]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    whole = [item for item in items if isinstance(item, kind)]
    if len(whole) != len(items):
        raise _lie(path, f"lacks tokenizer.ggml.{name}, or holds something else there")
    return whole


def _lie(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} {what}: it is damaged or not what it claims to be. Download the file again.")
