"""Paged attention on the CPU in which a row's bits depend on its own context and on nothing else.

A product adds in an order that its shape decides, so the same row comes out otherwise beside more rows, or over keys
cut elsewhere. Here all shapes are fixed. Rows stand in tiles of one height, each at its position modulo it, and read
their context from its first token on, padded to whole blocks of keys, which torch's attention takes one after the
other. The rows beside it in its tile, and keys behind it, then change no bit: their weights are exactly zero, and a sum
does not change when zeros are added to it.

A context is always copied, so that neither its pages nor their place in memory can matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agentkit.kernels.flash import Item

#: Keys that torch's attention for the CPU takes at once (`cpu_flash_attention`, its `kv_split_size`).
_BLOCK = 512
#: Query rows that it takes at once.
_ROWS = 32


class Aligned:
    """A step's attention, ready for every layer, as `agentkit.kernels.flash.Layout` is.

    Args:
        work: items whose rows follow each other.
        group: query heads of a KV head.
        dtype: of queries, keys and values.
    """

    def __init__(self, work: Sequence[Item], group: int, dtype: torch.dtype) -> None:
        height = 1 << max(0, (_ROWS // group).bit_length() - 1)  # heads of one KV head are rows, too
        self._stretches = [_Stretch(item, group, height, dtype) for item in work]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """`agentkit.kernels.attention.paged_attention_reference` for the step; rows of no item become zero.

        Args:
            query: ``[t, heads, d]``.
            keys: ``[slots, kv_heads, d]``.
            values: ``[slots, kv_heads, d]``.
            scale: factor on the products.

        Returns:
            ``[t, heads, d]``.
        """
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for stretch in self._stretches:
            stretch.attend(query, keys, values, scale, out)
        return out


class _Stretch:
    """Rows of one sequence that follow each other, in tiles."""

    def __init__(self, item: Item, group: int, height: int, dtype: torch.dtype) -> None:
        first = item.context - item.rows  # position of the first row
        self._group, self._height = group, height
        self._rows = slice(item.start, item.start + item.rows)
        self._skip = first % height
        self._tiles = -(-(self._skip + item.rows) // height)
        self._slots = _slots(item)
        begin = first - self._skip
        position = torch.arange(begin, begin + self._tiles * height).repeat_interleave(group)
        hidden = torch.arange(len(self._slots)) > position[:, None]
        self._mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
        self._mask = self._mask.view(self._tiles, 1, height * group, -1)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """Write the results of these rows into ``out``."""
        kv_heads, d = keys.shape[1:]
        count = self._rows.stop - self._rows.start
        q = query.new_zeros(self._tiles * self._height, kv_heads, self._group, d)
        q[self._skip : self._skip + count] = query[self._rows].view(count, kv_heads, -1, d)
        q = q.view(self._tiles, self._height, kv_heads, self._group, d).transpose(1, 2).flatten(2, 3)

        def context(pool: Tensor) -> Tensor:
            return pool.index_select(0, self._slots).transpose(0, 1).expand(self._tiles, -1, -1, -1)

        y, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, context(keys), context(values), 0.0, False, attn_mask=self._mask, scale=scale
        )
        y = y.unflatten(2, (self._height, self._group)).transpose(1, 2).flatten(0, 1)
        out[self._rows] = y[self._skip : self._skip + count].flatten(1, 2)


def _slots(item: Item) -> Tensor:
    """Slots of a context, padded to whole blocks with its first one, whose numbers are finite."""
    slots = torch.full((-(-item.context // _BLOCK) * _BLOCK,), item.runs[0][0])
    at = 0
    for first, length in item.runs:
        torch.arange(first, first + length, out=slots[at : at + length])
        at += length
    return slots
