"""What the scheduler plans with: sequences, and the entries and copies of a step."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentkit.runtime.errors import CapacityError
from agentkit.runtime.radix import Node, Spill

#: How the namespaces of sequences begin whose KV is computed with sparse attention, and those of the others.
SPARSE, DENSE = "sparse:", "dense:"


class State(Enum):
    """Where a sequence is. FINISHED covers aborted and failed ones."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class Targets:
    """Tokens whose log-probabilities are wanted instead of an output.

    Attributes:
        first: the first position that is asked about.
        tokens: for each position from there to the end of the ids, tokens that may follow it.
    """

    first: int
    tokens: tuple[tuple[int, ...], ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request: its ids, and how far their KV is computed and where it lies.

    Counters, for usage: ``cached`` tokens came from the prefix tree or a copy, ``prefilled`` are prompt
    tokens computed once, ``recomputed`` were computed before and lost to a preemption or a rewind.
    """

    rid: int
    ids: list[int]  # the prompt, then everything emitted or forced; drafts never
    namespace: str
    arrival: int
    prompt: int  # how many ids were there at submit, less those that a rewind has cut
    state: State = State.WAITING
    computed: int = 0  # ids whose KV is in `pages`
    in_flight: int = 0  # ids after those that the step in flight computes, drafted ones included
    pages: array[int] = field(default_factory=lambda: array("i"))  # `table` shows them to numpy
    runs: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # `pages` as (first page, how many)
    private: set[int] = field(default_factory=set[int])  # the pages it owns; the others are the tree's
    node: Node | None = None  # the deepest node of its path in the tree, locked
    published: int = 0  # full pages on that path
    restoring: int = 0  # full pages behind them, counted as computed, that the step in flight brings from the host
    awaiting: bool = False  # all is computed: nothing to do until `append` or `finish`
    goal: int = 0  # ids before this one are prefill; from there on it decodes
    reached: int = 0  # the largest `computed` so far, preemptions included, of what has not been cut
    cached: int = 0
    prefilled: int = 0
    recomputed: int = 0
    parent: Sequence | None = None  # fork: where the tail may be copied from
    shared: int = 0  # fork: leading ids in common with the parent
    targets: Targets | None = None  # what is asked about its rows, if it is not to be continued

    @property
    def table(self) -> NDArray[np.int32]:
        """The page table where it lies. Let go of it before the next page is added: until then that fails."""
        return np.frombuffer(self.pages, np.int32) if self.pages else np.empty(0, np.int32)

    @property
    def cacheable(self) -> int:
        """Leading ids that need not be computed where their KV is at hand: behind them rows are wanted."""
        last = len(self.ids) - 1
        return last if self.targets is None else min(last, max(self.targets.first, self.reached))

    @property
    def sparse(self) -> bool:
        """Whether its KV is that of sparse attention."""
        return self.namespace.startswith(SPARSE)

    @property
    def decodes(self) -> bool:
        """Whether what remains is what was emitted last, and not a prompt."""
        return self.computed + 1 >= self.goal

    def add_page(self, page: int) -> None:
        """Extend the page table, and its runs, by one page."""
        self.pages.append(page)
        if self.runs and sum(self.runs[-1]) == page:
            first, count = self.runs[-1]
            self.runs[-1] = (first, count + 1)
        else:
            self.runs.append((page, 1))

    def drop_page(self) -> int | None:
        """Take the last page off the table, and off its runs; returns it if it was private, and must be released."""
        page = self.pages.pop()
        first, count = self.runs.pop()
        if count > 1:
            self.runs.append((first, count - 1))
        if page not in self.private:
            return None
        self.private.remove(page)
        return page

    def fault(self, page_size: int) -> str | None:
        """What is wrong with the pages it holds; None if nothing is."""
        held = -(-(self.computed + self.in_flight) // page_size)
        if self.node is None or len(self.pages) != held:
            return "has the wrong number of pages"
        if [page for first, count in self.runs for page in range(first, first + count)] != list(self.pages):
            return f"has runs {self.runs} for other pages"
        path = self.node.path()
        ids = [token for node in path for token in node.ids]
        full = self.computed // page_size
        if len(path) != self.published or ids != self.ids[: len(ids)] or self.published + self.restoring != full:
            return "is locked on a path of other ids"
        for index, page in enumerate(self.pages):
            if page not in self.private and (index >= len(path) or path[index].page != page):
                return f"reads page {page}, which is not its own"
        if not self.private <= set(self.pages) or len(set(self.pages)) != len(self.pages):
            return "owns pages outside its table, or has one twice"
        return None


class Entry(NamedTuple):  # one is made for each sequence in each step: a third of what a frozen dataclass takes
    """Compute ``seq.ids[start : start + n]`` and behind them, tentatively, ``draft``.

    ``sample``: this reaches the last id. Its logits count, and those of each drafted id. ``scored``: so many of the
    last rows have targets, which no step has answered yet; such a sequence has no draft.
    """

    seq: Sequence
    start: int
    n: int
    sample: bool
    scored: int = 0
    draft: tuple[int, ...] = ()

    @property
    def targets(self) -> tuple[tuple[int, ...], ...]:
        """Targets of the last ``scored`` rows."""
        if self.seq.targets is None:
            return ()
        end = self.start + self.n - self.seq.targets.first
        return self.seq.targets.tokens[end - self.scored : end]

    def cut(self, first: int, stop: int) -> Entry:
        """Its rows ``first`` to ``stop``, none of them sampled or scored."""
        n = max(0, min(self.n, stop) - first)
        draft = self.draft[max(0, first - self.n) : max(0, stop - self.n)]
        return Entry(self.seq, self.start + first, n, False, draft=draft)

    @property
    def decodes(self) -> bool:
        """Whether it computes its sequence's last id alone, to sample the next one."""
        return self.n == 1 and self.sample and not self.draft

    @property
    def rows(self) -> int:
        """Tokens it computes, drafted ones included."""
        return self.n + len(self.draft)

    @property
    def ids(self) -> list[int]:
        """What it computes."""
        return [*self.seq.ids[self.start : self.start + self.n], *self.draft]


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the KV of the first ``n_tokens`` slots of a page, in every layer, before the forward pass."""

    src_page: int
    dst_page: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Copy a slot of the host to a page, before the forward pass."""

    slot: int
    page: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. ``failed`` requests have ended: tell their callers; the others do not suffer.

    Before the forward pass run all ``spills``, then all ``restores``, then ``copies`` one after the other.
    """

    entries: list[Entry]
    copies: list[Copy]
    failed: list[tuple[int, CapacityError]]
    spills: list[Spill] = field(default_factory=list[Spill])
    restores: list[Restore] = field(default_factory=list[Restore])


@dataclass(frozen=True, slots=True)
class Stats:
    """Sequences by state, pages by owner, slots of the host that are in use."""

    running: int
    waiting: int
    free: int
    private: int
    tree: int
    host: int
