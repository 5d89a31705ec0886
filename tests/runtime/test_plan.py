"""Scheduler: each rule of planning by itself; every order of events is in test_plan_machine.py."""

from __future__ import annotations

import pytest

from agentkit.runtime.errors import CapacityError, EngineError
from agentkit.runtime.pages import Corruption, PagePool
from agentkit.runtime.plan import Scheduler
from agentkit.runtime.radix import PrefixTree
from agentkit.runtime.sequence import Copy, Plan, State, Targets

SIZE = 4


def build(total: int = 32, budget: int = 64, running: int = 8, context: int = 400) -> Scheduler:
    pool = PagePool(total)
    return Scheduler(pool, PrefixTree(pool, SIZE), SIZE, budget, running, context)


def step(scheduler: Scheduler) -> dict[int, tuple[int, int]]:
    """One whole step without sampling: rid -> (start, n)."""
    plan = scheduler.plan()
    scheduler.check()
    scheduler.complete(plan)
    scheduler.check()
    return shape(plan)


def shape(plan: Plan) -> dict[int, tuple[int, int]]:
    return {entry.seq.rid: (entry.start, entry.n) for entry in plan.entries}


def drained(scheduler: Scheduler) -> bool:
    """Nobody holds a page, and the cache can be emptied."""
    scheduler.check()
    scheduler.tree.evict(scheduler.pool.total)
    return scheduler.pool.free == scheduler.pool.total


# --- the budget


def test_prompts_and_decodes_share_one_step() -> None:
    scheduler = build(budget=16)
    scheduler.submit(1, range(6))
    assert step(scheduler) == {1: (0, 6)}
    scheduler.append(1, [50])
    scheduler.submit(2, range(100, 140))
    assert step(scheduler) == {1: (6, 1), 2: (0, 15)}
    scheduler.append(1, [51, 52, 53])  # one sampled, two forced
    assert step(scheduler) == {1: (7, 3), 2: (15, 13)}


def test_an_earlier_long_prefill_does_not_starve_decodes() -> None:
    scheduler = build(budget=8, total=64)
    for rid in (1, 2):
        scheduler.submit(rid, [rid])
    step(scheduler)
    scheduler.append(1, range(100))  # a long tool result
    for token in range(5):
        scheduler.append(2, [token])
        entries = step(scheduler)
        assert (entries[1][1], entries[2][1]) == (7, 1)


def test_forced_runs_leave_a_token_to_each_later_decode() -> None:
    scheduler = build(budget=4, running=4)
    for rid in (1, 2, 3):
        scheduler.submit(rid, [rid])
    step(scheduler)
    for rid in (1, 2, 3):
        scheduler.append(rid, [7, 8, 9, 9])
    assert step(scheduler) == {1: (1, 2), 2: (1, 1), 3: (1, 1)}


def test_no_more_run_than_max_running() -> None:
    scheduler = build(running=2)
    for rid in (1, 2, 3):
        scheduler.submit(rid, [rid])
    assert set(step(scheduler)) == {1, 2}
    scheduler.finish(1)
    assert set(step(scheduler)) == {3}


def test_only_the_last_id_is_sampled_from() -> None:
    scheduler = build(budget=8)
    scheduler.submit(1, range(12))
    samples: list[bool] = []
    for _ in range(2):
        plan = scheduler.plan()
        samples += [entry.sample for entry in plan.entries]
        scheduler.complete(plan)
    assert samples == [False, True]
    scheduler.append(1, [])  # nothing: it still waits for its next id
    assert not scheduler.busy
    assert scheduler.plan().entries == []


def test_a_context_of_its_own_is_one_run_of_pages() -> None:
    scheduler = build(budget=8)
    seq = scheduler.submit(1, range(30))
    for _ in range(4):
        step(scheduler)
    assert seq.runs == [(0, 8)]


# --- drafts


def drafted(scheduler: Scheduler, draft: list[int], rid: int = 1) -> Plan:
    plan = scheduler.plan({rid: draft})
    scheduler.check()
    return plan


