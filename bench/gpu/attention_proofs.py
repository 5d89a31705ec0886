"""Proofs of paged attention: exact by FlashAttention's rule, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels import paged, select
from agentkit.kernels.groups import Group, Span, Window, flat, selected, shared, windowed
from agentkit.kernels.plan import Capacity, Plan, Reserve
from bench.gpu.card import Bench
from bench.gpu.correctness import Proof, as_exact, same_bits
from bench.gpu.pools import QWEN, TOY
from bench.gpu.timing import capture
from tests.kernels.scene import DEVICE, FP8, Scene, attend, defined, plan_of, scene, slots

TYPES = [
    ("fp32", torch.float32, None),
    ("fp16", torch.float16, None),
    ("bf16", torch.bfloat16, None),
    ("fp16 over fp8", torch.float16, FP8),
    ("bf16 over fp8", torch.bfloat16, FP8),
]
#: Around the borders of pages and tiles, a row without context, prefill beside decode.
EDGES = [(1, 1), (63, 1), (64, 1), (65, 1), (0, 1), (150, 3), (130, 40), (20, 20)]
FEW = [(1, 1), (65, 1), (0, 1), (90, 40)]
LONG = [(8192, 1), (4097, 1), (2048, 1), (63, 1), (1500, 300), (700, 8)]
ODD = [(9, 3, 64), (4, 4, 32), (8, 1, 64), (5, 1, 128), (24, 1, 32), (2, 1, 256)]
WINDOWS = [Window(1), Window(30), Window(64, sinks=4), Window(100, sinks=70, every=3), Window(999)]


def proofs(bench: Bench) -> Iterator[Proof]:
    toy = bench.rehearsal
    heads, batch = (TOY, FEW) if toy else (QWEN, EDGES)
    for page in (16, 64):
        for name, dtype, pool in TYPES[2:3] if toy and page == 16 else TYPES:
            yield (
                f"attention {name}, pages of {page}, prefill and decode",
                partial(_exact, batch, heads, page, dtype, pool, 1),
            )
    for odd in ODD[:1] if toy else ODD:
        yield f"attention with heads {odd}", partial(_exact, FEW, odd, 16, torch.float32, None, 2)
        yield f"attention with heads {odd}, fp8", partial(_exact, FEW, odd, 64, torch.bfloat16, FP8, 2)
    for name, dtype, pool in TYPES[2:3] if toy else TYPES[2::2]:
        long = [(300, 1), (129, 30)] if toy else LONG
        yield f"attention of long contexts, {name}", partial(_exact, long, heads, 64, dtype, pool, bench.processors)
    for branches in (4,) if toy else (2, 4, 9, 40):
        yield f"{branches} branches over a shared prefix", partial(_branches, heads, branches)
    for window in WINDOWS[2:3] if toy else WINDOWS:
        yield f"{window}", partial(_window, heads, window)
    yield "chosen pages", partial(_chosen, heads)
    yield "attention twice is the same bits", partial(_twice, heads, bench.processors)
    yield "moving pages changes no bit", partial(_moved, heads)
    yield "a fixed chunk makes rows independent of their batch", partial(_alone, heads)
    yield "a reserved plan, captured, reads the next steps", partial(_replayed, heads)
    beyond = 1 << 12 if toy else (1 << 31) + (1 << 27)
    yield "attention beyond 2**31 numbers, bf16", partial(_far, heads, beyond, torch.bfloat16)
    yield "attention beyond 2**31 numbers, fp8", partial(_far, heads, beyond, FP8)


def _right(s: Scene, ours: Tensor, window: Window | None = None) -> None:
    as_exact(ours, defined(s, s.query.dtype, window), defined(s, torch.float64, window))


def _exact(
    batch: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    page: int,
    dtype: torch.dtype,
    pool: torch.dtype | None,
    processors: int,
) -> None:
    s = scene(batch, heads, page, dtype, pool)
    ours = attend(s, plan_of(s, processors=processors))
    _right(s, ours)
    for span in s.spans:
        assert span.context or not ours[span.start].any(), "a row without context is not zero"


def _branches(heads: tuple[int, int, int], branches: int) -> None:
    s = scene([(138 + 7 * i % 50, 1 + i % 2) for i in range(branches)], heads, 64, torch.bfloat16, shared=2)
    groups = shared(s.spans, 64, least=128)
    assert len(groups) == branches + 1, f"{len(groups)} groups of {branches} branches"
    _right(s, attend(s, plan_of(s, groups)))


def _window(heads: tuple[int, int, int], window: Window) -> None:
    s = scene([(300, 1), (64, 1), (65, 1), (150, 7), (0, 1), (1, 1)], heads, 64, torch.bfloat16)
    _right(s, attend(s, plan_of(s, windowed(s.spans, 64, window), window=window, chunk=64)), window)


def _chosen(heads: tuple[int, int, int]) -> None:
    """Attention over chosen pages is attention over a pool that has no others."""
    page, count = 16, 4
    s = scene([(400, 1), (90, 1), (17, 1), (1, 1)], heads, page, torch.bfloat16)
    width = max(len(span.pages) for span in s.spans)
    table = torch.from_numpy(np.stack([np.pad(x.pages, (0, width - len(x.pages))) for x in s.spans])).to(DEVICE)
    lengths = torch.tensor([span.context for span in s.spans], dtype=torch.int32, device=DEVICE)
    keys = s.keys.view(s.shape.pages, page, *s.keys.shape[1:]).float()
    bounds = torch.stack([keys.nan_to_num(torch.inf).amin(1), keys.nan_to_num(-torch.inf).amax(1)], 1)
    scores = select.launch_page_scores(s.query, bounds, table)
    wide = select.page_scores_reference(s.query.double(), bounds.double(), table)
    for i, span in enumerate(s.spans):
        held = -(-span.context // page)
        peer = select.page_scores_reference(s.query, bounds, table)[i, :, :held]
        as_exact(scores[i, :, :held], peer, wide[i, :, :held])
    entries = select.select_pages(scores, table, lengths, count, page)
    ours = attend(s, plan_of(s, selected(s.spans, page, count)).with_entries(entries))
    _same_as_flat(s, entries.cpu().view(s.shape.kv_heads, len(s.spans), count, 2), ours)


def _same_as_flat(s: Scene, lists: Tensor, ours: Tensor) -> None:
    """Head by head: a context that is made of the chosen pages alone, in order."""
    page = s.shape.page_size
    for head in range(s.shape.kv_heads):
        spans: list[Span] = []
        for i, span in enumerate(s.spans):
            held = -(-span.context // page)
            chosen = lists[head, i, : min(lists.shape[2], held), 0].numpy()
            assert set(chosen.tolist()) <= set(span.pages.tolist()), "a page of another context"
            spans.append(Span(i, 1, span.context - (held - len(chosen)) * page, chosen))
        cut = Scene(s.query, s.pool, spans, s.shape)
        mine = slice(head * s.shape.group, (head + 1) * s.shape.group)
        as_exact(ours[:, mine], defined(cut, s.query.dtype)[:, mine], defined(cut, torch.float64)[:, mine])


def _twice(heads: tuple[int, int, int], processors: int) -> None:
    s = scene([(500, 1), (300, 1), (90, 40)], heads, 64, torch.bfloat16)
    first, second = (attend(s, plan_of(s, processors=processors)) for _ in range(2))
    same_bits(first, second, "two runs differ")


def _pages_at(s: Scene, places: Tensor, pages: int) -> Scene:
    """The same contexts, page ``p`` of the pool being page ``places[p]`` of a pool of so many, the others NaN."""
    size = s.shape.page_size
    pool = torch.empty(pages, size, *s.pool.shape[1:], dtype=s.pool.dtype, device=DEVICE)
    if pages <= 4 * s.shape.pages:
        pool.view(torch.uint8).fill_(0xFF)  # NaN in every dtype
    for page, place in enumerate(places.tolist()):
        pool[place].view(torch.uint8).copy_(s.pool[page * size : (page + 1) * size].view(torch.uint8))
    there = places.to(torch.int32).numpy()
    spans = [span._replace(pages=there[span.pages]) for span in s.spans]
    return Scene(s.query, pool.flatten(0, 1), spans, replace(s.shape, pages=pages), s.scales)


def _moved(heads: tuple[int, int, int]) -> None:
    s = scene([(1, 1), (200, 1), (0, 1), (90, 1), (70, 3)], heads, 64, torch.bfloat16, shared=1)
    order = torch.randperm(s.shape.pages, generator=torch.Generator().manual_seed(7))
    other = _pages_at(s, order, s.shape.pages)
    same_bits(*(attend(x, plan_of(x, chunk=64)) for x in (s, other)), "results differ")


def _alone(heads: tuple[int, int, int]) -> None:
    s = scene([(300, 1), (500, 1), (30, 30)], heads, 16, torch.bfloat16)
    alone = Scene(s.query[:1], s.pool, s.spans[:1], s.shape)
    ours, own = (attend(x, plan_of(x, chunk=128)) for x in (s, alone))
    same_bits(ours[:1], own, "results differ")


def _replayed(heads: tuple[int, int, int]) -> None:
    """Three steps through one captured launch: lengths, pages and groups change, addresses do not."""
    batches = ([(300, 1)] * 4, [(40, 1), (500, 1), (0, 1), (128, 1)], [(200, 1)] * 4)
    scenes = [scene(batch, heads, 64, torch.bfloat16, shared=2, seed=i) for i, batch in enumerate(batches)]
    pages = max(s.shape.pages for s in scenes)
    scenes = [_pages_at(s, torch.arange(s.shape.pages), pages) for s in scenes]
    first, reserve = scenes[0], Reserve({16: 16, 64: 4}, merges=4)
    plan = Plan(first.shape, Capacity(rows=16, pages=64, items=64, parts=64), DEVICE, processors=4)
    query, pool, result = first.query.clone(), first.pool.clone(), torch.empty_like(first.query)

    def groups(s: Scene) -> list[Group]:
        return shared(s.spans, 64, least=128) if s is not scenes[2] else flat(s.spans, 64)

    def step() -> None:
        result.copy_(paged.attend(query, pool[:, 0], pool[:, 1], plan, first.shape.head_dim**-0.5, 1.0, 1.0))

    plan.update(groups(first), 4, reserve)
    graph = capture(step)
    for s in [*scenes, first]:
        query.copy_(s.query)
        pool.copy_(s.pool)
        plan.update(groups(s), 4, reserve)
        graph.replay()
        _right(s, result.cpu())


def _far(heads: tuple[int, int, int], numbers: int, dtype: torch.dtype) -> None:
    """Pages at both ends of a pool of more numbers than 32 bits count give the bits that near ones do."""
    s = scene([(200, 1), (64, 1), (150, 3)], heads, 64, torch.bfloat16, dtype if dtype is FP8 else None)
    each = s.shape.page_size * 2 * s.shape.kv_heads * s.shape.head_dim
    pages = max(2 * s.shape.pages, -(-numbers // each))
    half = s.shape.pages // 2
    places = torch.cat([torch.arange(half), pages - torch.arange(1, s.shape.pages - half + 1)])
    far = _pages_at(s, places, pages)
    reached = max(int(slots(x, 64).max()) for x in far.spans) * (each // 64)
    assert reached >= numbers - s.shape.pages * each, f"the farthest number is {reached}"
    same_bits(*(attend(x, plan_of(x, chunk=64)) for x in (s, far)), "results differ")
