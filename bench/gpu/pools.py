"""Batches as large as an engine's, made on the device: one layer's pool, pages in random order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels import paged
from agentkit.kernels.groups import Group, Span, Window, flat
from agentkit.kernels.plan import Capacity, Plan, Shape
from bench.gpu.card import Bench
from bench.gpu.timing import capture
from tests.kernels.scene import FP8, Scene

PAGE = 64
#: Query heads, KV heads and head size of Qwen3-4B, and of a rehearsal.
QWEN, TOY = (32, 8, 128), (2, 1, 32)
_AT_ONCE = 1 << 26  # numbers made at once: 256 MiB in fp32


def heads_of(bench: Bench) -> tuple[int, int, int]:
    return TOY if bench.rehearsal else QWEN


def filled(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers, a stretch at a time: a pool of fp8 has no room for itself in fp32."""
    out = torch.empty(*shape, dtype=dtype, device=device)
    for part in out.view(-1).split(_AT_ONCE):
        part.copy_(torch.randn(len(part), device=device))
    return out


def contexts(
    bench: Bench,
    batch: int,
    context: int,
    rows: int = 1,
    shared: int = 0,
    pool_dtype: torch.dtype = torch.bfloat16,
) -> Scene:
    """Sequences of one length, bf16 queries.

    Args:
        bench: for the device.
        batch: sequences.
        context: tokens of each, its rows included.
        rows: query rows of each.
        shared: leading tokens that all have in common, whole pages.
        pool_dtype: of keys and values.
    """
    heads, kv_heads, d = heads_of(bench)
    common, need = shared // PAGE, -(-context // PAGE)
    pages = common + batch * (need - common)
    order = np.random.default_rng(0).permutation(pages).astype(np.int32)
    own = order[common:].reshape(batch, need - common)
    spans = [Span(i * rows, rows, context, np.concatenate([order[:common], own[i]])) for i in range(batch)]
    return Scene(
        filled((batch * rows, heads, d), torch.bfloat16, bench.device),
        filled((pages * PAGE, 2, kv_heads, d), pool_dtype, bench.device),
        spans,
        Shape(heads, kv_heads, d, PAGE, pages),
        (0.5, 0.25) if pool_dtype is FP8 else (1.0, 1.0),
    )


def planned(bench: Bench, s: Scene, groups: Sequence[Group] | None = None, window: Window | None = None) -> Plan:
    """A plan that just holds the groups, flat ones by default, split for the device."""
    groups = flat(s.spans, PAGE) if groups is None else groups
    rows, pages = sum(len(group.rows) for group in groups), sum(len(group.pages) for group in groups)
    plan = Plan(
        s.shape, Capacity(rows, pages, items=rows + 4096, parts=rows + 4096), bench.device, bench.processors,
        window or Window(),
    )  # fmt: skip
    plan.update(groups, len(s.query))
    paged.check(s.query, s.keys, s.values, plan, s.shape.head_dim**-0.5, s.scales[0])
    return plan


def attend(s: Scene, plan: Plan, query: Tensor | None = None) -> Tensor:
    """The launches of `agentkit.kernels.attention.paged_attention`; unlike it, also in a rehearsal."""
    query = s.query if query is None else query
    return paged.attend(query, s.keys, s.values, plan, s.shape.head_dim**-0.5, *s.scales)


def timed(bench: Bench, s: Scene, plan: Plan) -> float:
    """Seconds of a plan's launches, replayed from a graph: a step launches them once for each layer."""
    return bench.clock.cold(capture(lambda: attend(s, plan)).replay)


def gathered(s: Scene) -> tuple[Tensor, Tensor]:
    """Keys and values as torch's attention wants them: ``[batch, kv_heads, context, d]``, contiguous."""
    held = s.pool.view(s.shape.pages, PAGE, *s.pool.shape[1:])
    context = s.spans[0].context
    sides: list[Tensor] = []
    for side in (0, 1):
        out = s.pool.new_empty(len(s.spans), s.shape.kv_heads, context, s.shape.head_dim)
        for i, span in enumerate(s.spans):
            pages = torch.from_numpy(span.pages).to(s.pool.device).long()
            out[i] = held[pages, :, side].flatten(0, 1)[:context].transpose(0, 1)
        sides.append(out)
    return sides[0], sides[1]


def read_bytes(s: Scene, distinct: int | None = None) -> int:
    """Bytes that one launch has to move: keys and values of all contexts (or ``distinct`` tokens), queries, results."""
    tokens = sum(span.context for span in s.spans) if distinct is None else distinct
    token = 2 * s.shape.kv_heads * s.shape.head_dim * s.pool.element_size()
    return tokens * token + 2 * s.query.numel() * s.query.element_size()


def causal_operations(s: Scene) -> float:
    """Multiplications and additions of both products, of pairs of a row and a key that it sees."""
    pairs = sum(span.rows * (span.context - span.rows) + span.rows * (span.rows + 1) // 2 for span in s.spans)
    return 4.0 * pairs * s.shape.heads * s.shape.head_dim