def test_a_draft_is_computed_behind_the_ids_and_never_enters_them() -> None:
    scheduler = build()
    seq = scheduler.submit(1, range(6))
    step(scheduler)
    scheduler.append(1, [50])
    plan = drafted(scheduler, [51, 52, 53, 54])
    (entry,) = plan.entries
    assert (entry.start, entry.n, entry.draft, entry.rows) == (6, 1, (51, 52, 53, 54), 5)
    assert entry.ids == [50, 51, 52, 53, 54]
    assert seq.ids == [*range(6), 50]
    assert len(seq.pages) == 3
    scheduler.complete(plan)
    assert (seq.computed, len(seq.pages), seq.awaiting) == (7, 2, True)  # the page of the rejected ones is free


@pytest.mark.parametrize("right", range(5))
def test_of_a_draft_that_counts_which_came(right: int) -> None:
    scheduler = build()
    seq = scheduler.submit(1, range(6))
    step(scheduler)
    scheduler.append(1, [50])
    draft = [51, 52, 53, 54]
    plan = drafted(scheduler, draft)
    scheduler.append(1, [*draft[:right], 99])
    scheduler.complete(plan)
    scheduler.check()
    assert seq.computed == 7 + right
    assert scheduler.pool.tree == (7 + right) // SIZE
    assert step(scheduler) == {1: (7 + right, 1)}
    assert (seq.prefilled, seq.recomputed) == (6, 0)
    scheduler.finish(1)
    assert drained(scheduler)


def test_nothing_of_a_draft_is_published_that_did_not_come() -> None:
    scheduler = build()
    scheduler.submit(1, range(3))
    step(scheduler)
    scheduler.append(1, [50])
    plan = drafted(scheduler, [51, 52, 53, 54])
    scheduler.append(1, [51, 99])
    scheduler.complete(plan)
    scheduler.finish(1)
    ids = [0, 1, 2, 50, 51, 52, 53]
    assert scheduler.tree.match("", ids, len(ids)).n_tokens == 4
    assert scheduler.tree.match("", [0, 1, 2, 50, 51, 99], 6).tail is not None
    assert drained(scheduler)


def test_drafts_take_the_budget_that_is_left() -> None:
    scheduler = build(budget=8)
    for rid in (1, 2):
        scheduler.submit(rid, [rid])
    step(scheduler)
    for rid in (1, 2):
        scheduler.append(rid, [50])
    scheduler.submit(3, range(100, 103))
    plan = scheduler.plan({1: [1] * 5, 2: [2] * 5})
    assert [(e.n, len(e.draft)) for e in plan.entries] == [(1, 3), (1, 0), (3, 0)]
    scheduler.complete(plan)


def test_no_page_is_evicted_and_nobody_preempted_for_a_draft() -> None:
    scheduler = build(total=4)
    scheduler.submit(1, range(8))
    step(scheduler)
    scheduler.finish(1)  # two pages stay cached
    scheduler.submit(2, [9] * 6)
    step(scheduler)
    scheduler.append(2, [50])
    plan = drafted(scheduler, [1, 2, 3, 4], 2)
    assert plan.entries[0].draft == (1,)  # what its own last page has room for
    assert scheduler.pool.tree == 3
    scheduler.complete(plan)


def test_no_draft_passes_the_context() -> None:
    scheduler = build(context=9)
    scheduler.submit(1, range(6))
    step(scheduler)
    scheduler.append(1, [50])
    plan = drafted(scheduler, [1, 2, 3, 4])
    assert plan.entries[0].draft == (1, 2)
    scheduler.complete(plan)


def test_only_who_reaches_its_last_id_has_a_draft() -> None:
    scheduler = build(budget=8)
    scheduler.submit(1, range(12))
    plan = scheduler.plan({1: [5], 7: [5]})
    assert [e.draft for e in plan.entries] == [()]
    scheduler.complete(plan)


