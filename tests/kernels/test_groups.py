"""Work lists: every row's keys once and no others, whatever the builder; plans that say the same as their groups."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit.kernels.groups import FAR, Group, Span, Window, chunked, fixed, flat, selected, shared, visible, windowed
from agentkit.kernels.plan import RESIDENT, Capacity, Plan, Reserve, Shape

PAGE = 4
PAGES = 4096
CPU = torch.device("cpu")
Seen = dict[int, Counter[tuple[int, int]]]  # for each row: (context position, slot) of the keys it reads


@st.composite
def batches(draw: st.DrawFn) -> list[Span]:
    """Sequences whose page lists form a tree: each takes over some leading full pages of an earlier one."""
    spans: list[Span] = []
    free = iter(np.random.default_rng(draw(st.integers(0, 2**32))).permutation(400).tolist())
    start = 0
    for _ in range(draw(st.integers(1, 7))):
        rows = draw(st.integers(1, 12))
        context = draw(st.integers(rows, 90))
        pages: list[int] = []
        if spans:
            other = draw(st.sampled_from(spans))
            most = min((context - rows) // PAGE, (other.context - other.rows) // PAGE)
            pages = other.pages[: draw(st.integers(0, most))].tolist()
        while len(pages) * PAGE < context:
            pages.append(next(free))
        spans.append(Span(start, rows, context, np.array(pages, dtype=np.int32)))
        start += rows
    return spans


windows = st.builds(Window, window=st.integers(1, 40), sinks=st.integers(0, 12), every=st.integers(0, 4))


def wanted(spans: Sequence[Span], window: Window | None = None) -> Seen:
    """By the definition."""
    window, seen = window or Window(), {}
    for span in spans:
        at = torch.arange(span.context)
        mask = visible(window, torch.arange(span.context - span.rows, span.context), at, PAGE)
        for i in range(span.rows):
            keys = mask[i].nonzero()[:, 0].tolist()
            seen[span.start + i] = Counter((j, int(span.pages[j // PAGE]) * PAGE + j % PAGE) for j in keys)
    return seen


def lists(group: Group) -> list[tuple[int, int]]:
    """(context position, slot) of a group's tokens."""
    found: list[tuple[int, int]] = []
    for i in range(group.length):
        page, offset = divmod(i, PAGE)
        first = group.base + page * PAGE if group.starts is None else int(group.starts[page])
        found.append((first + offset, int(group.pages[page]) * PAGE + offset))
    return found


def read(groups: Sequence[Group], window: Window | None = None) -> Seen:
    """What the rows of groups see, counted over all groups they are in."""
    seen: Seen = {}
    for group in groups:
        keys = lists(group)
        for row, position in zip(group.rows.tolist(), group.positions.tolist(), strict=True):
            mask = visible(window or Window(), torch.tensor([position]), torch.tensor([j for j, _ in keys]), PAGE)
            seen.setdefault(row, Counter()).update(key for key, see in zip(keys, mask[0].tolist(), strict=True) if see)
    return seen


@given(batches())
@settings(max_examples=60, deadline=None)
def test_flat_groups_give_each_row_its_past_once(spans: list[Span]) -> None:
    assert read(flat(spans, PAGE)) == wanted(spans)


@given(batches(), st.integers(1, 40), st.integers(1, 12), st.integers(2, 4))
@settings(max_examples=150, deadline=None)
def test_shared_groups_give_each_row_its_past_once(spans: list[Span], least: int, most: int, sequences: int) -> None:
    groups = shared(spans, PAGE, least, most, sequences)
    assert read(groups) == wanted(spans)
    assert sum(g.length for g in groups) <= sum(g.length for g in flat(spans, PAGE))
    for group in groups:
        owners = [s for s in spans if s.start in group.rows]
        assert len(owners) == 1 or (len(owners) >= sequences and group.length >= least and group.length % PAGE == 0)
        assert len(owners) == 1 or max(s.rows for s in owners) <= most


