"""Pools, contexts and the definition that tests of paged attention share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from triton import knobs

from agentkit.kernels import paged
from agentkit.kernels.groups import Group, Span, Window, flat, visible
from agentkit.kernels.plan import Capacity, Plan, Reserve, Shape

DEVICE = torch.device("cpu" if knobs.runtime.interpret else "cuda")
FP8 = torch.float8_e4m3fn


@dataclass(slots=True)
class Scene:
    """A batch: queries, one layer's pool, and where each sequence's context lies in it."""

    query: Tensor
    pool: Tensor
    spans: list[Span]
    shape: Shape
    scales: tuple[float, float] = (1.0, 1.0)

    @property
    def keys(self) -> Tensor:
        return self.pool[:, 0]

    @property
    def values(self) -> Tensor:
        return self.pool[:, 1]


def scene(
    batch: Sequence[tuple[int, int]],
    heads: tuple[int, int, int] = (4, 2, 32),
    page_size: int = 64,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    shared: int = 0,
    seed: int = 0,
) -> Scene:
    """A batch of ``(context, rows)``; NaN fills every page and slot that no context uses.

    The first ``shared`` pages of all contexts that have so many full ones before their rows are the same pages.
    """
    generator = torch.Generator().manual_seed(seed)
    q_heads, kv_heads, d = heads
    needed = [-(-context // page_size) for context, _ in batch]
    pages = sum(needed) + shared + 3
    free = torch.randperm(pages, generator=generator).to(torch.int32).numpy()
    common, free = free[:shared], free[shared:]
    spans: list[Span] = []
    start = 0
    for (context, rows), need in zip(batch, needed, strict=True):
        head = common if (context - rows) // page_size >= shared else common[:0]
        own, free = free[: need - len(head)], free[need - len(head) :]
        spans.append(Span(start, rows, context, np.concatenate([head, own])))
        start += rows
    pool = torch.full((pages * page_size, 2, kv_heads, d), torch.nan)
    for span in spans:
        at = slots(span, page_size)
        pool[at] = torch.randn(len(at), 2, kv_heads, d, generator=generator)
    wide = torch.randn(start, q_heads + 2 * kv_heads, d, generator=generator).to(dtype)
    query = wide[:, :q_heads].to(DEVICE)  # as the model has it: between the keys and values of its tokens
    return Scene(
        query,
        pool.to(pool_dtype or dtype).to(DEVICE),
        spans,
        Shape(q_heads, kv_heads, d, page_size, pages),
        (0.5, 0.25) if pool_dtype is FP8 else (1.0, 1.0),
    )


def slots(span: Span, page_size: int) -> Tensor:
    """Slots of a context in order."""
    at = torch.arange(span.context)
    return torch.from_numpy(span.pages.astype(np.int64))[at // page_size] * page_size + at % page_size


def defined(s: Scene, dtype: torch.dtype, window: Window | None = None) -> Tensor:
    """Attention by its definition, with every intermediate in ``dtype``; a row without context is zero."""
    out = torch.zeros(s.query.shape, dtype=dtype)
    query, pool = s.query.cpu(), s.pool.cpu()
    for span in s.spans:
        if not span.context:
            continue
        held = pool[slots(span, s.shape.page_size)].to(dtype)
        k, v = (held[:, i].transpose(0, 1).repeat_interleave(s.shape.group, 0) * s.scales[i] for i in (0, 1))
        q = query[span.start : span.start + span.rows].to(dtype).transpose(0, 1)
        scores = q @ k.transpose(1, 2) * s.shape.head_dim**-0.5
        at = torch.arange(span.context)
        seen = visible(window or Window(), at[span.context - span.rows :], at, s.shape.page_size)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        out[span.start : span.start + span.rows] = (weights @ v).transpose(0, 1)
    return out


def plan_of(
    s: Scene,
    groups: Sequence[Group] | None = None,
    processors: int = 1,
    chunk: int | None = None,
    window: Window | None = None,
    reserve: Reserve | None = None,
) -> Plan:
    """A plan for the scene, flat unless groups are given."""
    groups = flat(s.spans, s.shape.page_size) if groups is None else groups
    capacity = Capacity(rows=2048, pages=4096, items=1024, parts=2048)
    plan = Plan(s.shape, capacity, DEVICE, processors, window or Window(), chunk)
    plan.partial.fill_(torch.nan)
    plan.lse.fill_(torch.nan)
    plan.update(groups, len(s.query), reserve)
    return plan


def attend(s: Scene, plan: Plan) -> Tensor:
    """What the kernels make of it."""
    scale = s.shape.head_dim**-0.5
    paged.check(s.query, s.keys, s.values, plan, scale, s.scales[0])
    return paged.attend(s.query, s.keys, s.values, plan, scale, *s.scales).cpu()