@pytest.mark.parametrize("leave", ["abort", "finish", "preempt"])
def test_leaving_with_a_draft_in_flight(leave: str) -> None:
    scheduler = build()
    seq = scheduler.submit(1, range(6))
    step(scheduler)
    scheduler.append(1, [50])
    plan = drafted(scheduler, [51, 52, 53])
    if leave == "preempt":
        scheduler.append(1, [51, 99])
    getattr(scheduler, leave)(1)
    scheduler.check()
    assert len(seq.pages) == 3
    scheduler.complete(plan)
    scheduler.check()
    assert (list(seq.pages), scheduler.pool.private) == ([], 0)
    if leave == "preempt":
        assert step(scheduler) == {1: (8, 1)}  # what was right is still there
    scheduler.finish(1)
    assert drained(scheduler)


def test_a_failed_step_keeps_nothing_of_a_draft() -> None:
    scheduler = build()
    scheduler.submit(1, range(6))
    step(scheduler)
    scheduler.append(1, [50])
    scheduler.cancel(drafted(scheduler, [51, 52, 53]))
    scheduler.check()
    assert scheduler.tree.match("", [*range(6), 50, 51], 8).n_tokens == 4
    assert drained(scheduler)


# --- the cache


def test_the_next_turn_computes_only_its_new_ids() -> None:
    """P10: emitted ids are in the key, and the unfinished last page is copied."""
    scheduler = build()
    ids = list(range(10))
    scheduler.submit(1, ids)
    step(scheduler)
    for token in (50, 51, 52):
        scheduler.append(1, [token])
        ids.append(token)
        if token != 52:
            step(scheduler)
    scheduler.finish(1)  # 13 ids, the last one sampled and never computed
    follow = scheduler.submit(2, [*ids, 60, 61])
    plan = scheduler.plan()
    assert shape(plan) == {2: (12, 3)}
    assert plan.copies == []
    scheduler.complete(plan)
    assert (follow.cached, follow.prefilled, follow.recomputed) == (12, 3, 0)
    scheduler.finish(2)
    scheduler.submit(3, [*ids, 60, 61, 62])
    plan = scheduler.plan()
    assert shape(plan) == {3: (15, 1)}
    assert [copy.n_tokens for copy in plan.copies] == [3]


def test_a_cached_prompt_still_computes_its_last_token() -> None:
    """P8."""
    scheduler = build()
    for rid in (1, 2):
        scheduler.submit(rid, range(8))
        assert step(scheduler) == {rid: (0, 8) if rid == 1 else (7, 1)}
        scheduler.finish(rid)


def test_namespaces_do_not_share() -> None:
    """P7."""
    scheduler = build()
    scheduler.submit(1, range(8), "a")
    step(scheduler)
    scheduler.finish(1)
    scheduler.submit(2, range(8), "b")
    assert step(scheduler) == {2: (0, 8)}


def test_pages_are_published_only_when_their_step_is_complete() -> None:
    """P6: an abort right after the plan leaves nothing that was not computed."""
    scheduler = build()
    scheduler.submit(1, range(8))
    plan = scheduler.plan()
    assert scheduler.pool.tree == 0
    scheduler.submit(2, range(9))
    assert scheduler.tree.match("", range(9), 8).n_tokens == 0
    scheduler.complete(plan)
    assert scheduler.pool.tree == 2


def test_branches_over_a_new_prefix_prefill_it_once() -> None:
    """P1, before it can happen: the twins wait for the first, then take its pages."""
    scheduler = build()
    prefix = list(range(12))
    for rid in range(1, 6):
        scheduler.submit(rid, [*prefix, 90 + rid])
    assert set(step(scheduler)) == {1}
    assert step(scheduler) == dict.fromkeys(range(2, 6), (12, 1))
    assert scheduler.pool.tree == 3


def test_a_twin_does_not_wait_for_one_that_has_gone() -> None:
    scheduler = build(budget=8)
    for rid in (1, 2):
        scheduler.submit(rid, range(20))
    assert set(step(scheduler)) == {1}
    scheduler.abort(1)
    assert step(scheduler) == {2: (8, 8)}


def test_short_prompts_have_no_page_to_wait_for() -> None:
    scheduler = build()
    for rid in (1, 2, 3):
        scheduler.submit(rid, [1, 2, 3])
    assert set(step(scheduler)) == {1, 2, 3}


