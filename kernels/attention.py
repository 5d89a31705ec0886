"""Paged attention: query rows of many sequences against keys and values that lie in shared pages.

A work item is a block of query rows and the runs of slots that hold its context. Partial results over runs are
merged by their log-sum-exp, so neither the length nor the placement of a context forces a copy of it. On a GPU the
work comes as a plan, lists of pages in tensors that the kernels of `agentkit.kernels.paged` read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentkit.kernels import paged
from agentkit.kernels.aligned import Aligned
from agentkit.kernels.chunked import Chunked
from agentkit.kernels.flash import Layout
from agentkit.kernels.plan import Plan
from agentkit.kernels.windowed import Windowed


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


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Rows of one batch that are answered by different works.

    Attributes:
        parts: ``[r]`` int64 rows of the batch and their work, in which they are counted from 0.
    """

    parts: tuple[tuple[Tensor, Layout | Windowed | Plan], ...]


def paged_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    work: Sequence[Work],
    scale: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """Definition: softmax attention over the gathered context, causal within a work item's own rows.

    It computes in fp32, or in fp64 where the query is fp64.

    Args:
        query: ``[t, heads, d]``.
        keys: ``[slots, kv_heads, d]``, the pool of one layer; ``heads`` is a multiple of ``kv_heads``.
        values: ``[slots, kv_heads, d]``.
        work: items whose rows follow each other and cover the batch.
        scale: factor on the products, ``d ** -0.5`` as a rule.
        key_scale: what the stored keys are multiplied by, for a pool in fp8.
        value_scale: what the stored values are multiplied by.

    Returns:
        ``[t, heads, d]`` in the dtype of ``query``.
    """
    out = torch.empty_like(query)
    group, wide = query.shape[1] // keys.shape[1], torch.promote_types(query.dtype, torch.float32)
    for item in work:
        slots = torch.cat([torch.arange(first, first + length) for first, length in item.runs]).to(keys.device)
        rows = slice(item.start, item.start + item.rows)
        q = query[rows].transpose(0, 1).to(wide)
        k = keys[slots].transpose(0, 1).to(wide).repeat_interleave(group, 0) * key_scale
        v = values[slots].transpose(0, 1).to(wide).repeat_interleave(group, 0) * value_scale
        scores = q @ k.transpose(1, 2) * scale
        visible = torch.ones(item.rows, len(slots), dtype=torch.bool, device=q.device).tril(len(slots) - item.rows)
        scores = scores.masked_fill(~visible, -math.inf)
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
    return out


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    work: Sequence[Work] | Layout | Aligned | Windowed | Chunked | Plan | Parts,
    scale: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """`paged_attention_reference`, without copying any long context.

    The pool has the query's dtype or is float8_e4m3fn. On the CPU ``work`` are items, or the layout that was made of
    them once for all layers, and a pool of fp8 is copied in the query's dtype, context by context: it saves memory and
    costs time. On a GPU it is a plan that was updated for this batch (`agentkit.kernels.plan`), fp8 is widened in
    registers, and a plan with shared prefixes, windows or chosen pages is launched the same way.

    For `Chunked`, and for a plan that was updated with several turns, ``query`` has the queries of all turns, one after
    the other, and the result is that of `agentkit.kernels.chunked.chunked_attention_reference`.

    Raises:
        ValueError: shapes, dtypes, devices or work that do not belong together; it names the argument.
    """
    if query.ndim != 3 or keys.ndim != 3 or query.shape[1] % keys.shape[1]:
        raise ValueError(f"query: {tuple(query.shape)}, its heads are no multiple of those of {tuple(keys.shape)}")
    if keys.shape != values.shape or keys.shape[2] != query.shape[2]:
        raise ValueError(f"keys, values: {tuple(keys.shape)}, {tuple(values.shape)} do not fit {tuple(query.shape)}")
    if isinstance(work, Parts):
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for rows, part in work.parts:
            out[rows] = paged_attention(query[rows], keys, values, part, scale, key_scale, value_scale)
        return out
    if isinstance(work, Plan):
        if query.device.type != "cuda":
            raise ValueError(f"query: a plan is for a GPU, not for {query.device}")
        paged.check(query, keys, values, work, scale, key_scale)
        return paged.attend(query, keys, values, work, scale, key_scale, value_scale)
    if query.device.type != "cpu":
        raise ValueError(f"work: items are for the CPU; {query.device} needs a plan")
    if keys.dtype not in (query.dtype, torch.float8_e4m3fn):
        raise ValueError(f"keys: {keys.dtype} does not fit {query.dtype} on the CPU")
    layout = work if isinstance(work, Layout | Aligned | Windowed | Chunked) else Layout(work, query.dtype)
    out = layout.attend(query, keys, values, scale * key_scale)
    return out if value_scale == 1 else out * value_scale
