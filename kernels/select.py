"""Which pages a decode row reads when it does not read all: those whose keys could match the query best.

A page's bound is the largest product that its keys' minimum and maximum allow: sum over a head's numbers of
``max(q · kmin, q · kmax)``. Source: Quest (Tang et al. 2024, arXiv:2406.10774). Summed over the query heads of a KV
head it is one vector product with the maximum and one with the minimum, so the heads of a group choose together and
keep sharing their loads.
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from agentkit.kernels.jit import jit, tl, triton


def page_scores_reference(query: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """Definition: the bound of each page of each sequence, summed over the query heads of a KV head.

    Args:
        query: ``[b, heads, d]``, one row of each sequence.
        bounds: ``[pages, 2, kv_heads, d]``, minimum and maximum over a page's keys, as `agentkit.kernels.cache`
            writes them for one layer.
        table: ``[b, w]`` int32 page ids, padded with any page of the pool.

    Returns:
        ``[b, kv_heads, w]`` fp32 (fp64 for an fp64 query), of padding without meaning.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    low, high = bounds[table.long()].to(wide).permute(2, 0, 3, 1, 4)  # [b, kv_heads, w, d] each
    q = query.to(wide).view(query.shape[0], bounds.shape[2], -1, 1, query.shape[2])
    return torch.maximum(q * low.unsqueeze(2), q * high.unsqueeze(2)).sum((2, 4))


def page_scores(query: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """`page_scores_reference`, in one pass over the bounds.

    Raises:
        ValueError: shapes or dtypes that do not belong together; it names the argument.
    """
    heads, kv_heads, d = query.shape[1], bounds.shape[2], query.shape[2]
    if bounds.ndim != 4 or bounds.shape[1] != 2 or bounds.shape[3] != d:
        raise ValueError(f"bounds: {tuple(bounds.shape)} is not [pages, 2, kv_heads, {d}]")
    if heads % kv_heads:
        raise ValueError(f"query: {heads} heads are no multiple of the {kv_heads} of bounds")
    if table.ndim != 2 or len(table) != len(query) or table.dtype is not torch.int32:
        raise ValueError(f"table: {table.dtype} {tuple(table.shape)} is not int32 [{len(query)}, pages]")
    if query.device.type == "cuda":
        return launch_page_scores(query, bounds, table)
    q = query.float().view(len(query), kv_heads, -1, d)
    low, high = bounds[table.long()].float().permute(2, 0, 3, 4, 1)  # [b, kv_heads, d, w] each
    positive, negative = q.clamp(min=0).sum(2, keepdim=True), q.clamp(max=0).sum(2, keepdim=True)
    return (positive @ high + negative @ low).squeeze(2)


def select_pages(scores: Tensor, table: Tensor, contexts: Tensor, count: int, page_size: int) -> Tensor:
    """The last page of each context and the ``count - 1`` others with the highest scores, as lists for a plan.

    Nothing here waits for the device. The plan's groups come from `agentkit.kernels.groups.selected` with the same
    ``count``; give the result to `agentkit.kernels.plan.Plan.with_entries`.

    Args:
        scores: ``[b, kv_heads, w]``.
        table: ``[b, w]`` int32 page ids.
        contexts: ``[b]`` int32 tokens of each context.
        count: pages of a list.
        page_size: tokens in a page.

    Returns:
        ``[kv_heads, b * count, 2]`` int32, (page id, position of its first token), ascending in position.
    """
    if count < 1:
        raise ValueError(f"count: {count} pages leave nothing to read")
    b, kv_heads, width = scores.shape
    last = ((contexts.long() + page_size - 1) // page_size - 1).clamp(min=0)[:, None, None]
    index = torch.arange(width, device=scores.device)
    earlier = scores.masked_fill(index >= last, -torch.inf)
    best = earlier.topk(min(count - 1, width), -1).indices
    best = best.masked_fill(best >= last, width)  # fewer pages than `count`: those behind the end sort last
    parts = [best, last.expand(b, kv_heads, 1)]
    if (padding := count - 1 - best.shape[2]) > 0:
        parts.append(best.new_full((b, kv_heads, padding), width))
    chosen = torch.cat(parts, 2).sort(-1).values.clamp(max=width - 1)
    pages = table.unsqueeze(1).expand(-1, kv_heads, -1).gather(2, chosen)
    lists = torch.stack([pages, (chosen * page_size).to(torch.int32)], -1)
    return lists.transpose(0, 1).reshape(kv_heads, b * count, 2)


@jit
def page_scores_kernel(
    query, bounds, table, scores, width, query_row, query_head, bound_page, bound_side, bound_head, table_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Scores of ``P`` pages of one sequence for one KV head; ``HEADS`` is ``GROUP`` up to a power of two."""
    kv_head = tl.program_id(0) % KV_HEADS
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    page = tl.program_id(1) * P + tl.arange(0, P)
    head = tl.arange(0, HEADS)
    d = tl.arange(0, D)
    q = query + row * query_row + ((kv_head * GROUP + head) * query_head)[:, None] + d[None, :]
    q = tl.load(q, mask=head[:, None] < GROUP, other=0.0).to(tl.float32)
    positive, negative = tl.sum(tl.maximum(q, 0.0), 0), tl.sum(tl.minimum(q, 0.0), 0)
    live = page < width
    at = tl.load(table + row * table_row + page, mask=live, other=0).to(tl.int64) * bound_page + kv_head * bound_head
    at = at[:, None] + d[None, :]
    low = tl.load(bounds + at, mask=live[:, None], other=0.0).to(tl.float32)
    high = tl.load(bounds + bound_side + at, mask=live[:, None], other=0.0).to(tl.float32)
    found = tl.sum(high * positive[None, :] + low * negative[None, :], 1)
    tl.store(scores + (row * KV_HEADS + kv_head) * width + page, found, mask=live)


def launch_page_scores(query: Tensor, bounds: Tensor, table: Tensor) -> Tensor:
    """`page_scores` in Triton."""
    if query.shape[2] & (query.shape[2] - 1) or query.stride(2) != 1 or bounds.stride(3) != 1 or table.stride(1) != 1:
        raise ValueError("query, bounds, table: heads must be a power of two of numbers side by side")
    kv_heads, group, block = bounds.shape[2], query.shape[1] // bounds.shape[2], 32
    scores = torch.empty(len(query), kv_heads, table.shape[1], dtype=torch.float32, device=query.device)
    if not scores.numel():
        return scores
    page_scores_kernel[(len(query) * kv_heads, -(-table.shape[1] // block))](
        query, bounds, table, scores, table.shape[1], query.stride(0), query.stride(1), *bounds.stride()[:3],
        table.stride(0), KV_HEADS=kv_heads, GROUP=group, HEADS=triton.next_power_of_2(group), D=query.shape[2],
        P=block, num_warps=4,
    )  # fmt: skip
    return scores