def test_two_that_decode_the_same_page_keep_one_each() -> None:
    """P1: the second to publish keeps its page as a private duplicate; nothing it reads is freed."""
    scheduler = build()
    for rid in (1, 2):
        scheduler.submit(rid, [1, 2, 3])
    step(scheduler)
    for rid in (1, 2):
        scheduler.append(rid, [4, 5])
    step(scheduler)
    first, second = scheduler.sequence(1), scheduler.sequence(2)
    assert (first.published, second.published) == (1, 1)
    assert first.node is second.node
    assert second.pages[0] in second.private
    assert first.pages[0] not in first.private
    scheduler.finish(1)
    scheduler.finish(2)
    assert drained(scheduler)


# --- fork


def test_a_fork_shares_full_pages_and_copies_the_rest() -> None:
    scheduler = build()
    scheduler.submit(1, range(9))
    step(scheduler)
    scheduler.append(1, [50, 51])
    child = scheduler.fork(1, 2)
    plan = scheduler.plan()
    parent = scheduler.sequence(1)
    assert shape(plan) == {1: (9, 2), 2: (9, 2)}
    assert plan.copies == [Copy(parent.pages[2], child.pages[2], 1)]
    assert child.pages[:2] == parent.pages[:2]
    scheduler.complete(plan)
    assert (child.cached, child.prefilled) == (9, 2)
    scheduler.check()


def test_a_fork_may_leave_its_parent_earlier_and_go_on_differently() -> None:
    scheduler = build()
    scheduler.submit(1, range(11))
    step(scheduler)
    scheduler.fork(1, 2, [*range(10), 70, 71])
    plan = scheduler.plan()
    assert shape(plan) == {2: (10, 2)}
    assert [copy.n_tokens for copy in plan.copies] == [2]


def test_a_fork_of_a_step_in_flight_takes_what_is_published_when_it_is_admitted() -> None:
    scheduler = build()
    scheduler.submit(1, range(10))
    plan = scheduler.plan()
    scheduler.fork(1, 2)
    scheduler.complete(plan)
    scheduler.finish(1)  # the parent leaves first: its tail is in the tree
    plan = scheduler.plan()
    assert shape(plan) == {2: (9, 1)}
    assert [copy.n_tokens for copy in plan.copies] == [1]


# --- leaving while a step is in flight


@pytest.mark.parametrize("leave", ["abort", "finish"])
@pytest.mark.parametrize("case", ["prefill", "prefill and end", "decode and end"])
def test_leaving_in_flight_keeps_the_pages_until_the_step_is_complete(leave: str, case: str) -> None:
    """P2, its three cases: released once, after the step, whoever else ends it meanwhile."""
    scheduler = build()
    seq = scheduler.submit(1, range(10))
    if case == "decode and end":
        step(scheduler)
        scheduler.append(1, [50])
    plan = scheduler.plan()
    pages = list(seq.pages)
    getattr(scheduler, leave)(1)
    if case != "prefill":
        scheduler.finish(1)
    scheduler.submit(2, range(100, 110))
    scheduler.check()
    assert list(seq.pages) == pages
    assert scheduler.pool.free == scheduler.pool.total - 3
    scheduler.complete(plan)
    scheduler.check()
    assert (seq.state, list(seq.pages)) == (State.FINISHED, [])
    assert set(step(scheduler)) == {2}
    scheduler.abort(2)
    assert drained(scheduler)


def test_the_source_of_a_copy_is_not_evicted_while_the_step_is_in_flight() -> None:
    scheduler = build()
    scheduler.submit(1, range(6))
    step(scheduler)
    scheduler.finish(1)
    scheduler.submit(2, range(7))
    plan = scheduler.plan()
    (copy,) = plan.copies
    scheduler.tree.evict(99)
    assert scheduler.pool.owner(copy.src_page).name == "TREE"
    scheduler.complete(plan)
    scheduler.finish(2)
    assert drained(scheduler)


