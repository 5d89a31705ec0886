"""The KV of an engine as pages that can leave it and come back, and what must agree for them to mean the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from agentkit.kernels.pages import gather_pages, scatter_pages
from agentkit.runtime.model import Model

#: The order of the values in a block, all layers of a page together.
_LAYOUT = f"layer, token, key or value, head, dimension; {sys.byteorder}-endian"


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
        layout: the order of the values.
    """

    dtype: str
    page_size: int
    layers: int
    kv_heads: int
    head_dim: int
    rope: str
    exact: bool
    layout: str = _LAYOUT

    def differences(self, other: dict[str, object]) -> list[str]:
        """In what another format, as `asdict` gives it, is not this one."""
        mine = asdict(self)
        return [f"{key} {other.get(key)} instead of {value}" for key, value in mine.items() if other.get(key) != value]


class PagedKV:
    """The KV of all pages of a model's pool; touched on the engine's thread alone, between two steps.

    Args:
        model: whose KV it is.
        kv: ``[layers, slots, 2, kv_heads, head_dim]``.
        page_size: tokens in a page.
    """

    def __init__(self, model: Model, kv: Tensor, page_size: int) -> None:
        c = model.config
        rope = f"theta {c.rope_theta!r}, {c.rope_scaling!r}"
        dtype = str(kv.dtype).removeprefix("torch.")
        self.format = KVFormat(dtype, page_size, c.layers, c.kv_heads, c.head_dim, rope, not model.packed)
        self.dtype = kv.dtype
        self.block_shape = (c.layers, page_size, 2, c.kv_heads, c.head_dim)
        self._kv, self._page_size = kv, page_size

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

    def _index(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self._kv.device)
