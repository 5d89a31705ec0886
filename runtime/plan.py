"""The scheduler: what the next step computes, for whom, and in which pages.

Pure: no torch, no clock, no I/O, no threads. There are no phases. Every sequence has ids whose KV is computed and ids
whose KV is not; a step gives each sequence some of the latter under one token budget, so decoding, forced tokens,
prefill chunks and recomputation after a preemption are one case (the idea is vLLM V1's scheduler). A step is
`Scheduler.plan`, the forward pass, `Scheduler.complete`. Whatever is finished, aborted or preempted in between gives
its pages back in `complete` only, and pages enter the prefix tree there only: nothing is ever free, or shared, while a
kernel may still write to it.

Drafts are guesses at what follows a sequence's ids. They are computed behind them in the same step, from the budget and
the free pages that are left, and never enter the ids: `Scheduler.complete` counts those that the ids have turned out to
go on with, and gives the pages of the others back. Their KV is overwritten by whatever comes in their place.

Pages that were evicted to the host come back as private copies and enter the tree in `Scheduler.complete`, like pages
that the step has computed.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Ids

from agentkit.runtime.errors import CapacityError, EngineError
from agentkit.runtime.pages import Corruption, PagePool
from agentkit.runtime.radix import Match, Node, PrefixTree, common_prefix
from agentkit.runtime.sequence import Copy, Entry, Plan, Restore, Sequence, State, Stats, Targets

_NO_PAGE = -1

PageKey = tuple[Node, tuple[int, ...]]  # the node a full page hangs from, and its ids


class Scheduler:
    """Chooses each step's tokens, allocates their pages, and owns every sequence's pages from admission to
    release.

    Order: decoding sequences, then prefills, each by arrival, then waiting ones. A decoding sequence gets a
    token in every step, however long the prefills are. When pages run out, cached ones are evicted, then the
    most recently arrived running sequence is preempted (it keeps its ids and recomputes), and a sequence that
    is alone and still short fails.

    Args:
        token_budget: tokens in one step, at least ``max_running``.
        max_running: sequences in one step.
        max_context: ids a sequence may have, emitted ones included.
    """

    def __init__(
        self,
        pool: PagePool,
        tree: PrefixTree,
        page_size: int,
        token_budget: int,
        max_running: int,
        max_context: int,
    ) -> None:
        if not 1 <= max_running <= token_budget:
            raise CapacityError(
                f"max_running={max_running} is not in 1..token_budget={token_budget}: each running sequence "
                "must be able to decode in each step; raise token_budget or lower max_running"
            )
        if tree.page_size != page_size or tree.pool is not pool:
            raise ValueError("the scheduler and its prefix tree must share one pool and one page size")
        self.pool = pool
        self.tree = tree
        self.page_size = page_size
        self.token_budget = token_budget
        self.max_running = max_running
        self.max_context = max_context
        self._sequences: dict[int, Sequence] = {}  # unfinished, by rid
        self._running: dict[int, Sequence] = {}  # those that hold pages and may be planned, by arrival
        self._waiting: deque[Sequence] = deque()
        self._arrivals = 0
        self._step: Plan | None = None
        self._leaving: dict[int, Sequence] = {}  # to be released when the step in flight completes
        self._tails: list[Node] = []  # locked because the step in flight copies from them

    # --- requests

    def submit(self, rid: int, ids: Iterable[int], namespace: str = "", targets: Targets | None = None) -> Sequence:
        """Queue a request; with ``targets`` it is over when all its ids are computed.

        Raises:
            CapacityError: it can never fit the context or the page pool.
            EngineError: ``rid`` is in use, or there are no ids.
        """
        tokens = list(ids)
        if rid in self._sequences or rid in self._leaving:
            raise EngineError(f"request {rid} exists already; give each request its own number")
        if not tokens:
            raise EngineError("a request needs at least one id; put the begin-of-text or a template token first")
        self._refuse_oversize(len(tokens))
        self._arrivals += 1
        seq = Sequence(rid, tokens, namespace, self._arrivals, len(tokens), targets=targets)
        self._sequences[rid] = seq
        self._waiting.append(seq)
        return seq

    def append(self, rid: int, ids: Ids[int]) -> None:
        """Add sampled or forced ids to an unfinished sequence; the next steps compute them.

        Raises:
            CapacityError: they would not fit into ``max_context``; finish the request instead.
        """
        seq = self.sequence(rid)
        if len(seq.ids) + len(ids) > self.max_context:
            raise CapacityError(
                f"request {rid} has {len(seq.ids)} ids and {len(ids)} more exceed the context of "
                f"{self.max_context}; finish it, or build the engine with a larger context"
            )
        seq.ids.extend(ids)
        if ids:
            seq.awaiting = False
        if len(ids) > self.page_size:
            seq.goal = len(seq.ids)  # more than a forced run: prefill again, behind those who decode

    def rewind(self, rid: int, n: int) -> None:
        """Cut an unfinished sequence to its first ``n`` ids, the last of which is computed again for its logits.

        The KV before that one stays where it is, except that a page which the tree holds is written by nobody: if that
        one stands in such a page, the ids before it in the page are computed again too. Pages behind go back, or stay
        cached where they have been published.

        Raises:
            EngineError: a step is in flight.
            ValueError: ``n`` is not among the sequence's lengths so far, or it has targets.
        """
        if self._step is not None:
            raise EngineError("a step is in flight; call complete() before rewind()")
        seq = self.sequence(rid)
        if not 1 <= n <= len(seq.ids) or seq.targets is not None:
            raise ValueError(f"request {rid} with {len(seq.ids)} ids cannot be cut to {n}")
        del seq.ids[n:]
        seq.prompt, seq.goal, seq.reached = min(seq.prompt, n), min(seq.goal, n), min(seq.reached, n)
        seq.shared, seq.awaiting = min(seq.shared, n), False
        for child in self._waiting:
            if child.parent is seq:
                child.shared = min(child.shared, n)
        if seq.computed >= n:
            self._truncate(seq, n - 1)

    def fork(self, rid: int, new_rid: int, ids: Iterable[int] | None = None) -> Sequence:
        """Queue a child of an unfinished sequence: with its ids, or with ``ids`` (any: the common prefix is
        shared).

        On admission the child shares the parent's published pages in place and copies the computed part of
        the page at which they part, so a branch computes its own ids and nothing else.
        """
        parent = self.sequence(rid)
        child = self.submit(new_rid, parent.ids if ids is None else ids, parent.namespace)
        child.parent = parent
        child.shared = len(child.ids) if ids is None else common_prefix(parent.ids, child.ids)
        return child

    def finish(self, rid: int) -> None:
        """End a request, leaving all its computed KV in the prefix tree; unknown or ended ones are ignored.

        Legal at any time. While a step is in flight the pages are kept until `complete`.
        """
        seq = self._sequences.pop(rid, None)
        if seq is None:
            return
        seq.state = State.FINISHED
        if rid in self._running:
            del self._running[rid]
            self._leave(seq)
        elif rid not in self._leaving:  # there it is when it was preempted in flight
            self._waiting.remove(seq)

    def abort(self, rid: int) -> None:
        """End a request whose caller has gone. What it computed is sound and stays cached, as by `finish`."""
        self.finish(rid)

    def preempt(self, rid: int) -> None:
        """Take a running sequence's pages away and put it at the head of the queue; it keeps every id."""
        seq = self.sequence(rid)
        if self._running.pop(rid, None) is not None:
            self._leave(seq)

    def sequence(self, rid: int) -> Sequence:
        """The unfinished sequence ``rid``; EngineError if there is none."""
        seq = self._sequences.get(rid)
        if seq is None:
            raise EngineError(f"there is no unfinished request {rid}; it has ended, failed, or was never submitted")
        return seq

    @property
    def busy(self) -> bool:
        """Whether `plan` has something to do: an unfinished sequence that needs nothing from its caller."""
        return any(not seq.awaiting for seq in self._sequences.values())

    def stats(self) -> Stats:
        """Counts for metrics."""
        pool = self.pool
        return Stats(len(self._running), len(self._waiting), pool.free, pool.private, pool.tree, self.tree.host.used)

    # --- a step

    def plan(self, drafts: Mapping[int, Ids[int]] | None = None) -> Plan:
        """Choose the next step and allocate its pages. Run the copies, then the entries, append what was
        sampled, then call `complete`.

        Args:
            drafts: by rid, what may follow a sequence's ids. It is cut to what has room, and left out where the
                step does not reach the last id.

        The plan is empty only when every sequence waits for `append` or `finish`, or for pages that such a
        one holds.
        """
        if self._step is not None:
            raise EngineError("a step is in flight; call complete() before plan()")
        entries: dict[int, Entry] = {}
        plan = Plan([], [], [])
        preempted = self._continue_running(entries, plan)
        if not preempted or not entries:  # what a preemption has just freed is not for the queue
            self._admit_waiting(entries, plan)
        self._add_drafts(entries, drafts or {})
        plan.entries.extend(entries.values())
        if entries:  # without any the step does not run
            plan.spills.extend(self.tree.take_spills())
        for entry in plan.entries:
            entry.seq.in_flight = entry.n + len(entry.draft)
        stuck = self._sequences and not (plan.entries or plan.failed)
        if stuck and not any(seq.awaiting for seq in self._sequences.values()):
            raise Corruption(f"no progress is possible, yet requests are queued: {self.dump()}")
        self._step = plan
        return plan

    def complete(self, plan: Plan) -> None:
        """Account for a step that has run: count tokens, publish full pages, release what has left.

        Of a draft, as many ids are computed as those appended since `plan` have in common with it.
        """
        if plan is not self._step:
            raise EngineError("complete() takes the plan in flight, once")
        self._step = None
        for entry in plan.entries:
            seq, start = entry.seq, entry.start
            end = start + entry.n
            if entry.draft:
                end += common_prefix(entry.draft, seq.ids[end : end + len(entry.draft)])
                self._shrink(seq, self._pages(end))  # of rejected ids
            if start < seq.reached or start < seq.prompt:
                fresh = max(start, min(seq.reached, end))
                seq.recomputed += fresh - start
                seq.prefilled += max(0, min(end, seq.prompt) - fresh)
            if end > seq.reached:
                seq.reached = end
            seq.computed, seq.in_flight, seq.restoring = end, 0, 0
            seq.awaiting = end == len(seq.ids)
            if end >= (seq.published + 1) * self.page_size:
                self._publish(seq)
        self._unfence()

    def cancel(self, plan: Plan) -> None:
        """End the sequences of a step whose forward pass failed, and keep nothing that it may have half written."""
        if plan is not self._step:
            raise EngineError("cancel() takes the plan in flight, once")
        self._step = None
        copied = {copy.dst_page for copy in plan.copies} | {restore.page for restore in plan.restores}
        for entry in plan.entries:
            seq = entry.seq
            seq.in_flight = seq.restoring = 0
            if not copied.isdisjoint(seq.pages):  # the copy itself may not have run
                seq.computed = seq.published * self.page_size
        self._unfence()
        for entry in plan.entries:
            self.finish(entry.seq.rid)
        self.tree.forget(plan.spills)

    def _unfence(self) -> None:
        """Release what was kept for the step that has just ended."""
        for node in self._tails:
            self.tree.unlock(node)
        self._tails.clear()
        leaving, self._leaving = self._leaving, {}
        for seq in leaving.values():
            self._release(seq)

    # --- planning

    def _continue_running(self, entries: dict[int, Entry], plan: Plan) -> bool:
        """Give running sequences their tokens; True if one was preempted for it."""
        size = self.page_size
        active = [seq for seq in self._running.values() if len(seq.ids) > seq.computed]  # no step is in flight
        order = [seq for seq in active if seq.decodes]
        decoding = len(order)
        if decoding < len(active):
            order += [seq for seq in active if not seq.decodes]
        budget = self.token_budget
        preempted = False
        for place, seq in enumerate(order):
            reserved = decoding - place - 1 if place < decoding else 0  # a token for each that decodes still to come
            want = min(len(seq.ids) - seq.computed, budget - reserved)
            while want > 0 and seq.state is State.RUNNING:
                n = want if seq.computed + want <= len(seq.pages) * size else self._extend(seq, want)
                if n:
                    entries[seq.rid] = _entry(seq, n)
                    budget -= n
                    break
                victim = next(reversed(self._running.values()))
                if victim is seq and len(self._running) == 1 and not self._holds_duplicates(seq):
                    self._fail(seq, plan)
                    break
                dropped = entries.pop(victim.rid, None)
                budget += dropped.n if dropped is not None else 0
                self.preempt(victim.rid)
                preempted = True
        return preempted

    def _admit_waiting(self, entries: dict[int, Entry], plan: Plan) -> None:
        """Admit from the queue while budget, ``max_running`` and pages allow.

        A sequence whose next full page a running one is about to publish waits for that, so N branches over a
        new prefix prefill it once. Only those who run make claims, anew in each plan: there is no deadlock.
        """
        if not self._waiting:
            return
        budget = self.token_budget - sum(entry.n for entry in entries.values())
        claims = {self._claim(seq) for seq in self._running.values()}
        for seq in list(self._waiting):
            if budget == 0 or len(self._running) >= self.max_running:
                break
            if seq.awaiting:
                continue
            match = self.tree.match(seq.namespace, seq.ids, seq.cacheable)
            key = self._page_key(seq, match.node, match.n_tokens)
            if key is not None and key in claims:
                continue
            admitted = self._admit(seq, match, budget, plan)
            if admitted:
                entries[seq.rid] = _entry(seq, admitted)
                budget -= admitted
                claims.add(self._claim(seq))
            elif self._running:
                break  # first come, first served: nobody overtakes a sequence that waits for pages
            else:
                self._fail(seq, plan)

    def _add_drafts(self, entries: dict[int, Entry], drafts: Mapping[int, Ids[int]]) -> None:
        """Let entries go on with their drafts as far as budget, context and free pages allow; nobody pays for it."""
        if not drafts:
            return
        budget = self.token_budget - sum(entry.n for entry in entries.values())
        for rid, draft in drafts.items():
            entry = entries.get(rid)
            if entry is None or not entry.sample:
                continue
            room = min(len(draft), budget, self.max_context - len(entry.seq.ids))
            fits = self._grow(entry.seq, entry.n + room) - entry.n
            if fits:
                entries[rid] = entry._replace(draft=tuple(draft[:fits]))
                budget -= fits

    def _admit(self, seq: Sequence, match: Match, budget: int, plan: Plan) -> int:
        """Give a waiting sequence its cached prefix and a chunk; returns its tokens, 0 if pages lack."""
        self.tree.lock(match.node)
        head = match.n_tokens
        back = head + len(match.host) * self.page_size
        source, copied, leaf = self._best_tail(seq, match, back)
        sources = match.host[-1:]  # what is before it on the host has children, and so stays
        if leaf is not None:
            sources.append(leaf)
        for node in sources:
            self.tree.lock(node)
        n = self._room(seq, back + copied, head, budget)
        if not n and leaf is not None:  # the locked leaf may be the very page that lacks: do without it
            self.tree.unlock(sources.pop())
            copied, leaf = 0, None
            n = self._room(seq, back, head, budget)
        if not n:
            for node in (*sources, match.node):
                self.tree.unlock(node)
            return 0
        self._start(seq, match, back + copied)
        self._extend(seq, n)
        self._tails += sources
        places = iter(seq.pages[len(match.pages) :])
        plan.restores.extend(_restore(node, next(places)) for node in match.host)
        if leaf is not None and leaf.slot is not None:
            plan.restores.append(_restore(leaf, next(places)))
        elif copied:
            plan.copies.append(Copy(source, next(places), copied))
        return n

    def _best_tail(self, seq: Sequence, match: Match, start: int) -> tuple[int, int, Node | None]:
        """What to copy behind the first ``start`` ids: (page, tokens, node of the tree to lock; None: a parent's
        page)."""
        tail, parent = match.tail, seq.parent
        copied = tail.n if tail is not None else 0
        if parent is not None:  # its `computed` is 0 unless it holds pages
            known = min(seq.shared, parent.computed, seq.cacheable) - start
            if known > copied:
                return parent.pages[start // self.page_size], known, None
        return (tail.node.page, copied, tail.node) if tail is not None else (_NO_PAGE, 0, None)

    def _room(self, seq: Sequence, done: int, shared: int, budget: int) -> int:
        """Tokens of a chunk behind ``done`` ones, ``shared`` of them in shared pages; 0 if pages lack."""
        n = min(budget, len(seq.ids) - done)
        return n if self._reserve(self._pages(done + n) - self._pages(shared)) else 0

    def _start(self, seq: Sequence, match: Match, computed: int) -> None:
        """Move a sequence from the queue to the running ones, with its shared pages."""
        self._waiting.remove(seq)
        overtaken = {rid: other for rid, other in self._running.items() if other.arrival > seq.arrival}
        for rid in overtaken:
            del self._running[rid]
        self._running |= {seq.rid: seq} | overtaken
        seq.state = State.RUNNING
        seq.node, seq.published = match.node, len(match.pages)
        for page in match.pages:
            seq.add_page(page)
        seq.computed, seq.restoring = computed, len(match.host)
        seq.goal = len(seq.ids)
        seq.cached += max(0, seq.computed - seq.reached)
        seq.reached = max(seq.reached, seq.computed)
        seq.parent = None  # whatever the parent had to give is taken

    def _extend(self, seq: Sequence, n: int) -> int:
        """Allocate pages for up to ``n`` more tokens, evicting as needed; returns how many have room."""
        self._reserve(self._pages(seq.computed + n) - len(seq.pages))
        return self._grow(seq, n)

    def _grow(self, seq: Sequence, n: int) -> int:
        """`_extend` with no more than the pages that are free."""
        lack = self._pages(seq.computed + n) - len(seq.pages)
        for _ in range(min(lack, self.pool.free)):
            page = self.pool.allocate(seq.pages[-1] if seq.pages else None)
            if page is None:
                raise Corruption(f"the pool counts {self.pool.free} free pages but has none: {self.dump()}")
            seq.add_page(page)
            seq.private.add(page)
        return min(n, len(seq.pages) * self.page_size - seq.computed)

    def _reserve(self, n: int) -> bool:
        """Evict until ``n`` pages are free; False if they cannot be."""
        if self.pool.free < n:
            self.tree.evict(n - self.pool.free)
        return self.pool.free >= n

    def _claim(self, seq: Sequence) -> PageKey | None:
        """The page a running sequence publishes next, if it has the ids to fill it."""
        return self._page_key(seq, seq.node, seq.published * self.page_size)

    def _page_key(self, seq: Sequence, node: Node | None, start: int) -> PageKey | None:
        end = start + self.page_size
        return None if node is None or end > len(seq.ids) else (node, tuple(seq.ids[start:end]))

    def _holds_duplicates(self, seq: Sequence) -> bool:
        """Whether some page is held twice: privately, and by the tree under the sequence's own lock."""
        return any(page in seq.private for page in seq.pages[: seq.published])

    # --- the end of a sequence's pages

    def _publish(self, seq: Sequence) -> None:
        """Hand the newly full pages to the tree and move the lock to the deepest one."""
        size, before = self.page_size, seq.node
        node = before
        while (seq.published + 1) * size <= seq.computed:
            start = seq.published * size
            page = seq.pages[seq.published]
            node, kept = self.tree.insert(seq.namespace, node, seq.ids[start : start + size], page)
            if kept:
                seq.private.remove(page)
            seq.published += 1
        if before is not None and node is not None and node is not before:
            self.tree.lock(node)
            self.tree.unlock(before)
            seq.node = node

    def _truncate(self, seq: Sequence, n: int) -> None:
        """Give up the KV of a running sequence behind its first ``n`` ids, and that of the page they end in if it is
        the tree's."""
        full, before = n // self.page_size, seq.node
        if seq.published > full and before is not None:
            below = before.path()[full]  # the first node that it goes back from
            assert below.parent is not None
            self.tree.lock(below.parent)
            self.tree.unlock(before)
            seq.node, seq.published = below.parent, full
        shared = len(seq.pages) > full and seq.pages[full] not in seq.private
        seq.computed = full * self.page_size if shared else n
        self._shrink(seq, self._pages(seq.computed))

    def _shrink(self, seq: Sequence, count: int) -> None:
        """Give back the pages behind the first ``count``."""
        while len(seq.pages) > count:
            page = seq.drop_page()
            if page is not None:
                self.pool.release(page)

    def _leave(self, seq: Sequence) -> None:
        """Release a sequence's pages now, or when the step in flight has completed."""
        if self._step is not None:
            self._leaving[seq.rid] = seq
        else:
            self._release(seq)

    def _release(self, seq: Sequence) -> None:
        """The one place where a sequence gives up its pages: what is computed goes to the tree, the rest is
        free.

        A sequence that is not finished goes back to the head of the queue with all its ids.
        """
        node = seq.node
        if node is None or seq.in_flight:
            raise Corruption(f"request {seq.rid} is released twice or while a step writes its pages: {self.dump()}")
        rest = seq.ids[seq.published * self.page_size : seq.computed]
        if rest and self.tree.insert_tail(node, rest, seq.pages[seq.published]):
            seq.private.remove(seq.pages[seq.published])
        self.tree.unlock(node)
        for page in seq.private:
            self.pool.release(page)
        seq.node, seq.published, seq.computed = None, 0, 0
        seq.pages, seq.runs, seq.private = array("i"), [], set()
        if seq.state is not State.FINISHED:
            seq.state = State.WAITING
            self._waiting.appendleft(seq)

    def _fail(self, seq: Sequence, plan: Plan) -> None:
        """End a request that is alone and cannot get a page."""
        error = CapacityError(
            f"request {seq.rid} with {len(seq.ids)} ids needs {self._pages(len(seq.ids))} pages of "
            f"{self.page_size} tokens; of {self.pool.total}, {self.pool.free} are free, {self.pool.tree} are "
            "cached, none can be evicted; shorten it, or give the KV cache more memory"
        )
        self.finish(seq.rid)
        plan.failed.append((seq.rid, error))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _refuse_oversize(self, tokens: int) -> None:
        if tokens + 1 > self.max_context:
            raise CapacityError(
                f"{tokens} ids and one to emit exceed the context of {self.max_context}; shorten the request "
                "or build the engine with a larger context"
            )
        if (need := self._pages(tokens + 1)) > self.pool.total:
            raise CapacityError(
                f"{tokens} ids and one to emit need {need} pages of {self.page_size} tokens, the pool has "
                f"{self.pool.total} in all; shorten the request or give the KV cache more memory"
            )

    # --- inspection

    def dump(self) -> str:
        """The state in one line, for the messages of errors that should never happen."""
        rows = [
            f"{s.rid}:{s.state.name} ids={len(s.ids)} computed={s.computed}+{s.in_flight} pages={list(s.pages)} "
            f"private={sorted(s.private)} awaiting={s.awaiting}"
            for s in (*self._running.values(), *self._waiting, *self._leaving.values())
        ]
        return f"{self.stats()} budget={self.token_budget} [{'; '.join(rows)}]"

    def check(self) -> None:
        """Raise `Corruption` unless every page and lock is accounted for."""
        holders = (*self._running.values(), *self._leaving.values())
        locks = Counter([*self._tails, *(seq.node for seq in holders if seq.node is not None)])
        self.pool.check()
        self.tree.check(locks)
        private = [page for seq in holders for page in seq.private]
        if len(private) != len(set(private)) or len(private) != self.pool.private:
            raise Corruption(f"private pages {sorted(private)}, the pool counts {self.pool.private}: {self.dump()}")
        for seq in holders:
            if (fault := seq.fault(self.page_size)) is not None:
                raise Corruption(f"request {seq.rid} {fault}: {self.dump()}")
        for seq in self._waiting:
            if seq.pages or seq.private or seq.node is not None or seq.state is not State.WAITING:
                raise Corruption(f"waiting request {seq.rid} holds pages or is not waiting: {self.dump()}")


def _restore(node: Node, page: int) -> Restore:
    assert node.slot is not None
    return Restore(node.slot, page)


def _entry(seq: Sequence, n: int) -> Entry:
    end = seq.computed + n
    if seq.targets is None:
        return Entry(seq, seq.computed, n, end == len(seq.ids))
    return Entry(seq, seq.computed, n, False, max(0, end - max(seq.targets.first, seq.reached)))
