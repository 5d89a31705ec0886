"""The KV of an engine as pages that can leave it and come back, and what must agree for them to mean the same."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from agentkit.kernels.pages import gather_pages, scatter_pages
from agentkit.runtime.model import Model
from agentkit.runtime.radix import Spill
from agentkit.runtime.sequence import Restore

T = TypeVar("T")

#: The order of the values in a block, all layers of a page together.
_LAYOUT = f"layer, token, key or value, head, dimension; {sys.byteorder}-endian"

_BETWEEN = 1 << 25  # bytes of pages that are on their way at once


@dataclass(frozen=True, slots=True)
class KVFormat:
    """What the bytes of a page mean. Pages go from one engine to another only where all of this is equal.

    Attributes:
        dtype: of the values, such as ``float32``.
        page_size: tokens in a page.
        layers: of the model.
        kv_heads: in a layer.
        head_dim: of a head.
        rope: the rotary embedding that the keys have been turned by.
        exact: whether the weights were used as they are, without `Options.packed`.
        weights: what they were quantised to.
        attention: how the prompts were read.
        layout: the order of the values.
    """

    dtype: str
    page_size: int
    layers: int
    kv_heads: int
    head_dim: int
    rope: str
    exact: bool
    weights: str = "auto"
    attention: str = "dense"
    layout: str = _LAYOUT

    def differences(self, other: dict[str, object]) -> list[str]:
        """In what another format, as `asdict` gives it, is not this one."""
        mine = asdict(self)
        return [f"{key} {other.get(key)} instead of {value}" for key, value in mine.items() if other.get(key) != value]


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A pool of zeros. On the CPU memory is taken as it is written: loading neither waits for it nor claims it."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)


class PagedKV:
    """The KV of all pages of a model's pool; touched on the engine's thread alone, between two steps.

    Args:
        model: whose KV it is.
        kv: ``[layers, slots, 2, kv_heads, head_dim]``.
        page_size: tokens in a page.
        host_pages: room for so many pages in the host's memory, which is pinned where the pool is on a GPU.
    """

    def __init__(self, model: Model, kv: Tensor, page_size: int, host_pages: int = 0) -> None:
        c = model.config
        rope = f"theta {c.rope_theta!r}, {c.rope_scaling!r}" + (f", {c.dual_chunk!r}" if c.dual_chunk else "")
        dtype = str(kv.dtype).removeprefix("torch.")
        self.format = KVFormat(
            dtype, page_size, c.layers, c.kv_heads, c.head_dim, rope, not model.packed, model.weights
        )
        self.dtype = kv.dtype
        self.block_shape = (c.layers, page_size, 2, c.kv_heads, c.head_dim)
        self._kv, self._page_size = kv, page_size
        self._on_gpu = kv.device.type == "cuda"
        host = (host_pages, *self.block_shape)
        pinned = self._on_gpu and host_pages > 0
        self._host = (
            torch.zeros(host, dtype=kv.dtype, pin_memory=True) if pinned else zeros(host, kv.dtype, torch.device("cpu"))
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return torch.Size(self.block_shape).numel() * self.dtype.itemsize

    def read(self, pages: Sequence[int]) -> Tensor:
        """Copies of pages: ``[n, *block_shape]`` on the CPU."""
        return gather_pages(self._kv, self._index(pages), self._page_size).cpu()

    def write(self, pages: Sequence[int], blocks: Tensor) -> None:
        """Fill pages with blocks that `read` has given, here or elsewhere."""
        scatter_pages(self._kv, self._index(pages), blocks.to(self._kv.device), self._page_size)

    def read_host(self, slots: Sequence[int]) -> Tensor:
        """Copies of slots of the host: ``[n, *block_shape]``."""
        if self._on_gpu:
            torch.cuda.current_stream(self._kv.device).synchronize()  # copies to them may still be on their way
        return self._host[list(slots)]

    def spill(self, spills: Sequence[Spill]) -> None:
        """Copy pages to the host. Nothing waits for it on a GPU: all that follows does so on the same stream."""
        for some in self._pieces(spills):
            blocks = gather_pages(self._kv, self._index([spill.page for spill in some]), self._page_size)
            for spill, block in zip(some, blocks, strict=True):
                self._host[spill.slot].copy_(block, non_blocking=True)

    def restore(self, restores: Sequence[Restore]) -> None:
        """Copy slots of the host to pages, likewise."""
        for some in self._pieces(restores):
            blocks = self._kv.new_empty(len(some), *self.block_shape)
            for restore, block in zip(some, blocks, strict=True):
                block.copy_(self._host[restore.slot], non_blocking=True)
            scatter_pages(self._kv, self._index([restore.page for restore in some]), blocks, self._page_size)

    def _pieces(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """So that what lies between pool and host stays small."""
        count = max(1, _BETWEEN // self.block_bytes)
        for start in range(0, len(items), count):
            yield items[start : start + count]

    def _index(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self._kv.device)
