"""Dual chunk attention: its forms against the definition, and the definition against a table of distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit.kernels import paged
from agentkit.kernels.attention import Work, paged_attention
from agentkit.kernels.chunked import TURNS, chunked_attention_reference, turned
from agentkit.kernels.chunked import Chunked as Layout
from agentkit.kernels.groups import Group, Span, chunked, flat
from agentkit.kernels.plan import Capacity, Plan, Shape
from agentkit.kernels.rope import angles, rotate_reference
from tests.kernels.rule import assert_as_exact
from tests.kernels.scene import DEVICE, FP8
from tests.kernels.test_attention import SLOTS, works


def distances(count: int, length: int, local: int) -> Tensor:
    """``[count, count]`` of row and key: formulas (2), (4) and (5) of the paper, written out for single tokens."""
    table = torch.zeros(count, count, dtype=torch.int64)
    for row in range(count):
        for key in range(row + 1):
            place, other = row % length, key % length
            match row // length - key // length:
                case 0:
                    table[row, key] = row - key
                case 1:
                    table[row, key] = min(place + length, length + local) - other
                case _:
                    table[row, key] = length + local - other
    return table


@pytest.mark.parametrize(("length", "local"), [(8, 3), (5, 0), (7, 6), (40, 8)])
def test_definition_turns_each_pair_by_its_distance_in_the_table(length: int, local: int) -> None:
    """In complex numbers: a pair's product is turned by its distance, whatever either was rotated by."""
    torch.manual_seed(0)
    count, heads, d = 37, 2, 8
    query, key, value = (torch.randn(count, heads, d, dtype=torch.float64) for _ in range(3))
    frequencies = torch.tensor([1.0, 0.3, 0.05, 0.007])
    cos, sin = angles(turned(torch.arange(count), length, length + local), frequencies)
    turns = rotate_reference(query.repeat(TURNS, 1, 1), cos.double(), sin.double())
    keys = rotate_reference(key, cos[:count].double(), sin[:count].double())
    got = chunked_attention_reference(turns, keys, value, [Work(0, count, ((0, count),))], length, 0.4)

    apart = distances(count, length, local)
    assert int(apart.max()) <= length + local  # no pair is further apart
    near = (torch.arange(count)[:, None] - torch.arange(count)).abs() <= local
    assert (apart[near.tril()] == (torch.arange(count)[:, None] - torch.arange(count))[near.tril()]).all()
    q, k = (torch.complex(x[..., : d // 2], x[..., d // 2 :]) for x in (query, key))
    phase = torch.exp(1j * apart[:, :, None] * frequencies.double())
    scores = torch.einsum("ihf,jhf,ijf->hij", q, k.conj(), phase).real * 0.4
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    want = torch.einsum("hij,jhd->ihd", weights, value)
    assert (got - want).abs().max() < 1e-5  # angles are fp32


@given(
    work=works(),
    length=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    fp8=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_tiled_form_equals_its_definition(
    work: tuple[Work, ...], length: int, dtype: torch.dtype, fp8: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = work[-1].start + work[-1].rows
    query = torch.randn(TURNS * rows, 6, 16, generator=generator).to(dtype)[:, :4]  # as it lies in a projection
    pool = torch.randn(SLOTS, 2, 2, 16, generator=generator).to(dtype)
    used = {slot for item in work for first, count in item.runs for slot in range(first, first + count)}
    pool[[slot for slot in range(SLOTS) if slot not in used]] = torch.nan  # nothing outside the runs may be read
    scales = (0.5, 2.0) if fp8 else (1.0, 1.0)
    pool = pool.to(FP8) if fp8 else pool
    got = paged_attention(query, pool[:, 0], pool[:, 1], Layout(work, length), 0.25, *scales)
    wide = pool.double()
    want = chunked_attention_reference(query.double(), wide[:, 0], wide[:, 1], work, length, 0.25, *scales)
    assert (got.double() - want).abs().max() < (1e-5 if dtype is torch.float32 else 2e-2) * scales[1]


def test_within_one_chunk_it_is_dense_attention() -> None:
    torch.manual_seed(0)
    work = [Work(0, 1, ((3, 29),)), Work(1, 25, ((0, 20), (40, 9)))]
    query, pool = torch.randn(TURNS * 26, 4, 16), torch.randn(64, 2, 2, 16)
    query[26:] = torch.nan  # the other queries are not looked at
    got = paged_attention(query, pool[:, 0], pool[:, 1], Layout(work, 29), 0.25)
    assert torch.equal(got, paged_attention(query[:26], pool[:, 0], pool[:, 1], work, 0.25))


def spans_of(batch: list[tuple[int, int]], page: int, seed: int) -> tuple[list[Span], int]:
    """Sequences of ``(context, rows)`` in shuffled pages, and how many pages there are."""
    needed = [-(-context // page) for context, _ in batch]
    free = np.random.default_rng(seed).permutation(sum(needed) + 2).astype(np.int32)
    spans: list[Span] = []
    start = 0
    for (context, rows), need in zip(batch, needed, strict=True):
        own, free = free[:need], free[need:]
        spans.append(Span(start, rows, context, own))
        start += rows
    return spans, sum(needed) + 2


#: A row in each kind of chunk, borders, blocks of rows across one and two of them, a row without context.
BATCH = [(5, 1), (16, 1), (17, 1), (33, 2), (70, 1), (45, 20), (0, 1), (40, 26)]


@pytest.mark.parametrize(
    ("dtype", "pool", "page", "processors"), [(torch.float32, None, 16, 1), (torch.bfloat16, FP8, 8, 64)]
)
def test_one_launch_of_a_plan_is_as_exact_as_torch(
    dtype: torch.dtype, pool: torch.dtype | None, page: int, processors: int
) -> None:
    length, shape = 16, (4, 2, 32)
    spans, pages = spans_of(BATCH, page, 1)
    rows = sum(span.rows for span in spans)
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(TURNS * rows, *shape[::2], generator=generator).to(dtype)
    kv = torch.randn(pages * page, 2, *shape[1:], generator=generator).to(pool or dtype)
    scales = (0.5, 0.25) if pool is FP8 else (1.0, 1.0)
    plan = Plan(Shape(*shape, page, pages), Capacity(rows=1024, pages=1024, parts=2048), DEVICE, processors)
    plan.partial.fill_(torch.nan)
    plan.update(chunked(spans, page, length, rows), rows, turns=TURNS)
    keys, values = kv.to(DEVICE).unbind(1)
    query = query.to(DEVICE)
    paged.check(query, keys, values, plan, 0.2, scales[0])
    ours = paged.attend(query, keys, values, plan, 0.2, *scales).cpu()

    empty = next(span.start for span in spans if not span.context)
    assert not ours[empty].any()
    work = [Work(s.start, s.rows, runs(s, page)) for s in spans if s.context]

    def defined(wide: torch.dtype) -> Tensor:
        q, held = query.cpu().to(wide), kv.to(wide)
        out = chunked_attention_reference(q, held[:, 0], held[:, 1], work, length, 0.2, *scales)
        out[empty] = 0
        return out

    assert_as_exact(ours, defined(dtype), defined(torch.float64))


def runs(span: Span, page: int) -> tuple[tuple[int, int], ...]:
    return tuple((int(p) * page, min(page, span.context - i * page)) for i, p in enumerate(span.pages))


def test_a_plan_of_one_chunk_is_that_of_dense_attention() -> None:
    spans, _ = spans_of([(20, 1), (30, 12)], 8, 3)
    for made, plain in zip(chunked(spans, 8, 32, 13), flat(spans, 8), strict=True):
        assert [np.asarray(x).tolist() for x in made[:5]] == [np.asarray(x).tolist() for x in plain[:5]]


def test_work_that_cannot_be_is_refused() -> None:
    spans, pages = spans_of([(20, 1)], 8, 3)
    with pytest.raises(ValueError, match="^length: 12 is no multiple of a page's 8"):
        chunked(spans, 8, 12, 1)
    plan = Plan(Shape(4, 2, 32, 8, pages), Capacity(rows=16, pages=64), DEVICE, 1)
    second = Group(np.array([1], np.int32), np.array([19], np.int32), spans[0].pages, 20)
    with pytest.raises(ValueError, match="row 0 is in one only, and not by its first query"):
        plan.update([second], 1, turns=TURNS)
    with pytest.raises(ValueError, match="rows 1 to 1 in a batch of 1"):
        plan.update([second], 1)
    plan.update(chunked(spans, 8, 16, 1), 1, turns=TURNS)
    with pytest.raises(ValueError, match="query: 1 rows, the plan was updated for 3"):
        pool = torch.zeros(pages * 8, 2, 2, 32, device=DEVICE)
        paged.check(torch.zeros(1, 4, 32, device=DEVICE), pool[:, 0], pool[:, 1], plan, 1.0, 1.0)
