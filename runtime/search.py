"""The search for a short completion of an output: best-first, over what the matcher says is legal.

What the grammar forces costs no choice; where there is one, only a few tokens are tried: those of JSON's own
punctuation inside JSON, and one token of each kind (a letter, a digit, a long word …) elsewhere. The search knows only
where in JSON it stands; what is legal it asks the matcher, so whatever it finds is proven, and at worst it finds
nothing.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agentkit.runtime.closing import Candidates, Context, Hints

if TYPE_CHECKING:
    from agentkit.runtime.grammar import Matcher

#: States either way of searching may look at before it gives up (the second one more for each token allowed); about
#: 0.1 ms each.
EXPANSIONS = 2000
#: Levels of nesting that a completion may open beyond those that are open. A schema that asks for more asks for endless
#: ones: each level costs the matcher more than the one above it.
_NESTED = 64
_ENDS, _LOOK = 3, 32
_CLOCK = 16  # states between two looks at the thread's clock, which cost more than some of the states
_TAILS = 4096  # ends of examples; each is encoded when the grammar is compiled


@dataclass(slots=True)
class _Node:
    """A state the search has reached: the way to it, what that costs, and where in JSON it is.

    Attributes:
        parent: the state before; None where the search began.
        move: ids from there to here.
        length: ids from where the search began.
        text: the end of what was written, from which the beginning of JSON is told; kept outside JSON only.
    """

    parent: _Node | None
    move: Sequence[int]
    length: int
    cost: float
    context: Context | None
    text: bytes = b""

    def __lt__(self, other: _Node) -> bool:
        return self.length > other.length  # of equals the one that has come furthest

    def path(self) -> list[int]:
        """Ids from where the search began."""
        moves: list[Sequence[int]] = []
        node = self
        while node.parent is not None:
            moves.append(node.move)
            node = node.parent
        return [token for move in reversed(moves) for token in move]


_Heap = list[tuple[float, _Node]]


class _TooLate(Exception):
    """The time for a search is over."""


class _Walker:
    """One matcher that goes from node to node: back to where their ways part, and on from there.

    A copy of the matcher for each node would cost time and memory in the length of the whole output.

    Args:
        matcher: stands at `node`; afterwards wherever the search has left it.
        words: int32 words of a mask row.
        until: thread CPU time, in seconds, after which `legal` raises `_TooLate`.
    """

    def __init__(self, matcher: Matcher, node: _Node, words: int, until: float) -> None:
        self.matcher, self.node, self.until = matcher, node, until
        self._words, self._looked = words, 0

    def go(self, node: _Node) -> None:
        """Stand at `node`, of the same tree."""
        here, there, undone = self.node, node, 0
        ahead: list[_Node] = []
        while here is not there:
            if here.length >= there.length and here.parent is not None:
                undone += len(here.move)
                here = here.parent
            else:
                assert there.parent is not None
                ahead.append(there)
                there = there.parent
        self.matcher.rollback(undone)
        for step in reversed(ahead):
            self.take(step.move)
        self.node = node

    def take(self, ids: Sequence[int]) -> bool:
        """Take all of `ids`, or none of them."""
        for taken, token in enumerate(ids):
            if not self.matcher.advance(token):
                self.matcher.rollback(taken)
                return False
        return True

    def legal(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """What may come next: the mask row, and the same as one flag an id."""
        self._looked += 1
        if self._looked % _CLOCK == 0 and time.thread_time() > self.until:
            raise _TooLate
        row = np.zeros(self._words, dtype=np.int32)
        self.matcher.fill(row)
        return row, np.unpackbits(row.view(np.uint8), bitorder="little").view(np.bool_)


class Search:
    """Best-first search for completions under one grammar. Holds no state of an output.

    It works on two levels. The outer one chooses among punctuation and the shortest values; the inner one
    finds the nearest end of a string, a number or free text, whatever pattern or length it must have.

    Args:
        candidates: tokens to try.
        hints: about the grammar.
        words: int32 words of a mask row.
    """

    def __init__(self, candidates: Candidates, hints: Hints, words: int) -> None:
        self._candidates, self._hints, self._words = candidates, hints, words
        self._bytes = candidates.vocab.token_bytes
        self._literals = [[token] for token in hints.tokens]
        self._literals += [ids for text in hints.literals if (ids := candidates.encode(text))]
        tails: set[str] = set()
        for text in hints.examples:
            if len(tails) + len(text) <= _TAILS:
                tails.update(text[at:] for at in range(len(text)))
        self._endings = sorted(map(candidates.encode, sorted(tails)), key=len)

    def run(self, matcher: Matcher, text: bytes, limit: int, seconds: float = math.inf) -> list[int] | None:
        """A short list of at most `limit` ids after which the output may stop; None if none was found.

        First the best of all states is gone on from, which finds a short path. Where so much has to be written that
        this loses its way among alternatives, the first choice is followed to its end.

        Args:
            matcher: state of the output; left as it is.
            text: bytes of the output so far.
            limit: most ids.
            seconds: of CPU time of this thread, after which nothing more is looked at.
        """
        if matcher.can_stop():
            return []
        until = time.thread_time() + seconds
        try:
            path = self._explore(matcher, text, limit, until, deep=False)
            return self._explore(matcher, text, limit, until, deep=True) if path is None else path
        except _TooLate:
            return None

    def _explore(self, matcher: Matcher, text: bytes, limit: int, until: float, deep: bool) -> list[int] | None:
        origin = _Node(None, (), 0, 0.0, self._hints.context(text), text)
        deepest = _NESTED + (origin.context.depth if origin.context is not None else 0)
        walker = _Walker(matcher.fork(), origin, self._words, until)
        heap: _Heap = []
        seen: set[tuple[object, ...]] = set()
        start = self._after(walker, origin, (), 0.0, limit, deepest)
        if start is not None:
            heap.append((0.0, start))
        for turn in range(EXPANSIONS + deep * limit):
            if not heap:
                return None
            node = heapq.heappop(heap)[1]
            walker.go(node)
            if walker.matcher.can_stop():
                return node.path()
            row, legal = walker.legal()
            # The mask alone does not tell an array of two items from one of three.
            key = (node.context, hash(row.tobytes()))
            if node.context is not None and key in seen:
                continue
            seen.add(key)
            for place, move in enumerate(self._moves(walker, legal, limit - node.length)):
                # A text that must be long, as of a format, is no reason to turn back.
                cost = min(len(move), 4) + len(move) / 8
                child = self._after(walker, node, move, cost, limit, deepest)
                if child is not None:
                    heapq.heappush(heap, (place / _LOOK - turn if deep else _merit(child), child))
        return None

    def _moves(self, walker: _Walker, legal: NDArray[np.bool_], limit: int) -> Iterable[Sequence[int]]:
        context = walker.node.context
        if context is not None and not context.escape:
            marks = self._candidates.punctuation(context, legal)
            if marks:
                return [[i] for i in marks]
        return self._contents(walker, limit)

    def _after(
        self, walker: _Walker, node: _Node, move: Sequence[int], cost: float, limit: int, deepest: float = math.inf
    ) -> _Node | None:
        """The node after `move` from `node`, where the walker stands and stays, and after what is forced then.

        None if the move is not legal, or leads too far or too deep.
        """
        if not walker.take(move):
            return None
        taken, child = list(move), self._step(node, node, move, cost)
        while forced := walker.matcher.forced():
            if child.length + len(forced) > limit or not walker.take(forced):
                break
            taken += forced
            child = self._step(node, child, forced, len(forced) / 4)
            if child.context is not None and child.context.depth > deepest:
                break
        walker.matcher.rollback(len(taken))
        if forced or child.length > limit or (child.context is not None and child.context.depth > deepest):
            return None
        child.move = taken
        return child

    def _step(self, parent: _Node, node: _Node, move: Sequence[int], cost: float) -> _Node:
        """What is known of `node` carried over `move`."""
        text = b"".join(map(self._bytes, move))
        if node.context is not None:
            context, text = node.context.after(text), b""
        else:
            text = node.text + text
            context = self._hints.context(text) if self._hints.marker else None
        return _Node(parent, move, node.length + len(move), node.cost + cost, context, text)

    def _contents(self, walker: _Walker, limit: int) -> list[list[int]]:
        """Short paths to where the string, number or free text that the walker stands in may end."""
        return (
            self._open(walker, limit)
            or self._recite(walker, limit)
            or self._fill_up(walker, min(limit, 4))
            or self._spell(walker, limit, 40)
            or self._fill_up(walker, min(limit, 64))
            or self._spell(walker, limit, 400)
            or self._fill_up(walker, limit)
        )

    def _open(self, walker: _Walker, limit: int) -> list[list[int]]:
        """A tag that begins JSON in the middle of free text."""
        for ids in self._literals if walker.node.context is None else ():
            if len(ids) <= limit and walker.take(ids):
                walker.matcher.rollback(len(ids))
                return [ids]
        return []

    def _recite(self, walker: _Walker, limit: int) -> list[list[int]]:
        """The shortest end that an example has from some place on."""
        for ids in self._endings:
            if len(ids) <= limit and walker.matcher.validate(ids) == len(ids) and walker.take(ids):
                end = self._step(walker.node, walker.node, ids, 0.0)
                fits = self._ends(walker, end.context, walker.legal()[1])
                walker.matcher.rollback(len(ids))
                if fits:
                    return [ids]
        return []

    def _spell(self, walker: _Walker, limit: int, expansions: int) -> list[list[int]]:
        """Ends found byte by byte, those of different kinds first."""
        origin = _Node(None, (), 0, 0.0, walker.node.context, walker.node.text)
        inner = _Walker(walker.matcher, origin, self._words, walker.until)
        heap: _Heap = []
        seen: set[tuple[int, int]] = set()
        found: list[list[int]] = []
        start = self._after(inner, origin, (), 0.0, limit)
        if start is not None:
            heap.append((0.0, start))
        for _ in range(expansions):
            if not heap or len(found) == _ENDS:
                break
            node = heapq.heappop(heap)[1]
            inner.go(node)
            row, legal = inner.legal()
            path = node.path()
            if path and self._ends(inner, node.context, legal):
                found.append(path)
                continue
            key = (sum(len(self._bytes(i)) for i in path), hash(row.tobytes()))
            if key in seen:
                continue
            seen.add(key)
            for token in self._candidates.kinds(legal):
                child = self._after(inner, node, [token], 1.5 if token in path else 1.0, limit)
                if child is not None:
                    heapq.heappush(heap, (_merit(child), child))
        inner.go(origin)
        return found

    def _fill_up(self, walker: _Walker, limit: int) -> list[list[int]]:
        """An end found by taking the longest legal words, as a least length wants it."""
        context, path, ends = walker.node.context, list[int](), False
        while len(path) < limit:
            legal = walker.legal()[1]
            ends = bool(path) and self._ends(walker, context, legal)
            word = None if ends else self._candidates.word(legal)
            if word is None or not walker.matcher.advance(word):
                break
            path.append(word)
            if context is not None:
                context = context.after(self._bytes(word))
        walker.matcher.rollback(len(path))
        return [path] if ends else []

    def _ends(self, walker: _Walker, context: Context | None, legal: NDArray[np.bool_]) -> bool:
        """Whether the outer level can go on from where the walker stands."""
        if walker.matcher.can_stop():
            return True
        if context is None or context.escape:
            return False
        return bool(self._candidates.punctuation(context, legal))


def _merit(node: _Node) -> float:
    """What a path through `node` will cost at least, as far as that can be told."""
    if node.context is None:
        return node.cost
    # What is left open is charged, members passed are credited: else every alternative to the first choice would be
    # tried before the last is made. The credit is less than the charge for one more level of nesting, so that a
    # recursive branch loses to one that is not.
    return node.cost + node.context.open - 4 * node.context.passed
