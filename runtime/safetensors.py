"""Model folders in the Hugging Face layout: ``config.json`` and weights in safetensors files.

The format (huggingface/safetensors, "Format"): eight bytes little-endian length, a JSON header of that length
naming every tensor's type, shape and byte range, then the bytes. A header is believed only after every claim
in it has been checked against the size of the file, because what follows maps memory by it.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from agentkit.runtime.config import ModelConfig
from agentkit.runtime.errors import ModelError
from agentkit.runtime.vocab import Vocabulary, read_json
from agentkit.runtime.weights import Stored, identity, map_file, mapped, refuse_overlap, require_tensors

_MOST_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
_WEIGHT_TYPES: Mapping[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


class SafetensorsCheckpoint:
    """A model folder whose headers have been validated and whose weights are mapped.

    Raises:
        ModelError: a file is missing, damaged or lies about its content, a tensor is missing or has the wrong
            shape or type, or the configuration is not supported.
    """

    def __init__(self, folder: Path) -> None:
        generation = folder / "generation_config.json"
        self.config: ModelConfig = ModelConfig.from_json(
            read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None
        )
        self._folder = folder
        self._where: dict[str, tuple[Stored, mmap.mmap]] = {}
        for path, promised in _files(folder).items():
            file = map_file(path)
            tensors = read_header(path, file)
            _require_agreement(path, tensors.keys(), promised)
            self._where |= {name: (stored, file) for name, stored in tensors.items()}
        shapes = {name: stored.shape for name, (stored, _) in self._where.items()}
        self._names = require_tensors(str(folder), self.config, shapes)
        for name in self._names:
            dtype = self._where[name][0].dtype
            if dtype not in _WEIGHT_TYPES:
                raise ModelError(
                    f"{folder}: the tensor {name!r} is {dtype}; agentkit reads F32, F16 and BF16 from "
                    "safetensors. Use the unquantised checkpoint, or a GGUF file."
                )
        self.digest: str = identity(self.config, {name: self._where[name] for name in self._names})

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_folder(self._folder)

    def names(self) -> Collection[str]:
        return self._names

    def tensor(self, name: str) -> Tensor:
        stored, file = self._where[name]
        return mapped(file, stored, _WEIGHT_TYPES[stored.dtype]).view(stored.shape)


def read_header(path: Path, file: mmap.mmap) -> dict[str, Stored]:
    """The tensors of one safetensors file, after checking that they fill the file exactly.

    Raises:
        ModelError: the header is cut off, is not JSON, or makes a claim that cannot be true.
    """
    if len(file) < 8:
        raise _lie(path, "is too short for a header")
    length = int.from_bytes(file[:8], "little")
    if length > min(_MOST_HEADER, len(file) - 8):
        raise _lie(path, f"says that its header has {length:,} bytes")
    try:
        header: object = json.loads(file[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _lie(path, f"has a header that is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _lie(path, "has a header that is not a JSON object")
    entries = cast("dict[str, object]", header)
    entries.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _entry(path, name, value, base) for name, value in entries.items()}
    refuse_overlap(path, tensors)
    # Without overlaps the sizes add up to the size of the data exactly if there is neither a gap nor a tail.
    total = sum(stored.end - stored.start for stored in tensors.values())
    outside = [name for name, stored in tensors.items() if stored.end > len(file)]
    if outside:
        raise _lie(path, f"ends before the tensor {outside[0]!r} does")
    if total != len(file) - base:
        raise _lie(path, f"has {len(file) - base:,} bytes of data, but its header describes {total:,}")
    return tensors


def _entry(path: Path, name: str, value: object, base: int) -> Stored:
    entry = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    dtype = entry.get("dtype")
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _lie(path, f"gives the tensor {name!r} the unknown type {dtype!r}")
    if shape is None or offsets is None or len(offsets) != 2:
        raise _lie(path, f"describes the tensor {name!r} without a valid shape and byte range")
    start, end = offsets
    if end - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _lie(path, f"gives {name!r} of the shape {shape} {end - start:,} bytes, which does not fit")
    return Stored(dtype, shape, base + start, base + end)


def _counts(value: object) -> tuple[int, ...] | None:
    """A short JSON list of whole numbers in 64 bits, none negative; None for anything else."""
    items = cast("list[object]", value) if isinstance(value, list) else None
    if items is None or len(items) > 8 or not all(type(i) is int and 0 <= i < 1 << 63 for i in items):
        return None
    return tuple(cast("list[int]", items))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a name occurs twice")
    return data


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that hold weights, each with the tensors the index promises there (None without an index)."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return {single: None}
        raise ModelError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json. Download the model "
            "again, with its safetensors files."
        )
    weight_map = read_json(index).get("weight_map")
    files: dict[Path, set[str] | None] = {}
    if not isinstance(weight_map, dict) or not weight_map:
        raise _lie(index, "has no weight_map")
    for name, value in cast("dict[str, object]", weight_map).items():
        # Only a plain file name beside the index: whoever wrote it must not reach other files.
        if not isinstance(value, str) or Path(value).name != value or not value.endswith(".safetensors"):
            raise _lie(index, f"places {name!r} in {value!r}, which names no safetensors file beside it")
        tensors = files.setdefault(folder / value, set())
        if tensors is not None:
            tensors.add(name)
    for path in files:
        if not path.is_file():
            raise ModelError(f"{path} is missing. Download the model again; finished files are kept.")
    return files


def _require_agreement(path: Path, held: Collection[str], promised: set[str] | None) -> None:
    if promised is None:
        return
    different = sorted(promised.symmetric_difference(held))
    if different:
        raise _lie(path, f"and the index disagree about the tensor {different[0]!r}")


def _lie(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} {what}: it is damaged or not what it claims to be. Download the file again.")
