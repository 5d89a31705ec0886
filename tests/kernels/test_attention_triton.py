"""Paged attention's kernels against the definition, and what must not change their results by a bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit.kernels import paged
from agentkit.kernels.attention import Work, paged_attention, paged_attention_reference
from agentkit.kernels.groups import Group, Span, Window, fixed, flat, selected, shared, windowed
from agentkit.kernels.plan import Capacity, Plan, Reserve, Shape
from agentkit.kernels.select import launch_page_scores, page_scores, page_scores_reference, select_pages
from tests.kernels.rule import assert_as_exact
from tests.kernels.scene import DEVICE, FP8, Scene, attend, defined, plan_of, scene, slots

#: Contexts and rows around a page's and a tile's borders, a row without context, a block of rows and a whole prompt.
EDGES = [(1, 1), (63, 1), (64, 1), (65, 1), (0, 1), (150, 3), (130, 40), (20, 20)]
FEW = [(1, 1), (64, 1), (131, 1), (0, 1), (70, 3), (60, 40)]
QWEN = (32, 8, 128)
TYPES = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.float16, FP8),
    (torch.bfloat16, FP8),
]


def assert_right(s: Scene, ours: Tensor, window: Window | None = None) -> None:
    assert_as_exact(ours, defined(s, s.query.dtype, window), defined(s, torch.float64, window))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("dtype", "pool"), TYPES)
def test_result_is_as_exact_as_torch(dtype: torch.dtype, pool: torch.dtype | None, page_size: int) -> None:
    s = scene(EDGES, QWEN, page_size, dtype, pool)
    ours = attend(s, plan_of(s))
    assert_right(s, ours)
    assert not ours[4].any()  # the row without context


@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 32), (8, 1, 64), (5, 1, 128), (24, 1, 32), (2, 1, 256)])
@pytest.mark.parametrize(("page_size", "dtype", "pool"), [(16, torch.float32, None), (64, torch.bfloat16, FP8)])
def test_any_head_shape_is_as_exact_as_torch(
    heads: tuple[int, int, int], page_size: int, dtype: torch.dtype, pool: torch.dtype | None
) -> None:
    s = scene(FEW, heads, page_size, dtype, pool)
    assert_right(s, attend(s, plan_of(s, chunk=64)))


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("page_size", [8, 32, 128])
def test_every_architectures_tiles_are_right(arch: str, page_size: int) -> None:
    s = scene([(200, 1), (131, 10), (90, 70)], (4, 1, 128), page_size)
    plan = plan_of(s, chunk=150)
    plan.arch = arch
    assert_right(s, attend(s, plan))


@given(
    batch=st.lists(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 6)))), max_size=4),
    common=st.integers(0, 6),
    page_size=st.sampled_from([4, 16, 64]),
    chunk=st.none() | st.integers(60, 300),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None)
def test_any_batch_is_right_flat_and_shared(
    batch: list[tuple[int, int]], common: int, page_size: int, chunk: int | None, seed: int
) -> None:
    # In fp32 the yardstick of so few numbers is itself a matter of luck.
    s = scene([*batch, (70, 1)], (2, 1, 32), page_size, torch.float16, shared=common, seed=seed)
    assert_right(s, attend(s, plan_of(s, chunk=chunk)))
    assert_right(s, attend(s, plan_of(s, shared(s.spans, page_size, least=16), chunk=chunk)))


def moved(s: Scene) -> Scene:
    """The same contexts in other pages."""
    order = torch.randperm(s.shape.pages, generator=torch.Generator().manual_seed(7))
    pool = torch.empty_like(s.pool).view(s.shape.pages, s.shape.page_size, *s.pool.shape[1:])
    pool[order.to(DEVICE)] = s.pool.view(pool.shape)
    there = order.to(torch.int32).numpy()
    spans = [type(x)(x.start, x.rows, x.context, there[x.pages]) for x in s.spans]
    return Scene(s.query, pool.view(s.pool.shape), spans, s.shape, s.scales)


@pytest.mark.parametrize("page_size", [16, 64])
def test_moving_pages_changes_no_bit(page_size: int) -> None:
    s = scene([*FEW, (90, 1)], page_size=page_size, dtype=torch.bfloat16, shared=1)
    other = moved(s)
    assert any((a.pages != b.pages).any() for a, b in zip(s.spans, other.spans, strict=True))
    for build in (flat, lambda spans, size: shared(spans, size, least=16)):
        ours = [attend(x, plan_of(x, build(x.spans, page_size), chunk=64)) for x in (s, other)]
        assert torch.equal(*ours)


@pytest.mark.parametrize("chunk", [30, 64, 100, 640, 5000])
def test_any_number_of_splits_is_right(chunk: int) -> None:
    """Down to less than a tile for each; 44 parts are more than the merge takes at once."""
    s = scene([(1300, 1), (700, 2)], (4, 1, 32), 16, torch.float16)
    plan = plan_of(s, chunk=chunk)
    assert_right(s, attend(s, plan))
    assert (plan.merge_count > 0) == (chunk < 1300)


def test_splits_that_have_nothing_to_read_count_for_nothing() -> None:
    """Five splits of a list of one tile, as a captured launch has them when a new context takes an old one's place."""
    s = scene([(300, 1)])
    plan = plan_of(s, chunk=64)
    items = plan.items.view(-1, 8)[: plan.launches[0].count]
    assert items[:, 6].tolist() == [5] * 5
    items[:, 4] = 40
    plan.positions[0] = 39
    short = Scene(s.query, s.pool, [type(s.spans[0])(0, 1, 40, s.spans[0].pages)], s.shape)
    assert_right(short, attend(s, plan))


