"""Paged attention: query rows of many sequences against keys and values that lie in shared pages.

A work item is a block of query rows and the runs of slots that hold its context. Partial results over runs are
merged by their log-sum-exp, so neither the length nor the placement of a context forces a copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's part of a step.

    Attributes:
        start: first query row in the batch.
        rows: how many query rows. They are the last ``rows`` tokens of the context.
        runs: ``(first slot, length)`` pieces of the context in order, the query rows' own tokens included.
    """

    start: int
    rows: int
    runs: tuple[tuple[int, int], ...]

    @property
    def context(self) -> int:
        """Tokens in the context, own tokens included."""
        return sum(length for _, length in self.runs)


def paged_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, work: Sequence[Work], scale: float
) -> Tensor:
    """Definition: softmax attention in fp32 over the gathered context, causal within a work item's own rows.

    Args:
        query: ``[t, heads, d]``.
        keys: ``[slots, kv_heads, d]``, the pool of one layer; ``heads`` is a multiple of ``kv_heads``.
        values: ``[slots, kv_heads, d]``.
        work: items whose rows follow each other and cover the batch.
        scale: factor on the products, ``d ** -0.5`` as a rule.

    Returns:
        ``[t, heads, d]`` in the dtype of ``query``.
    """
    out = torch.empty_like(query)
    group = query.shape[1] // keys.shape[1]
    for item in work:
        slots = torch.cat([torch.arange(first, first + length) for first, length in item.runs]).to(keys.device)
        rows = slice(item.start, item.start + item.rows)
        q = query[rows].transpose(0, 1).float()
        k = keys[slots].transpose(0, 1).float().repeat_interleave(group, 0)
        v = values[slots].transpose(0, 1).float().repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) * scale
        visible = torch.ones(item.rows, len(slots), dtype=torch.bool, device=q.device).tril(len(slots) - item.rows)
        scores = scores.masked_fill(~visible, -math.inf)
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
    return out


def paged_attention(query: Tensor, keys: Tensor, values: Tensor, work: Sequence[Work], scale: float) -> Tensor:
    """`paged_attention_reference`; on the CPU without copying any context.

    Raises:
        ValueError: shapes that do not belong together; it names the argument.
    """
    if query.shape[1] % keys.shape[1]:
        raise ValueError(f"query: {query.shape[1]} heads are no multiple of the {keys.shape[1]} heads of keys")
    if keys.shape != values.shape or keys.shape[2] != query.shape[2]:
        raise ValueError(f"keys, values: {tuple(keys.shape)}, {tuple(values.shape)} do not fit {tuple(query.shape)}")
    if query.device.type != "cpu":
        return paged_attention_reference(query, keys, values, work, scale)
    grouped = query.view(query.shape[0], 1, keys.shape[1], -1, query.shape[2])
    parts = [
        _decode(grouped[item.start], keys, values, item, scale)
        if item.rows == 1
        else _prefill(query.narrow(0, item.start, item.rows), keys, values, item, scale)
        for item in work
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(query.shape)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Torch's tiled CPU attention, ``[b, h, rows, d]`` against ``[b, h, n, d]``, and its log-sum-exp."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _decode(q: Tensor, keys: Tensor, values: Tensor, item: Work, scale: float) -> Tensor:
    """One query row ``[1, kv_heads, group, d]``: heads of a group are rows of one product, so keys are read once."""
    if len(item.runs) == 1:
        run = item.runs[0]
        return _flash(q, _run(keys, run), _run(values, run), scale)[0]
    return merge([_flash(q, _run(keys, run), _run(values, run), scale) for run in item.runs])


def _run(pool: Tensor, run: tuple[int, int]) -> Tensor:
    """``[1, kv_heads, n, d]``, a run of slots where they lie. One call: a decode step makes 60 of these per token."""
    first, length = run
    slot, head, _ = pool.stride()
    return pool.as_strided(
        (1, pool.shape[1], length, pool.shape[2]), (0, head, slot, 1), pool.storage_offset() + first * slot
    )


def _prefill(q: Tensor, keys: Tensor, values: Tensor, item: Work, scale: float) -> Tensor:
    """A block of rows ``[rows, heads, d]``: everything before it unmasked, its own tokens causal."""
    kv_heads, d = keys.shape[1:]
    past, own = _split(item.runs, item.context - item.rows)
    grouped = q.view(item.rows, kv_heads, -1, d).permute(1, 2, 0, 3)  # [kv_heads, group, rows, d]

    def heads(x: Tensor) -> Tensor:  # one kv head serves its group through a stride of zero
        return x.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)

    parts = [_flash(grouped, heads(keys[a : a + n]), heads(values[a : a + n]), scale, causal=False) for a, n in past]
    if len(own) == 1:
        a, n = own[0]
        mine = keys[a : a + n], values[a : a + n]
    else:  # the chunk straddles runs: only its own tokens are put together, never the context
        mine = torch.cat([keys[a : a + n] for a, n in own]), torch.cat([values[a : a + n] for a, n in own])
    parts.append(_flash(grouped, heads(mine[0]), heads(mine[1]), scale, causal=True))
    return merge(parts).permute(2, 0, 1, 3).reshape(item.rows, kv_heads, -1, d)


def _split(runs: Sequence[tuple[int, int]], at: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Cut a list of runs after ``at`` tokens."""
    before: list[tuple[int, int]] = []
    after: list[tuple[int, int]] = []
    for first, length in runs:
        head = min(length, max(at, 0))
        if head:
            before.append((first, head))
        if length > head:
            after.append((first + head, length - head))
        at -= head
    return before, after


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Combine attention over disjoint pieces of a context by their log-sum-exp.

    Source: the online softmax of Milakov and Gimelshein 2018, arXiv:1805.02867.

    Args:
        parts: ``(output [..., rows, d], log-sum-exp [..., rows])`` of each piece.

    Returns:
        ``[..., rows, d]``, what one pass over all pieces would give.
    """
    if len(parts) == 1:
        return parts[0][0]
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    out = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for part, lse in parts:
        out += part * (lse - total).exp().unsqueeze(-1)
    return out.to(parts[0][0].dtype)