@given(batches(), windows, st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_windowed_groups_give_each_row_its_window_once_and_hold_no_page_that_no_row_sees(
    spans: list[Span], window: Window, rows: int
) -> None:
    groups = windowed(spans, PAGE, window, rows)
    assert read(groups, window) == wanted(spans, window)
    for group in groups:
        assert group.starts is not None
        tokens = torch.tensor([j for j, _ in lists(group)])
        seen = visible(window, torch.from_numpy(group.positions.astype(np.int64)), tokens, PAGE).any(0)
        assert all(part.any() for part in seen.split(PAGE))


@given(batches(), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_chunked_groups_give_each_query_of_a_row_the_keys_of_its_chunks_once(spans: list[Span], pages: int) -> None:
    rows, length = sum(span.rows for span in spans), pages * PAGE
    seen = read(chunked(spans, PAGE, length, rows))
    for row, past in wanted(spans).items():
        chunk = max(position for position, _ in past) // length
        for turn in range(3):
            keys = [key for key in past if min(chunk - key[0] // length, 2) == turn]
            assert seen.pop(row + turn * rows, Counter()) == Counter(keys)
    assert not seen


@given(batches(), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_selected_groups_hold_the_last_pages_until_others_are_chosen(spans: list[Span], count: int) -> None:
    spans = [Span(i, 1, s.context, s.pages) for i, s in enumerate(spans)]
    groups = selected(spans, PAGE, count)
    for span, group, seen in zip(spans, groups, read(groups).values(), strict=True):
        assert len(group.pages) == count
        first = max(0, -(-span.context // PAGE) - count) * PAGE
        assert sorted(seen) == [key for key in sorted(wanted([span])[span.start]) if key[0] >= first]


def test_a_tree_of_prefixes_becomes_one_group_for_each_branching_point() -> None:
    trunk, left, right = np.arange(8), np.arange(10, 14), np.arange(20, 24)
    tails = [np.array([page]) for page in range(30, 35)]
    ways = [(trunk, left), (trunk, left), (trunk, right), (trunk, right), (trunk,)]
    spans = [
        Span(i, 1, 4 * sum(map(len, way)) + 2, np.concatenate([*way, tail]).astype(np.int32))
        for i, (way, tail) in enumerate(zip(ways, tails, strict=True))
    ]
    groups = shared(spans, PAGE, least=16)
    found = {(tuple(sorted(g.rows.tolist())), g.base, g.length) for g in groups}
    assert found == {
        ((0, 1, 2, 3, 4), 0, 32),
        ((0, 1), 32, 16),
        ((2, 3), 32, 16),
        *(((i,), 48, 2) for i in range(4)),
        ((4,), 32, 2),
    }


def test_a_short_common_start_is_kept_for_the_longer_ones_behind_it() -> None:
    """One page is common to all three: too short, but the two that share more share it too."""
    pages = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 6, 7, 8, 9]]
    spans = [Span(i, 1, 18, np.array(p, dtype=np.int32)) for i, p in enumerate(pages)]
    found = {(tuple(g.rows.tolist()), g.base, g.length) for g in shared(spans, PAGE, least=8)}
    assert found == {((0, 1), 0, 16), ((0,), 16, 2), ((1,), 16, 2), ((2,), 0, 18)}


@pytest.mark.parametrize(
    "build", [flat, shared, lambda s, p: windowed(s, p, Window(8)), lambda s, p: selected(s, p, 4)]
)
@pytest.mark.parametrize("span", [Span(0, 3, 2, np.zeros(1, np.int32)), Span(0, 1, 9, np.zeros(2, np.int32))])
def test_spans_that_cannot_be_are_refused(build: object, span: Span) -> None:
    with pytest.raises(ValueError, match="^spans: 0 has"):
        build([span], PAGE)  # type: ignore[operator]


@pytest.mark.parametrize("wrong", [{"window": 0}, {"window": FAR + 1}, {"sinks": -1}, {"every": -1}])
def test_windows_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}|^sinks, every"):
        Window(**wrong)


def test_planning_makes_no_object_for_a_page() -> None:
    """64 sequences of 32K tokens in pages of 64. It takes about 0.3 ms; lists of Python numbers take 20 and more."""
    rng = np.random.default_rng(0)
    pages = rng.permutation(64 * 513).astype(np.int32).reshape(64, 513)
    spans = [Span(i, 1, 32768 + 1, pages[i]) for i in range(64)]
    common = [Span(i, 1, 32768 + 1, np.append(pages[0, :512], pages[i, 512])) for i in range(64)]
    plan = Plan(Shape(32, 8, 128, 64, pages.size), Capacity(256, 40000, parts=1024), CPU, processors=132)
    for build in (
        lambda: flat(spans, 64),
        lambda: shared(spans, 64),
        lambda: shared(common, 64),
        lambda: windowed(spans, 64, Window(4096, 64)),
        lambda: plan.update(flat(spans, 64), 64),
    ):
        taken: list[float] = []
        for _ in range(20):
            begin = time.perf_counter()
            build()
            taken.append(time.perf_counter() - begin)
        assert min(taken) < 5e-3


# --- plans


def plan_of(
    capacity: Capacity | None = None,
    heads: tuple[int, int] = (8, 2),
    processors: int = 4,
    window: Window | None = None,
    chunk: int | None = None,
) -> Plan:
    capacity = capacity or Capacity(rows=256, pages=512, items=512, parts=2048)
    return Plan(Shape(*heads, 16, PAGE, PAGES), capacity, CPU, processors, window or Window(), chunk)


def follow(plan: Plan, tile_keys: int = 8) -> tuple[Seen, Seen]:
    """Do by hand what the kernels do with a plan; ``(what rows see in results, in parts)``."""
    rows, positions, targets = (t.tolist() for t in (plan.rows, plan.positions, plan.targets))
    words = 2 if plan.sparse else 1
    entries = plan.entries.view(-1, words).tolist() if plan.sparse else plan.entries.view(-1, 1).tolist()
    results: Seen = {}
    parts: dict[int, tuple[int, Counter[tuple[int, int]]]] = {}
    for launch in plan.launches:
        for item in plan.items.view(-1, 8)[launch.first : launch.first + launch.count].tolist():
            first, count, page, base, length, split, splits, direct = item
            assert count * plan.shape.group <= launch.tile
            if not count:
                continue
            tiles = -(-length // tile_keys)
            each = -(-tiles // splits) * tile_keys
            span = range(min(split * each, length), min((split + 1) * each, length))
            keys: list[tuple[int, int]] = []
            for i in span:
                entry = entries[page + i // PAGE]
                start = entry[1] if plan.sparse else base + i // PAGE * PAGE
                keys.append((start + i % PAGE, entry[0] * PAGE + i % PAGE))
            for row, position, target in zip(
                *(x[first : first + count] for x in (rows, positions, targets)), strict=True
            ):
                at = torch.tensor([j for j, _ in keys], dtype=torch.int64)
                mask = visible(plan.window, torch.tensor([position]), at, PAGE)[0].tolist()
                seen = Counter(key for key, see in zip(keys, mask, strict=True) if see)
                if direct:
                    assert (row not in results, target, splits) == (True, -1, 1)
                    results[row] = seen
                else:
                    assert 0 <= target + split < plan.capacity.parts
                    assert target + split not in parts, "two items write one part"
                    parts[target + split] = (row, seen)
    merged: Seen = {}
    used: set[int] = set()
    for row, first, count, _ in plan.merges.view(-1, 4)[: plan.merge_count].tolist():
        if not count:
            continue
        assert row not in merged
        assert row not in results
        merged[row] = Counter()
        for part in range(first, first + count):
            assert parts[part][0] == row
            merged[row].update(parts[part][1])
            used.add(part)
    assert used == set(parts), "a part that nothing merges"
    return results, merged


@given(batches(), st.integers(1, 200), st.booleans(), st.sampled_from([(8, 2), (9, 3), (4, 4), (32, 1)]))
@settings(max_examples=100, deadline=None)
def test_a_plan_reads_what_its_groups_say(
    spans: list[Span], processors: int, tree: bool, heads: tuple[int, int]
) -> None:
    groups = shared(spans, PAGE, 4) if tree else flat(spans, PAGE)
    plan = plan_of(heads=heads, processors=processors)
    plan.update(groups, sum(s.rows for s in spans))
    results, merged = follow(plan)
    assert results | merged == wanted(spans)


@given(batches(), windows, st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_a_plan_with_a_window_reads_what_its_groups_say(spans: list[Span], window: Window, chunk: int) -> None:
    plan = plan_of(Capacity(rows=256, pages=512, items=2048, parts=8192), window=window, chunk=chunk)
    plan.update(windowed(spans, PAGE, window), sum(s.rows for s in spans))
    results, merged = follow(plan)
    assert results | merged == wanted(spans, window)


@given(batches(), st.sampled_from([16, 32, 64, 128]), st.integers(60, 200), st.integers(70, 200))
@settings(max_examples=60, deadline=None)
def test_a_plan_stays_within_its_reserve_and_its_parts(spans: list[Span], tile: int, items: int, parts: int) -> None:
    plan = plan_of(Capacity(rows=256, pages=512, items=512, parts=parts), processors=1000)
    rows = sum(s.rows for s in spans)
    plan.update(flat(spans, PAGE), rows, Reserve({tile: items}, merges=rows))
    assert [(launch.tile, launch.count) for launch in plan.launches] == [(tile, items)]
    assert plan.merge_count == rows
    results, merged = follow(plan)
    assert results | merged == wanted(spans)


def long(count: int, context: int, rows: int = 1) -> list[Span]:
    pages = -(-context // PAGE)
    order = np.arange(count * pages, dtype=np.int32).reshape(count, pages)
    return [Span(i * rows, rows, context, order[i]) for i in range(count)]


def splits(plan: Plan) -> list[int]:
    (launch,) = plan.launches
    return plan.items.view(-1, 8)[: launch.count, 6].tolist()


def test_a_long_context_is_split_until_the_device_is_full_and_no_further() -> None:
    plan = plan_of(Capacity(rows=64, pages=4096, items=512, parts=512), processors=4)  # 12 programs of 16 rows at once
    plan.update(flat(long(1, 8000), PAGE), 1)
    assert splits(plan) == [6] * 6  # and two KV heads
    plan.update(flat(long(12, 1000), PAGE), 12)
    assert splits(plan) == [1] * 12
    plan.update(flat(long(1, 300), PAGE), 1)
    assert splits(plan) == [2] * 2  # not shorter than 256 tokens, the last one apart


def test_a_fixed_chunk_makes_splits_depend_on_nothing_else() -> None:
    plan = plan_of(Capacity(rows=64, pages=4096, items=512, parts=512), chunk=500)
    for others in (0, 1, 7):
        plan.update(flat(long(1 + others, 1900), PAGE), 1 + others)
        assert splits(plan) == [4] * 4 * (1 + others)


@given(batches(), st.sampled_from([1, 2, 5]))
@settings(max_examples=60, deadline=None)
def test_fixed_groups_cover_each_rows_past_once(spans: list[Span], pages: int) -> None:
    plan = plan_of(Capacity(rows=4096, pages=512, items=4096, parts=4096), chunk=pages * PAGE)
    rows = sum(s.rows for s in spans)
    padded = [*spans, Span(rows, 1, 0, np.empty(0, dtype=np.int32))]
    plan.update(fixed(padded, PAGE, pages * PAGE), rows + 1)
    results, merged = follow(plan)
    assert results | merged == {**wanted(spans), rows: Counter()}


def test_a_chunk_that_would_cut_a_page_is_refused() -> None:
    for chunk in (0, PAGE + 1):
        with pytest.raises(ValueError, match="^chunk: "):
            fixed(long(1, 40), PAGE, chunk)


def test_the_longest_items_come_first() -> None:
    spans = [Span(i, 1, context, np.arange(400, dtype=np.int32)) for i, context in enumerate([8, 400, 40, 1200])]
    plan = plan_of(Capacity(rows=64, pages=4096), processors=1)
    plan.update(flat(spans, PAGE), 4)
    items = plan.items.view(-1, 8)[: plan.launches[0].count]
    each = (items[:, 4] / items[:, 6]).tolist()
    assert len(set(each)) == 4
    assert each == sorted(each, reverse=True)


def test_row_blocks_of_a_prefill_read_no_key_behind_their_last_row() -> None:
    plan = plan_of(Capacity(rows=256, pages=4096), processors=1)
    plan.update(flat(long(1, 300, rows=100), PAGE), 100)
    items = plan.items.view(-1, 8)[: plan.launches[0].count]
    assert {launch.tile for launch in plan.launches} == {128}  # 32 rows of 4 heads
    assert sorted({tuple(item) for item in items[:, [0, 1, 4]].tolist()}) == [
        (0, 32, 232),
        (32, 32, 264),
        (64, 32, 296),
        (96, 4, 300),
    ]


def test_memory_and_sizes_stay_for_a_captured_graph() -> None:
    plan, reserve = plan_of(), Reserve({16: 40, 32: 8}, merges=8)
    names = ("items", "merges", "rows", "positions", "targets", "entries", "partial", "lse")
    before: list[object] = []
    for count, context in ((1, 40), (8, 90), (3, 1), (8, 0)):
        plan.update(shared(long(count, context), PAGE, 16), count, reserve)
        now = [getattr(plan, name).data_ptr() for name in names], plan.launches, plan.merge_count, plan.sparse
        assert before in ([], now)
        before = now  # type: ignore[assignment]
        results, merged = follow(plan)
        assert results | merged == wanted(long(count, context))


def test_nothing_of_the_last_step_is_left() -> None:
    plan, reserve = plan_of(), Reserve({16: 100}, merges=16)
    plan.update(flat(long(16, 100), PAGE), 16, reserve)
    plan.update(flat(long(1, 5), PAGE), 1, reserve)
    assert plan.items.view(-1, 8)[1:100].count_nonzero() == 0
    assert plan.merges.view(-1, 4)[:16].count_nonzero() == 0


@given(batches(), st.integers(1, 30), st.sampled_from([None, Reserve({16: 64, 64: 16}, merges=16)]), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_a_plan_that_went_on_says_what_a_new_one_would(
    spans: list[Span], steps: int, reserve: Reserve | None, padding: int
) -> None:
    spans = [Span(i, 1, s.context, s.pages) for i, s in enumerate(spans)]
    idle = [Span(len(spans) + i, 1, 0, np.empty(0, np.int32)) for i in range(padding)]
    fresh = iter(range(1000, PAGES))
    plan = plan_of()
    plan.update(shared([*spans, *idle], PAGE, 8), len(spans) + padding, reserve, room=-(-steps // PAGE))
    launches = plan.launches, plan.merge_count
    for _ in range(steps):
        begun = [i for i, s in enumerate(spans) if s.context % PAGE == 0]
        added = {i: next(fresh) for i in begun}
        spans = [
            s._replace(
                context=s.context + 1, pages=np.append(s.pages, [added[i]] if i in added else []).astype(np.int32)
            )
            for i, s in enumerate(spans)
        ]
        plan.advance(np.array(begun, dtype=np.int64), list(added.values()))
    results, merged = follow(plan)
    assert results | merged == wanted([*spans, *idle])
    assert (plan.launches, plan.merge_count) == launches


def test_a_plan_goes_on_only_where_it_can() -> None:
    plan, none = plan_of(), np.empty(0, np.int64)
    for update in (
        lambda: plan.update(flat(long(2, 9), PAGE), 2),
        lambda: plan.update(flat(long(2, 9, rows=2), PAGE), 4, room=1),
    ):
        update()
        with pytest.raises(ValueError, match="advance: the last update"):
            plan.advance(none, [])
    plan.update(flat(long(1, 8), PAGE), 1, room=1)
    with pytest.raises(ValueError, match="are full"):
        plan.advance(none, [])
    with pytest.raises(ValueError, match="in a pool of"):
        plan.advance(np.array([0]), [PAGES])
    for begun in ([0], [], [], []):
        plan.advance(np.array(begun, dtype=np.int64), [7] * len(begun))
    with pytest.raises(ValueError, match="room for"):
        plan.advance(np.array([0]), [8])


def group(**changed: object) -> Group:
    given = {
        "rows": np.array([0], np.int32),
        "positions": np.array([5], np.int32),
        "pages": np.array([1, 2], np.int32),
        "length": 6,
    }
    return Group(**(given | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("groups", "tokens", "named"),
    [
        ([group(length=9)], 1, "groups: 0 has 9 tokens in 2 pages"),
        ([group(length=-1)], 1, "groups: 0 has -1 tokens"),
        ([group(pages=np.array([1, PAGES], np.int32))], 1, f"groups: pages 1 to {PAGES} in a pool"),
        ([group(pages=np.array([-1, 2], np.int32))], 1, "groups: pages -1 to 2 in a pool"),
        ([group(rows=np.array([1], np.int32))], 1, "groups: rows 1 to 1 in a batch of 1"),
        ([group(rows=np.array([-1], np.int32))], 1, "groups: rows -1 to -1 in a batch of 1"),
        ([group()], 2, "groups: query row 1 is in none"),
        ([group(positions=np.array([5, 6], np.int32))], 1, "groups: each row needs one position"),
        ([group(positions=np.array([FAR], np.int32))], 1, "groups: position"),
        ([group(pages=np.zeros(99, np.int32))], 1, "groups: 99 page entries, the plan holds 9"),
        ([group(rows=np.arange(9, dtype=np.int32), positions=np.arange(9, dtype=np.int32))], 9, "groups: 9 rows"),
        ([group(pages=np.ones(1, np.int32), length=2)] * 5, 1, "groups: 5 parts, the plan holds 4"),
        (
            [group(rows=np.arange(8, dtype=np.int32), positions=np.arange(8, dtype=np.int32))],
            8,
            "groups: 8 work items, the plan holds 6",
        ),
    ],
)
def test_groups_that_cannot_be_or_do_not_fit_are_refused(groups: list[Group], tokens: int, named: str) -> None:
    plan = plan_of(Capacity(rows=8, pages=9, items=6, parts=4), heads=(128, 1))
    with pytest.raises(ValueError, match=f"^{named}"):
        plan.update(groups, tokens)


def test_a_reserve_that_is_too_small_is_refused() -> None:
    plan = plan_of(Capacity(rows=8, pages=512, items=64, parts=64))
    with pytest.raises(ValueError, match=r"^reserve: 3 items of 16 rows, 2 reserved"):
        plan.update(flat(long(3, 8), PAGE), 3, Reserve({16: 2}, merges=3))
    with pytest.raises(ValueError, match=r"^reserve: 1 rows to merge, 0 reserved"):
        plan.update(flat(long(1, 1000), PAGE), 1, Reserve({16: 20}, merges=0))
    with pytest.raises(ValueError, match=r"^capacity: 90 work items"):
        plan.update(flat(long(1, 8), PAGE), 1, Reserve({16: 90}, merges=1))
    with pytest.raises(ValueError, match=r"^items: tiles of \[48\]"):
        Reserve({48: 1}, merges=1)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((5, 2, 16, 4, 9), "heads: 5"),
        ((129, 1, 16, 4, 9), "heads: 129"),
        ((4, 2, 16, 48, 9), "page_size: 48"),
    ],
)
def test_shapes_without_a_kernel_are_refused(given: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        Shape(*given)


def test_a_window_without_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^groups: a plan with a window needs"):
        plan_of(window=Window(8)).update([group()], 1)


def test_a_fixed_chunk_that_does_not_fit_is_refused_rather_than_changed() -> None:
    plan = plan_of(Capacity(rows=8, pages=512, items=8, parts=64), chunk=10)
    with pytest.raises(ValueError, match=r"^chunk: 10 tokens need 39 items and 40 parts more"):
        plan.update(flat(long(1, 400), PAGE), 1)


def test_every_tile_has_a_residence() -> None:
    assert sorted(RESIDENT) == [16, 32, 64, 128]