def test_a_fixed_chunk_makes_a_row_independent_of_its_batch() -> None:
    s = scene([(500, 1), (300, 1), (30, 30)], (4, 2, 32), 16, torch.bfloat16)
    alone = Scene(s.query[:1], s.pool, s.spans[:1], s.shape)
    ours, own = (attend(x, plan_of(x, chunk=128)) for x in (s, alone))
    assert torch.equal(ours[:1], own)


def fixed_plan(s: Scene, chunk: int) -> Plan:
    """As the invariant runner plans: chunks counted from the first token, tiles of one height."""
    groups = fixed(s.spans, s.shape.page_size, chunk)
    blocks = sum(-(-len(group.rows) // (16 // s.shape.group)) for group in groups)
    return plan_of(s, groups, chunk=chunk, reserve=Reserve({16: blocks}, merges=len(s.query)))


@pytest.mark.parametrize(("dtype", "page_size"), [(torch.float32, 64), (torch.bfloat16, 16)])
def test_fixed_groups_make_a_row_independent_of_how_its_prompt_was_cut(dtype: torch.dtype, page_size: int) -> None:
    whole = scene([(150, 150), (40, 1)], (2, 1, 32), page_size, dtype)
    span, other = whole.spans
    one_way = attend(whole, fixed_plan(whole, 64))
    assert_right(whole, one_way)
    for first, stop in ((0, 1), (61, 66), (64, 65), (117, 150), (149, 150)):
        part = Scene(
            torch.cat([whole.query[first:stop], whole.query[-1:]]),
            whole.pool,
            [Span(0, stop - first, stop, span.pages), Span(stop - first, 1, other.context, other.pages)],
            whole.shape,
        )
        again = attend(part, fixed_plan(part, 64))
        assert torch.equal(again[:-1], one_way[first:stop])
        assert torch.equal(again[-1], one_way[-1])
    other_way = attend(whole, fixed_plan(whole, 128))  # the control: splits do change bits
    assert not torch.equal(other_way, one_way)


@pytest.mark.parametrize(("dtype", "pool"), TYPES[2::2])
@pytest.mark.parametrize("branches", [2, 4, 9, 40])
def test_a_shared_prefix_is_as_exact_as_a_flat_one(branches: int, dtype: torch.dtype, pool: torch.dtype | None) -> None:
    """One tile of 16 rows, of 32, of 64 and of two times 128."""
    s = scene([(138 + 7 * i % 50, 1 + i % 2) for i in range(branches)], (4, 1, 32), 64, dtype, pool, shared=2)
    groups = shared(s.spans, 64, least=128)
    assert len(groups) == branches + 1
    assert_right(s, attend(s, plan_of(s, groups)))


def test_a_tree_of_prefixes_is_right() -> None:
    s = scene([(150, 1)] * 4, page_size=16, shared=3)
    for twin in (0, 2):  # pages 3 to 5 are common to the first two and to the last two
        s.spans[twin + 1].pages[3:6] = s.spans[twin].pages[3:6]
    groups = shared(s.spans, 16, least=48)
    assert sorted(len(g.rows) for g in groups) == [1, 1, 1, 1, 2, 2, 4]
    assert_right(s, attend(s, plan_of(s, groups)))


def test_a_row_sees_no_key_behind_it() -> None:
    s = scene([(150, 100), (70, 1)], dtype=torch.bfloat16)
    before = attend(s, plan_of(s))
    behind = slots(s.spans[0], 64)[101:]
    s.pool[behind.to(DEVICE)] = 1e4
    after = attend(s, plan_of(s))
    assert torch.equal(before[:51], after[:51])  # rows at positions 50 to 100
    assert torch.equal(before[100], after[100])
    assert not torch.equal(before[51:100], after[51:100])


def test_rows_that_lie_before_a_list_see_nothing_of_it() -> None:
    """Their part is empty, and the one of their own context is all of the result."""
    s = scene([(128, 64), (100, 1)])
    first, second = s.spans
    ahead = Group(np.arange(64, dtype=np.int32), np.arange(64, 128, dtype=np.int32), first.pages[:1], 64, base=1000)
    assert_right(s, attend(s, plan_of(s, [*flat([first, second], 64), ahead])))
    only = plan_of(s, [ahead, *flat([second], 64)])
    assert not attend(s, only)[:64].any()


def test_doubled_values_double_the_result() -> None:
    s = scene(FEW, dtype=torch.bfloat16)
    plan = plan_of(s, chunk=64)
    once = attend(s, plan)
    s.pool[:, 1] *= 2
    assert torch.equal(attend(s, plan), once * 2)


@pytest.mark.parametrize(("page_size", "chunk"), [(16, None), (64, 64)])
@pytest.mark.parametrize(
    "window",
    [Window(1), Window(30), Window(64, sinks=4), Window(100, sinks=70, every=3), Window(17, every=1), Window(999)],
)
def test_windows_are_what_their_mask_says(window: Window, page_size: int, chunk: int | None) -> None:
    s = scene([(300, 1), (64, 1), (65, 1), (150, 40), (0, 1), (1, 1)], (2, 1, 64), page_size, torch.bfloat16)
    groups = windowed(s.spans, page_size, window)
    assert_right(s, attend(s, plan_of(s, groups, window=window, chunk=chunk)), window)


def test_a_launch_of_reserved_size_does_nothing_more() -> None:
    """And the plan of one step leaves nothing for the next, as a captured graph needs it."""
    reserve = Reserve({16: 12, 64: 3}, merges=11)
    plan = Plan(Shape(4, 2, 32, 64, pages=40), Capacity(rows=64, pages=64, items=32, parts=64), DEVICE, processors=4)
    for batch in ([(300, 1)] * 6, [(20, 1)], [(0, 1), (500, 10)]):
        s = padded(scene(batch, shared=2), 40)
        plan.update(shared(s.spans, 64, least=128), len(s.query), reserve)
        assert_right(s, attend(s, plan))


def padded(s: Scene, pages: int) -> Scene:
    """In a pool of so many pages, the new ones full of NaN."""
    more = s.pool.new_full((pages * s.shape.page_size - len(s.pool), *s.pool.shape[1:]), torch.nan)
    return Scene(s.query, torch.cat([s.pool, more]), s.spans, replace(s.shape, pages=pages), s.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [16, 64])
def test_chosen_pages_are_what_their_mask_says(page_size: int, dtype: torch.dtype) -> None:
    s, count = scene([(400, 1), (90, 1), (17, 1), (1, 1), (0, 1)], (6, 2, 32), page_size, dtype), 4
    table, contexts = table_of(s)
    bounds = bounds_of(s)
    entries = select_pages(launch_page_scores(s.query, bounds, table), table, contexts, count, page_size)
    plan = plan_of(s, selected(s.spans, page_size, count), chunk=64).with_entries(entries)
    ours = attend(s, plan)
    exact, peer = (chosen_by_definition(s, entries.cpu(), count, x) for x in (torch.float64, dtype))
    assert_as_exact(ours, peer, exact)


def table_of(s: Scene) -> tuple[Tensor, Tensor]:
    """Page ids of all contexts, padded, and their lengths."""
    width = max(1, *(len(x.pages) for x in s.spans))
    table = np.stack([np.pad(x.pages, (0, width - len(x.pages))) for x in s.spans])
    return torch.from_numpy(table).to(DEVICE), torch.tensor([x.context for x in s.spans]).int().to(DEVICE)


def bounds_of(s: Scene) -> Tensor:
    """Minimum and maximum of each page's keys, of those that are there; NaN for pages without."""
    keys = s.keys.view(s.shape.pages, s.shape.page_size, *s.keys.shape[1:]).float()
    low, high = keys.nan_to_num(torch.inf).amin(1), keys.nan_to_num(-torch.inf).amax(1)
    return torch.stack([low, high], 1).masked_fill(~low.isfinite().unsqueeze(1), torch.nan)


def chosen_by_definition(s: Scene, entries: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Attention of each head over its pages alone, the last page up to the row."""
    out = torch.zeros(s.query.shape, dtype=dtype)
    lists = entries.view(s.shape.kv_heads, len(s.spans), count, 2)
    for i, span in enumerate(s.spans):
        pages = min(count, -(-span.context // s.shape.page_size))
        for head in range(s.shape.heads if pages else 0):
            chosen = lists[head // s.shape.group, i, :pages]
            at = (chosen[:, 1:] + torch.arange(s.shape.page_size)).view(-1)
            where = (chosen[:, :1] * s.shape.page_size + torch.arange(s.shape.page_size)).view(-1)[at < span.context]
            assert set(where.tolist()) <= set(slots(span, s.shape.page_size).tolist())
            k, v = s.pool.cpu()[where, :, head // s.shape.group].to(dtype).unbind(1)
            weights = (k @ s.query[i, head].cpu().to(dtype) * s.shape.head_dim**-0.5).softmax(0)
            out[i, head] = weights @ v
    return out


def test_all_pages_chosen_are_all_pages() -> None:
    s = scene([(200, 1), (64, 1)], page_size=16)
    table, contexts = table_of(s)
    entries = select_pages(page_scores(s.query, bounds_of(s), table), table, contexts, 20, 16)
    plan = plan_of(s, selected(s.spans, 16, 20)).with_entries(entries)
    assert_right(s, attend(s, plan))


def test_chosen_are_the_last_page_and_the_highest_scores() -> None:
    scores = torch.tensor([[[1.0, 5.0, 3.0, 9.0, torch.nan]], [[torch.nan] * 5]], device=DEVICE)
    table = torch.tensor([[10, 11, 12, 13, 0], [20, 0, 0, 0, 0]], dtype=torch.int32, device=DEVICE)
    contexts = torch.tensor([50, 3], dtype=torch.int32, device=DEVICE)
    lists = select_pages(scores, table, contexts, 3, 16).view(2, 3, 2).tolist()
    assert lists[0] == [[11, 16], [12, 32], [13, 48]]  # the last page's own score does not matter
    assert lists[1][0] == [20, 0]


def test_page_scores_bound_every_key_and_equal_their_definition() -> None:
    s = scene([(150, 1), (33, 1)], (6, 2, 32), 16)
    bounds, (table, contexts) = bounds_of(s), table_of(s)
    want = page_scores_reference(s.query.double(), bounds.double(), table)
    for form in (launch_page_scores, page_scores):
        got = form(s.query, bounds, table)
        for i, n in enumerate(contexts.tolist()):
            valid = -(-n // 16)
            assert_as_exact(
                got[i, :, :valid].cpu(),
                page_scores_reference(s.query, bounds, table)[i, :, :valid].cpu(),
                want[i, :, :valid].cpu(),
            )
    for i, span in enumerate(s.spans):
        keys = s.keys[slots(span, 16).to(DEVICE)].double()
        products = torch.einsum("ghd,ngd->gn", s.query[i].double().view(2, 3, 32), keys)
        page = torch.arange(span.context, device=DEVICE) // 16
        assert (products <= want[i][:, page] + 1e-9).all()


@pytest.mark.parametrize("arch", ["sm_90", "sm_89"])  # a page for each token of a tile, and one for all of it
def test_pages_beyond_two_to_the_31_are_addressed(arch: str) -> None:
    """Strides make a pool of 2.7e9 numbers of which 80 slots are ever touched; the sanitizer sees every address."""
    page_size, stride, d = 16, (1 << 25) - 16, 256
    near = scene([(20, 1), (33, 2)], (2, 1, d), page_size, torch.bfloat16, FP8)
    pages = near.shape.pages
    assert stride * page_size * (pages - 1) > 1 << 31
    far = torch.empty(stride * pages * page_size, dtype=torch.uint8, device=DEVICE)
    far = far.as_strided(near.pool.shape, (stride, d, d, 1))
    far.copy_(near.pool.view(torch.uint8))
    s = Scene(near.query, far.view(FP8), near.spans, near.shape, near.scales)
    assert max(int(x.pages.max()) for x in s.spans) * stride * page_size > 1 << 31
    plan = plan_of(s)
    plan.arch = arch
    assert_right(s, attend(s, plan))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="graphs are CUDA's")
def test_a_captured_graph_reads_the_next_steps_plan() -> None:
    s, after = (padded(scene(x), 40) for x in ([(300, 1)] * 4, [(40, 1), (500, 1), (0, 1), (128, 1)]))
    plan, reserve = Plan(s.shape, Capacity(rows=16, pages=64, items=64, parts=64), DEVICE, 4), Reserve({16: 32}, 4)
    query, pool = s.query.clone(), s.pool.clone()

    def step() -> Tensor:
        return paged_attention(query, pool[:, 0], pool[:, 1], plan, s.shape.head_dim**-0.5)

    plan.update(flat(s.spans, 64), 4, reserve)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for x in (s, after, s):
        query.copy_(x.query)
        pool.copy_(x.pool)
        plan.update(flat(x.spans, 64), 4, reserve)
        graph.replay()
        assert_right(x, out.cpu())


def test_definition_of_this_test_is_the_operations() -> None:
    s = scene([(100, 1), (70, 30)], (4, 2, 32), 16, torch.float64)
    work = [
        Work(x.start, x.rows, tuple((int(p) * 16, min(16, x.context - 16 * i)) for i, p in enumerate(x.pages)))
        for x in s.spans
    ]
    cpu = [t.cpu() for t in (s.query, s.keys, s.values)]
    assert torch.allclose(paged_attention_reference(*cpu, work, 32**-0.5), defined(s, torch.float64), atol=1e-14)


def changed(s: Scene, **given: object) -> tuple[Tensor, Tensor, Tensor]:
    return tuple({"query": s.query, "keys": s.keys, "values": s.values, **given}.values())  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: changed(s, query=s.query.double()), "query: torch.float64"),
        (lambda s: changed(s, keys=s.keys.half()), "keys: torch.float16 under a query of torch.float32"),
        (lambda s: changed(s, keys=s.keys.to(FP8), values=s.values.to(FP8)), "keys: torch.float8_e4m3fn under"),
        (lambda s: changed(s, values=s.values.half()), "values: torch.float16"),
        (lambda s: changed(s, query=s.query[..., :16]), "query: heads of 16"),
        (lambda s: changed(s, query=s.query[:, :2]), "query, keys: "),
        (lambda s: changed(s, keys=s.keys[:, :1]), "query, keys: "),
        (lambda s: changed(s, query=s.query[:1]), "query: 1 rows, the plan was updated for 2"),
        (lambda s: changed(s, keys=s.keys[:-64]), "keys: .* slots"),
        (lambda s: changed(s, query=s.query.to("meta")), "query, keys, values: meta"),
        (lambda s: changed(s, query=s.query.mT.contiguous().mT), "query, keys, values: the numbers of a head"),
        (lambda s: changed(s, values=s.values.contiguous()), "values: strides"),
        (lambda s: changed(s, keys=Far(s.keys), values=Far(s.values)), "keys: a page of stride"),
    ],
)
def test_what_no_kernel_supports_is_refused(change: Callable[[Scene], tuple[Tensor, ...]], named: str) -> None:
    s = scene([(40, 1), (70, 1)])
    with pytest.raises(ValueError, match=f"^{named}"):
        paged.check(*change(s), plan_of(s), 0.1, 1.0)


class Far:
    """A tensor whose slots lie 2**25 numbers apart, of which no number is looked at."""

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def __getattr__(self, name: str) -> object:
        return getattr(self.near, name)

    def stride(self, axis: int | None = None) -> object:
        strides = (1 << 25, *self.near.stride()[1:])
        return strides if axis is None else strides[axis]


@pytest.mark.parametrize(("scale", "key_scale"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0)])
def test_scales_that_are_not_positive_are_refused(scale: float, key_scale: float) -> None:
    s = scene([(40, 1)])
    with pytest.raises(ValueError, match=r"^scale, key_scale:"):
        paged.check(s.query, s.keys, s.values, plan_of(s), scale, key_scale)


def test_fp8_is_refused_where_the_card_has_none() -> None:
    s = scene([(40, 1)], dtype=torch.bfloat16, pool_dtype=FP8)
    plan = plan_of(s)
    plan.arch = "sm_86"
    with pytest.raises(ValueError, match=r"^keys: float8_e4m3fn needs compute capability 8\.9"):
        paged.check(s.query, s.keys, s.values, plan, 0.1, 1.0)


def test_each_device_takes_its_own_kind_of_work() -> None:
    s = scene([(40, 1)])
    plan, items = plan_of(s), [Work(0, 1, ((0, 40),))]
    query, keys, values = s.query, s.keys, s.values
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"^query: a plan is for a GPU"):
            paged_attention(query, keys, values, plan, 0.1)
        query, keys, values = (t.to("meta") for t in (query, keys, values))
    with pytest.raises(ValueError, match=r"^work: items are for the CPU"):
        paged_attention(query, keys, values, items, 0.1)


def test_lists_that_do_not_fit_the_plan_are_refused() -> None:
    s = scene([(40, 1)])
    entries = torch.zeros(2, 4, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"^entries: the plan's groups have no positions"):
        plan_of(s).with_entries(entries)
    plan = plan_of(s, selected(s.spans, 64, 4))
    for wrong in (entries.long(), entries[:1], entries[..., :1]):
        with pytest.raises(ValueError, match=r"^entries: torch\.int"):
            plan.with_entries(wrong)