def test_leaving_twice_and_unknown_requests() -> None:
    scheduler = build()
    scheduler.submit(1, [1])
    scheduler.abort(1)
    scheduler.abort(1)
    scheduler.finish(1)
    for call in (
        lambda: scheduler.append(1, [2]),
        lambda: scheduler.preempt(1),
        lambda: scheduler.fork(1, 2),
    ):
        with pytest.raises(EngineError, match="no unfinished request 1"):
            call()
    assert not scheduler.busy
    assert scheduler.plan() == Plan([], [], [])


# --- preemption and shortage


def test_preemption_keeps_every_id_and_recomputes_little() -> None:
    """P9."""
    scheduler = build()
    seq = scheduler.submit(1, range(10))
    step(scheduler)
    scheduler.append(1, [50])
    scheduler.preempt(1)
    scheduler.check()
    assert (seq.ids, seq.state, list(seq.pages)) == ([*range(10), 50], State.WAITING, [])
    assert scheduler.pool.private == 0
    assert step(scheduler) == {1: (10, 1)}  # everything else was still cached
    scheduler.preempt(1)
    scheduler.tree.evict(99)
    scheduler.append(1, [51])
    step(scheduler)
    assert (seq.cached, seq.prefilled, seq.recomputed) == (0, 10, 11)


def test_preempted_in_flight_waits_for_its_sample() -> None:
    scheduler = build()
    scheduler.submit(1, range(3))
    plan = scheduler.plan()
    scheduler.preempt(1)
    scheduler.complete(plan)
    assert step(scheduler) == {}  # its next id is on the way: computing the last one again would sample twice
    scheduler.append(1, [50])
    assert step(scheduler) == {1: (3, 1)}


def test_the_latest_arrival_is_preempted_first() -> None:
    scheduler = build(total=6)
    for rid in (1, 2, 3):
        scheduler.submit(rid, [rid] * 8)
    step(scheduler)
    assert scheduler.pool.free == 0
    for rid in (1, 2, 3):
        scheduler.append(rid, [50])
    assert set(step(scheduler)) == {1, 2}
    assert scheduler.sequence(3).state is State.WAITING
    assert scheduler.sequence(3).ids == [3] * 8 + [50]
    scheduler.finish(1)
    scheduler.finish(2)
    assert 3 in step(scheduler)


def test_who_is_preempted_leaves_the_plan_it_was_already_in() -> None:
    scheduler = build(total=4)
    scheduler.submit(1, [1] * 7)
    scheduler.submit(2, [2] * 2)
    step(scheduler)
    scheduler.append(1, [60] * 8)  # a prefill: it is served after 2, and takes the last free page
    for token, expected in ((50, {2: (2, 1), 1: (7, 5)}), (51, {1: (12, 3)})):
        scheduler.append(2, [token])
        assert step(scheduler) == expected
    assert scheduler.sequence(2).state is State.WAITING
    assert scheduler.sequence(2).ids == [2, 2, 50, 51]


def test_who_is_preempted_comes_back_first() -> None:
    scheduler = build(running=1)
    scheduler.submit(1, [1])
    step(scheduler)
    scheduler.append(1, [50])
    scheduler.submit(2, [2])
    scheduler.preempt(1)
    assert set(step(scheduler)) == {1}


def test_cached_pages_go_before_anybody_is_preempted() -> None:
    scheduler = build(total=6)
    scheduler.submit(1, range(16))
    step(scheduler)
    scheduler.finish(1)
    scheduler.submit(2, range(100, 120))
    assert step(scheduler) == {2: (0, 20)}
    assert scheduler.pool.free == 0


def test_what_can_never_fit_is_refused_at_the_door() -> None:
    """P3."""
    scheduler = build(total=3, context=11)
    with pytest.raises(CapacityError, match="context of 11"):
        scheduler.submit(1, range(11))
    with pytest.raises(CapacityError, match="3 in all"):
        build(total=3).submit(1, range(12))
    with pytest.raises(EngineError, match="at least one id"):
        scheduler.submit(1, [])
    seq = scheduler.submit(1, range(10))
    with pytest.raises(EngineError, match="exists already"):
        scheduler.submit(1, [1])
    with pytest.raises(CapacityError, match="exceed the context"):
        scheduler.append(1, [1, 2])
    assert seq.ids == list(range(10))
    with pytest.raises(CapacityError, match="token_budget"):
        build(budget=2, running=3)
    assert set(step(scheduler)) == {1}


