"""The scheduler, the tree and the pool under every order of events, beside a model of what KV pages contain.

The model writes into a page what attention would read there: for each slot, the namespace and all ids up to
it. A free page holds garbage. If a step ever reads a page that was freed, reused, shared too early or copied
wrongly, the contents differ. So it is on the host, whose slots are written when a step runs its spills. Drafted ids
are written like others; whoever went on to read a rejected one would see it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentkit.runtime.errors import CapacityError
from agentkit.runtime.host import HostPool
from agentkit.runtime.pages import Owner, PagePool
from agentkit.runtime.plan import Scheduler
from agentkit.runtime.radix import Hold, Node, PrefixTree, Spill, common_prefix
from agentkit.runtime.sequence import Entry, Plan, Sequence, State, Targets
from agentkit.runtime.transfer import Import

Slot = tuple[str, tuple[int, ...]]  # namespace, ids up to and including the slot's own

tokens = st.sampled_from([0, 0, 1, 2])  # so few that prefixes collide all the time
prompts = st.lists(tokens, min_size=1, max_size=14)
picks = st.integers(0, 7)
namespaces = st.sampled_from(["", "adapter"])
guesses = st.dictionaries(picks, st.lists(tokens, min_size=1, max_size=8), max_size=4)  # by which of the live ones


@dataclass(frozen=True)
class Write:
    """What the device was told at launch: it keeps these even if the scheduler changes its mind.

    ``ids`` end with the draft.
    """

    rid: int
    namespace: str
    ids: list[int]
    pages: list[int]
    start: int


class Watched(PrefixTree):
    """Sees to it that what is pinned goes last."""

    holds: list[Hold]

    def evict(self, n: int) -> int:
        held = self._held()
        freed = super().evict(n)
        if any(not node.alive or node.slot is not None for node in held):  # then nothing else was left that could go
            here = (node for node in self.nodes() if node.parent is not None and node.slot is None)
            assert {node for node in here if not (node.locks or node.resident)} <= self._held()
        return freed

    def _held(self) -> set[Node]:
        return {part for hold in self.holds if hold.node is not None for part in hold.node.path()}


class Recording(Scheduler):
    """Remembers who was ever preempted, by the caller or for want of pages."""

    preempted: set[int]

    def preempt(self, rid: int) -> None:
        self.preempted.add(rid)
        super().preempt(rid)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        total=st.one_of(st.integers(3, 10), st.integers(3, 24)),
        page_size=st.integers(2, 4),
        max_running=st.integers(1, 5),
        extra=st.integers(0, 12),
        host=st.one_of(st.just(0), st.integers(1, 12), st.just(40)),
    )
    def build(self, total: int, page_size: int, max_running: int, extra: int, host: int) -> None:
        self.page_size, self.max_context = page_size, 40
        self.pool = PagePool(total)
        self.tree = Watched(self.pool, page_size, HostPool(host))
        self.tree.holds = self.pins = []
        budget = max_running + extra
        self.scheduler = Recording(self.pool, self.tree, page_size, budget, max_running, self.max_context)
        self.scheduler.preempted = set()
        self.kv: dict[int, dict[int, Slot]] = defaultdict(dict)
        self.host: dict[int, dict[int, Slot]] = {}
        self.live: dict[int, Sequence] = {}
        self.past: list[tuple[str, list[int]]] = [("", [0])]
        self.plan: Plan | None = None
        self.writes: list[Write] = []
        self.reached: dict[int, int] = {}  # rid -> where its next entry must start
        self.computed: dict[int, Counter[int]] = defaultdict(Counter)
        self.answered: dict[int, list[int]] = defaultdict(list)  # rid -> the rows whose targets were answered
        self.asked: dict[int, int] = {}  # rid -> ids it was submitted with
        self.cut: Counter[int] = Counter()  # rid -> ids that had been computed and were cut by rewinds
        self.next_rid = 0

    # --- events

    @rule(ids=prompts, namespace=namespaces)
    def submit(self, ids: list[int], namespace: str) -> None:
        self._add(lambda rid: self.scheduler.submit(rid, ids, namespace), ids)

    @rule(ids=prompts, namespace=namespaces, first=st.integers(0, 13))
    def submit_scored(self, ids: list[int], namespace: str, first: int) -> None:
        first = min(first, len(ids) - 1)
        targets = Targets(first, tuple((at,) for at in range(first, len(ids))))
        self._add(lambda rid: self.scheduler.submit(rid, ids, namespace, targets), ids)

    @rule(pick=picks, keep=st.integers(1, 40), more=prompts)
    def submit_next_turn(self, pick: int, keep: int, more: list[int]) -> None:
        namespace, before = self.past[pick % len(self.past)]
        ids = before[:keep] + more
        self._add(lambda rid: self.scheduler.submit(rid, ids, namespace), ids)

    @precondition(lambda self: self.live)
    @rule(pick=picks, keep=st.integers(1, 40), more=st.lists(tokens, max_size=4), whole=st.booleans())
    def fork(self, pick: int, keep: int, more: list[int], whole: bool) -> None:
        parent = self._pick(pick)
        ids = None if whole else parent.ids[:keep] + more
        self._add(lambda rid: self.scheduler.fork(parent.rid, rid, ids), ids or parent.ids)

    @precondition(lambda self: self.live)
    @rule(pick=picks, ids=st.lists(tokens, min_size=1, max_size=6))
    def append(self, pick: int, ids: list[int]) -> None:
        seq = self._pick(pick)
        if seq.targets is not None:  # it is not to be continued
            return
        before = list(seq.ids)
        if len(before) + len(ids) > self.max_context:
            with pytest.raises(CapacityError):
                self.scheduler.append(seq.rid, ids)
            ids = []
        else:
            self.scheduler.append(seq.rid, ids)
        assert seq.ids == before + ids

    @precondition(lambda self: self.live)
    @rule(pick=picks, how=st.sampled_from(["finish", "abort", "preempt"]))
    def leave(self, pick: int, how: str) -> None:
        seq = self._pick(pick)
        if how == "preempt":
            self.scheduler.preempt(seq.rid)
            return
        if how == "abort":
            self.scheduler.abort(seq.rid)
        self._end(seq)  # finish after abort must change nothing

    @precondition(lambda self: self.live and self.plan is None)
    @rule(pick=picks, n=st.integers(1, 40), more=st.lists(tokens, max_size=3))
    def rewind(self, pick: int, n: int, more: list[int]) -> None:
        """An output is taken back in part, and often goes on with other ids before the next step."""
        seq = self._pick(pick)
        if seq.targets is not None:
            return
        n = min(n, len(seq.ids))
        before, computed, reached, state = list(seq.ids), seq.computed, seq.reached, seq.state
        self.scheduler.rewind(seq.rid, n)
        assert seq.ids == before[:n]
        assert seq.state is state
        assert min(computed, n - 1) // self.page_size * self.page_size <= seq.computed <= min(computed, n - 1)
        self.cut[seq.rid] += reached - seq.reached
        if state is State.RUNNING:
            self.reached[seq.rid] = seq.computed
        if len(seq.ids) + len(more) <= self.max_context:
            self.scheduler.append(seq.rid, more)

    @precondition(lambda self: len(self.pins) < 3)
    @rule(pick=picks)
    def pin(self, pick: int) -> None:
        namespace, ids = self.past[pick % len(self.past)]
        self.pins.append(self.tree.pin(namespace, ids))

    @precondition(lambda self: self.pins)
    @rule(pick=picks)
    def unpin(self, pick: int) -> None:
        self.tree.unpin(self.pins.pop(pick % len(self.pins)))

    @precondition(lambda self: self.plan is None)
    @rule(pick=picks, count=st.integers(1, 6))
    def load(self, pick: int, count: int) -> None:
        """KV of an earlier conversation comes from a file; what has to make room for it is evicted."""
        namespace, ids = self.past[pick % len(self.past)]
        size, before = self.page_size, self.pool.total - self.pool.private
        contents = [(namespace, tuple(ids[: at + 1])) for at in range(len(ids))]
        coming = Import(lambda question: question(), self.tree, self, ids, namespace)
        while coming.tokens < len(ids):
            first = coming.tokens
            blocks = [dict(enumerate(contents[at : at + size])) for at in range(first, len(ids), size)][:count]
            if not coming.write(blocks, min(first + count * size, len(ids))):
                break
        assert self.pool.private == self.pool.total - before
        assert coming.tokens == len(ids) or self.pool.free == 0

    def write(self, pages: list[int], blocks: list[dict[int, Slot]]) -> None:
        for page, block in zip(pages, blocks, strict=True):
            assert self.pool.owner(page) == Owner.PRIVATE
            assert page not in self.tree._spills.values()
            self.kv[page] = dict(block)

    def spill(self, spills: list[Spill]) -> None:
        for spill in spills:
            self.host[spill.slot] = dict(self.kv[spill.page])

    @precondition(lambda self: self.plan is None)
    @rule(drafts=guesses)
    def start_step(self, drafts: dict[int, list[int]]) -> None:
        self._start_step(drafts)

    @precondition(lambda self: self.plan is not None)
    @rule(right=st.integers(0, 8), more=st.lists(tokens, max_size=2))
    def end_step(self, right: int, more: list[int]) -> None:
        """The step has run, and drafts have turned out to be right so far; those left in flight may have gone on."""
        self._take_drafts(right, more)
        self._end_step()

    @precondition(lambda self: self.plan is not None)
    @rule()
    def fail_step(self) -> None:
        """The forward pass raises half-way: copies and slots of the step hold anything."""
        assert self.plan is not None
        garbage: dict[int, Slot] = dict.fromkeys(range(self.page_size), ("garbage", ()))
        for spill in self.plan.spills:
            self.host[spill.slot] = dict(garbage)
        for page in (*(r.page for r in self.plan.restores), *(c.dst_page for c in self.plan.copies)):
            self.kv[page] = dict(garbage)
        for write in self.writes:
            for at in range(write.start, len(write.ids)):
                self.kv[write.pages[at // self.page_size]][at % self.page_size] = ("garbage", ())
        self.scheduler.cancel(self.plan)
        for entry in self.plan.entries:
            assert entry.seq.state is State.FINISHED
            self.live.pop(entry.seq.rid, None)
        self.plan = None

    @precondition(lambda self: self.plan is None)
    @rule(
        steps=st.lists(st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=6),
        drafts=guesses,
        right=st.integers(0, 8),
    )
    def run(self, steps: list[list[int]], drafts: dict[int, list[int]], right: int) -> None:
        """Whole steps, whose samples (and forced ids) are appended as an engine does."""
        for ids in steps:
            plan = self._start_step(drafts)
            for entry in plan.entries:
                self._grow(entry, [*entry.draft[:right], *ids] if entry.sample else [])
            self._end_step()

    # --- what must hold

    @invariant()
    def accounts_are_exact(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.scheduler.check()
        leaving = set(self._leaving().values())  # free, but not written to before they have been copied
        for page in range(self.pool.total):
            if self.pool.owner(page) == Owner.FREE and page not in leaving:
                self.kv[page] = {}
        for node in self.tree.nodes():
            self._check_node(node)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        if self.plan is not None:
            self._end_step()
        while self.pins:
            self.tree.unpin(self.pins.pop())
        self._drain()
        self.accounts_are_exact()
        assert self.pool.private == 0
        self.tree.evict(self.pool.total)
        assert self.pool.free == self.pool.total
        self.tree.check({})
        self.tree.forget([Spill(-1, slot) for slot in range(self.tree.host.total)])
        assert not list(self.tree.nodes())
        assert self.tree.host.used == 0

    def _drain(self) -> None:
        """Everybody gets to the end of their ids: no request is stuck."""
        for _ in range(40 * (len(self.live) + 1) * 2):
            for seq in [seq for seq in self.live.values() if seq.awaiting]:
                self._end(seq)
            if not self.live:
                return
            assert self.scheduler.busy
            plan = self._start_step()
            assert plan.entries or plan.failed
            self._end_step()
        raise AssertionError(f"requests never end: {self.scheduler.dump()}")

    def _start_step(self, guesses: dict[int, list[int]] | None = None) -> Plan:
        before = self.scheduler.stats()
        drafts = {self._pick(pick).rid: ids for pick, ids in (guesses or {}).items() if self.live}
        twin = deepcopy(self.scheduler) if drafts else None
        plan = self.plan = self.scheduler.plan(drafts)
        if twin is not None:  # nobody was evicted, preempted or kept waiting for a draft
            bare, ours, its = twin.plan(), self.scheduler.stats(), twin.stats()
            assert [(e.seq.rid, e.n) for e in plan.entries] == [(e.seq.rid, e.n) for e in bare.entries]
            assert (ours.running, ours.waiting, ours.tree) == (its.running, its.waiting, its.tree)
        assert sum(entry.rows for entry in plan.entries) <= self.scheduler.token_budget
        assert len(plan.entries) <= self.scheduler.max_running
        assert plan.entries or not (plan.spills or plan.restores or plan.copies)  # it will not run
        assert len({entry.seq.rid for entry in plan.entries}) == len(plan.entries)
        for rid, error in plan.failed:
            self._check_failure(self.live.pop(rid), error)
        for seq in self.live.values():  # no prefill starves a decoding sequence
            if seq.state is State.RUNNING and not seq.in_flight:
                assert seq.awaiting or seq.computed + 1 < seq.goal
        self.writes = [
            Write(e.seq.rid, e.seq.namespace, [*e.seq.ids[: e.start], *e.ids], list(e.seq.pages), e.start)
            for e in plan.entries
        ]
        for entry in plan.entries:
            assert entry.n >= 1
            assert not entry.seq.awaiting  # or its next id would be sampled twice
            ends = entry.start + entry.n == len(entry.seq.ids)
            assert entry.sample == (ends and entry.seq.targets is None)
            assert entry.sample or not entry.draft
            assert list(entry.draft) == drafts.get(entry.seq.rid, [])[: len(entry.draft)]
            assert entry.start + entry.rows <= self.max_context
            self._check_start(entry.seq, entry.start)
        assert before.waiting + before.running >= len(plan.entries)
        return plan

    def _end_step(self) -> None:
        assert self.plan is not None
        self.spill(self.plan.spills)
        for restore in self.plan.restores:
            assert self.pool.owner(restore.page) == Owner.PRIVATE
            self.kv[restore.page] = dict(self.host[restore.slot])
        for copy in self.plan.copies:
            assert self.pool.owner(copy.dst_page) == Owner.PRIVATE
            assert 0 < copy.n_tokens < self.page_size
            for slot in range(copy.n_tokens):
                self.kv[copy.dst_page][slot] = self.kv[copy.src_page][slot]
        for write in self.writes:
            for at in range(write.start, len(write.ids)):
                page, slot = write.pages[at // self.page_size], at % self.page_size
                assert self.pool.owner(page) == Owner.PRIVATE
                self.kv[page][slot] = (write.namespace, tuple(write.ids[: at + 1]))
        for write in self.writes:  # after all writes: attention reads the whole prefix
            for at in range(len(write.ids)):
                page, slot = write.pages[at // self.page_size], at % self.page_size
                assert self.kv[page].get(slot) == (write.namespace, tuple(write.ids[: at + 1]))
        self.scheduler.complete(self.plan)
        for entry in self.plan.entries:
            end = entry.start + entry.n
            end += common_prefix(entry.draft, entry.seq.ids[end:])
            self.reached[entry.seq.rid] = end
            self.computed[entry.seq.rid].update(range(entry.start, end))
            self._check_counters(entry.seq)
            self.answered[entry.seq.rid] += [at for (at,) in entry.targets]
            if entry.seq.targets is not None:  # each wanted row once, in order, whatever was cached or preempted
                assert self.answered[entry.seq.rid] == list(range(entry.seq.targets.first, entry.seq.reached))
        self.plan = None

    def _take_drafts(self, right: int, more: list[int]) -> None:
        """Append what drafts have in common with what was sampled, and what was sampled in place of the rest."""
        assert self.plan is not None
        for entry in self.plan.entries:
            if entry.draft:
                self._grow(entry, [*entry.draft[:right], *more])

    def _grow(self, entry: Entry, ids: list[int]) -> None:
        fits = len(entry.seq.ids) + len(ids) <= self.max_context
        if fits and entry.seq.state is not State.FINISHED:
            self.scheduler.append(entry.seq.rid, ids)

    def _check_start(self, seq: Sequence, start: int) -> None:
        if seq.rid not in self.scheduler.preempted:
            assert start == self.reached.get(seq.rid, seq.cached)

    def _check_counters(self, seq: Sequence) -> None:
        counts = self.computed[seq.rid]
        if seq.rid not in self.scheduler.preempted and seq.rid not in self.cut:
            assert seq.recomputed == 0
            assert set(counts.values()) == {1}
            assert set(counts) == set(range(seq.cached, seq.cached + len(counts)))
        assert seq.cached + counts.total() - seq.recomputed == seq.reached + self.cut[seq.rid]
        assert seq.prefilled <= self.asked[seq.rid]

    def _check_failure(self, seq: Sequence, error: CapacityError) -> None:
        assert -(-len(seq.ids) // self.page_size) > self.pool.total
        assert str(seq.rid) in str(error)

    def _check_node(self, node: Node) -> None:
        """What the tree offers to others has been computed, and is what it says."""
        if node.parent is None:
            return
        path = node.path()
        ids = tuple(token for part in path for token in part.ids)
        start = len(ids) - len(node.ids)
        if node.slot is None:
            content = self.kv[node.page]
        else:
            leaving = self._leaving()
            content = self.kv[leaving[node.slot]] if node.slot in leaving else self.host[node.slot]
        for slot in range(len(node.ids)):
            assert content.get(slot) == (node.namespace, ids[: start + slot + 1])

    def _leaving(self) -> dict[int, int]:
        """Slots whose content is still in a page, because no step has copied it yet."""
        planned = {spill.slot: spill.page for spill in self.plan.spills} if self.plan is not None else {}
        return planned | self.tree._spills

    def _add(self, act, ids: list[int]) -> None:
        self.next_rid += 1
        need = -(-(len(ids) + 1) // self.page_size)
        if len(ids) + 1 > self.max_context or need > self.pool.total:
            with pytest.raises(CapacityError):
                act(self.next_rid)
        else:
            self.live[self.next_rid] = act(self.next_rid)
            self.asked[self.next_rid] = len(self.live[self.next_rid].ids)

    def _end(self, seq: Sequence) -> None:
        self.scheduler.finish(seq.rid)
        del self.live[seq.rid]
        self.past = [*self.past[-7:], (seq.namespace, list(seq.ids))]

    def _pick(self, pick: int) -> Sequence:
        return list(self.live.values())[pick % len(self.live)]


class FullSchedulerMachine(SchedulerMachine):
    """The same, in full size."""


_common = {"deadline": None, "suppress_health_check": list(HealthCheck)}

TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=40, **_common)

TestSchedulerFull = pytest.mark.slow(FullSchedulerMachine.TestCase)
TestSchedulerFull.settings = settings(max_examples=800, stateful_step_count=80, **_common)
