"""Windowed paged attention on the CPU: rows that see a part of their past read that part only.

The plan of a GPU does the same with shorter page lists (`agentkit.kernels.groups.windowed`); `visible` defines both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agentkit.kernels.flash import Item, selected
from agentkit.kernels.groups import FAR, Window, visible

#: Rows that read one selection of keys. Fewer read less behind their windows, more share what they copy.
_ROWS = 128


class Windowed:
    """A step's attention, ready for every layer, as `agentkit.kernels.flash.Layout` is.

    Args:
        work: items whose rows follow each other and cover the batch.
        window: which keys a row sees.
        page_size: tokens in a page, for the window's global pages.
        dtype: of queries, keys and values.
    """

    def __init__(self, work: Sequence[Item], window: Window, page_size: int, dtype: torch.dtype) -> None:
        self._blocks: list[tuple[slice, Tensor, Tensor]] = []
        for item in work:
            slots = torch.cat([torch.arange(first, first + length) for first, length in item.runs])
            past = item.context - item.rows
            for cut in range(0, item.rows, _ROWS):
                stop = min(cut + _ROWS, item.rows)
                at = _seen(window, past + cut, past + stop, page_size)
                seen = visible(window, torch.arange(past + cut, past + stop), at, page_size)
                mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
                self._blocks.append((slice(item.start + cut, item.start + stop), slots[at], mask[None, None]))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention of each row over the keys that are `visible` to it.

        Args:
            query: ``[t, heads, d]``.
            keys: ``[slots, kv_heads, d]``.
            values: ``[slots, kv_heads, d]``.
            scale: factor on the products.

        Returns:
            ``[t, heads, d]``.
        """
        kv_heads, d = keys.shape[1:]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for rows, slots, mask in self._blocks:
            q = query[rows].view(-1, kv_heads, query.shape[1] // kv_heads, d)
            q = q.permute(1, 2, 0, 3)  # [kv_heads, group, rows, d]

            def heads(pool: Tensor, slots: Tensor = slots, group: int = q.shape[1]) -> Tensor:
                return selected(pool, slots, query.dtype).transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)

            y, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, heads(keys), heads(values), 0.0, False, attn_mask=mask, scale=scale
            )
            out[rows] = y.permute(2, 0, 1, 3).reshape(-1, query.shape[1], d)
        return out


def _seen(window: Window, first: int, stop: int, page_size: int) -> Tensor:
    """Positions, ascending, that one of the rows at ``first`` to ``stop`` can see."""
    near = max(0, first - window.window + 1)
    parts = [torch.arange(min(window.sinks, near)), torch.arange(near, stop)]
    for page in range(window.every or FAR, near // page_size + 2, window.every or FAR):
        parts.append(torch.arange((page - 1) * page_size, min(page * page_size, near)))
    return torch.cat(parts).unique()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