def test_one_that_outgrows_the_pool_fails_alone_and_the_next_works() -> None:
    """P3."""
    scheduler = build(total=3)
    scheduler.submit(1, range(11))
    step(scheduler)
    scheduler.append(1, [50])
    step(scheduler)
    scheduler.append(1, [51])
    plan = scheduler.plan()
    assert [rid for rid, _ in plan.failed] == [1]
    assert "13 ids" in str(plan.failed[0][1])
    assert plan.entries == []
    scheduler.complete(plan)
    scheduler.submit(2, range(100, 105))
    assert step(scheduler) == {2: (0, 5)}
    scheduler.finish(2)
    assert drained(scheduler)


def test_pinned_pages_are_given_up_before_a_request_waits_or_fails() -> None:
    """P29."""
    scheduler = build(total=3)
    scheduler.submit(1, range(8))
    step(scheduler)
    scheduler.finish(1)
    hold = scheduler.tree.pin("", range(8))
    scheduler.submit(2, range(100, 106))
    assert step(scheduler) == {2: (0, 6)}
    scheduler.tree.unpin(hold)
    scheduler.finish(2)
    assert drained(scheduler)


def test_a_duplicate_page_is_given_up_before_its_owner_fails() -> None:
    scheduler = build(total=4)
    for rid in (1, 2):
        scheduler.submit(rid, [1, 2, 3])
    step(scheduler)
    for rid in (1, 2):
        scheduler.append(rid, [4, 5])
    step(scheduler)
    scheduler.finish(1)
    scheduler.append(2, [6] * 10)  # 15 ids: the whole pool, without the duplicate
    seq = scheduler.sequence(2)
    while scheduler.busy:
        assert step(scheduler)
    assert (len(seq.pages), seq.computed) == (4, 15)


def test_a_tail_is_not_copied_where_its_page_is_needed() -> None:
    scheduler = build(total=3)
    scheduler.submit(1, [1, 2, 3, 4, 5, 6])
    step(scheduler)
    scheduler.finish(1)
    scheduler.submit(2, [1, 2, 3, 4, 5, 7, 7, 7, 7, 7, 7])  # three pages, and the tail of 1 is in one of them
    plan = scheduler.plan()
    assert shape(plan) == {2: (4, 7)}
    assert plan.copies == []


# --- protocol


def test_one_step_at_a_time() -> None:
    scheduler = build()
    scheduler.submit(1, [1])
    plan = scheduler.plan()
    with pytest.raises(EngineError, match="in flight"):
        scheduler.plan()
    scheduler.complete(plan)
    with pytest.raises(EngineError, match="once"):
        scheduler.complete(plan)


def test_statistics() -> None:
    scheduler = build(running=1)
    scheduler.submit(1, range(5))
    scheduler.submit(2, [9])
    step(scheduler)
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.free, stats.private, stats.tree) == (1, 1, 30, 1, 1)


@pytest.mark.parametrize(
    "damage",
    ["self.pages.pop()", "self.private.clear()", "self.ids[0] = 9", "self.runs.pop()", "self.published = 0"],
)
def test_check_notices_damage(damage: str) -> None:
    scheduler = build()
    seq = scheduler.submit(1, range(6))
    step(scheduler)
    exec(damage, {"self": seq})
    with pytest.raises(Corruption):
        scheduler.check()


# --- scoring


def asked(scheduler: Scheduler) -> list[tuple[int, int, list[int]]]:
    """One whole step: (start, n, targets) of each entry; none samples."""
    plan = scheduler.plan()
    scheduler.complete(plan)
    scheduler.check()
    assert not any(entry.sample for entry in plan.entries)
    return [(entry.start, entry.n, [token for (token,) in entry.targets]) for entry in plan.entries]


def targets(first: int, count: int) -> Targets:
    return Targets(first, tuple((at,) for at in range(first, count)))


def test_rows_are_scored_chunk_by_chunk_from_the_first_one_on() -> None:
    scheduler = build(budget=8)
    seq = scheduler.submit(1, range(20), targets=targets(10, 20))
    assert asked(scheduler) == [(0, 8, [])]
    assert asked(scheduler) == [(8, 8, [10, 11, 12, 13, 14, 15])]
    assert asked(scheduler) == [(16, 4, [16, 17, 18, 19])]
    assert seq.awaiting


def test_a_cached_row_is_computed_again_where_it_is_wanted() -> None:
    scheduler = build()
    scheduler.submit(1, range(20))
    step(scheduler)
    scheduler.finish(1)
    for rid, first in ((2, 19), (3, 10), (4, 0)):
        scheduler.submit(rid, range(20), targets=targets(first, 20))
        assert asked(scheduler) == [(first, 20 - first, list(range(first, 20)))]
        scheduler.finish(rid)
    assert drained(scheduler)


def test_after_a_preemption_the_rows_that_are_left_are_scored() -> None:
    scheduler = build(budget=8)
    seq = scheduler.submit(1, range(20), targets=targets(2, 20))
    assert asked(scheduler) == [(0, 8, [2, 3, 4, 5, 6, 7])]
    scheduler.preempt(1)
    assert asked(scheduler) == [(8, 8, list(range(8, 16)))]  # what was scored is cached
    scheduler.preempt(1)
    scheduler.tree.evict(32)
    assert asked(scheduler) == [(0, 8, [])]
    assert asked(scheduler) == [(8, 8, [])]
    assert asked(scheduler) == [(16, 4, [16, 17, 18, 19])]
    assert (seq.prefilled, seq.recomputed) == (20, 16)


# --- going back


def test_a_rewind_computes_the_last_id_again_and_the_page_of_it_where_that_is_the_trees() -> None:
    scheduler = build()
    scheduler.submit(1, range(6))
    step(scheduler)
    scheduler.append(1, range(10, 20))  # 16 ids: four full pages
    assert step(scheduler) == {1: (6, 10)}
    scheduler.append(1, [30, 31])
    assert step(scheduler) == {1: (16, 2)}
    pages = list(scheduler.sequence(1).pages)

    scheduler.rewind(1, 17)  # the last id stands in a page of its own
    scheduler.check()
    assert step(scheduler) == {1: (16, 1)}
    assert list(scheduler.sequence(1).pages) == pages

    scheduler.rewind(1, 11)  # in the third page, which others may read: all of it is computed again, elsewhere
    scheduler.check()
    scheduler.append(1, [40])
    assert step(scheduler) == {1: (8, 4)}
    assert scheduler.sequence(1).pages[:2].tolist() == pages[:2]
    assert scheduler.sequence(1).pages[2] != pages[2]
    assert scheduler.sequence(1).recomputed == 1 + 3
    scheduler.finish(1)
    assert drained(scheduler)


def test_a_fork_that_waits_shares_no_more_than_a_rewind_leaves() -> None:
    scheduler = build(running=1)
    scheduler.submit(1, range(7))
    step(scheduler)
    scheduler.fork(1, 2)
    scheduler.rewind(1, 6)
    scheduler.append(1, [50, 51])
    step(scheduler)
    scheduler.finish(1)
    assert scheduler.sequence(2).shared == 6
    assert step(scheduler) == {2: (6, 1)}


def test_a_rewind_in_a_step_or_to_nowhere_is_refused() -> None:
    scheduler = build()
    scheduler.submit(1, range(6))
    plan = scheduler.plan()
    with pytest.raises(EngineError, match="in flight"):
        scheduler.rewind(1, 3)
    scheduler.complete(plan)
    for n in (0, 7):
        with pytest.raises(ValueError, match="cannot be cut"):
            scheduler.rewind(1, n)
    assert len(scheduler.sequence(1).ids) == 6
