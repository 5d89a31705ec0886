"""Patterns on which Python's `re` could spend exponential time, found before it is asked.

jsonschema matches patterns with `re`, which backtracks: ``^(a+)+$`` on thirty characters takes minutes, in native code
that nothing interrupts. It happens where a loop can read one text in two ways. A pattern is turned into its position
automaton (Glushkov 1961) with one edge for each way to go from one position to the next, and two ways within a loop are
looked for: two edges between the same positions, or a cycle of pairs of positions that parts and meets again (the
criterion EDA of Weideman et al., "Analyzing Matching Time Behavior of Backtracking Regular Expression Matchers", 2016).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import jsonschema.validators
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.protocols import Validator

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.schema.charsets import Chars
from agentkit.runtime.schema.parts import pointer
from agentkit.runtime.schema.patterns import Ahead, Edge, Either, Join, Node, Repeat, Set, Untranslatable, parse

Item = TypeVar("Item", bound=Hashable)

#: Repetitions from which on a bounded loop is taken for an endless one.
_LOOP = 8
#: Positions, and pairs of them, that are looked at.
_POSITIONS, _PAIRS = 400, 40_000
#: Characters of a text on which no pattern takes long.
_HARMLESS = 20


class _Part(NamedTuple):
    """Part of an automaton: where it can begin and end, and in how many ways it can be empty; two stand for more.

    A position stands twice where there are two ways to begin or end there.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    empty: int


_NOTHING = _Part((), (), 1)


class _TooLarge(Exception):
    """More positions or pairs than are looked at."""


@lru_cache(maxsize=1024)
def explosive(pattern: str) -> bool:
    """Whether matching may take exponential time; also where the pattern is too large to tell.

    What is not understood, such as a back-reference, is taken to be harmless: it is refused elsewhere.
    """
    try:
        automaton = _Automaton(parse(pattern))
        return automaton.doubled() or automaton.ambiguous()
    except _TooLarge:
        return True
    except (Untranslatable, re.error, RecursionError):
        return False


def search(pattern: str, text: str) -> bool:
    """Whether a pattern is found in a text, as `re.search` says.

    Raises:
        SchemaError: that could take it too long to say.
        re.error: it is not a pattern.
    """
    if len(text) > _HARMLESS and explosive(pattern):
        raise SchemaError(_advice(pattern))
    return re.search(pattern, text) is not None


def _pattern(validator: Validator, pattern: str, instance: object, schema: object) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not search(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


_jsonschema: Any = jsonschema.validators
#: jsonschema's validator of draft 2020-12 with `search` for ``pattern``.
Patient: Any = _jsonschema.extend(Draft202012Validator, {"pattern": _pattern})


class _Automaton:
    """The position automaton of a pattern.

    Attributes:
        chars: what each position reads.
        edges: from position to position, with the number of ways.
    """

    def __init__(self, node: Node) -> None:
        self.chars: list[Chars] = []
        self.edges: Counter[tuple[int, int]] = Counter()
        self._ahead: list[Node] = [node]
        while self._ahead:  # what is looked ahead for is matched by itself
            self._build(self._ahead.pop())
        self._next: dict[int, list[int]] = {}
        for source, target in self.edges:
            self._next.setdefault(source, []).append(target)
        self._loop = components(range(len(self.chars)), lambda position: self._next.get(position, ()))

    def doubled(self) -> bool:
        """Whether there are two ways from one position of a loop to another one of it."""
        return any(ways > 1 and self._loop[a] == self._loop[b] for (a, b), ways in self.edges.items())

    def ambiguous(self) -> bool:
        """Whether two different ways through a loop read the same text."""
        pairs = self._pairs()
        group = components(pairs, lambda pair: pairs[pair])
        same = {group[pair] for pair in pairs if pair[0] == pair[1]}
        return any(pair[0] != pair[1] and group[pair] in same for pair in pairs)

    def _pairs(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Pairs of positions of one loop that one text leads to from one position, and the pairs after each."""
        pending = [(p, p) for p in range(len(self.chars)) if p in self._next]
        found: dict[tuple[int, int], list[tuple[int, int]]] = {pair: [] for pair in pending}
        while pending:
            one, two = pending.pop()
            for a in self._next.get(one, ()):
                for b in self._next.get(two, ()):
                    if self._loop[a] != self._loop[one] or self._loop[b] != self._loop[two]:
                        continue
                    if a != b and not _meet(self.chars[a], self.chars[b]):
                        continue
                    if (a, b) not in found:
                        if len(found) >= _PAIRS:
                            raise _TooLarge
                        found[a, b] = []
                        pending.append((a, b))
                    found[one, two].append((a, b))
        return found

    def _build(self, node: Node) -> _Part:
        match node:
            case Set(chars):
                if len(self.chars) >= _POSITIONS:
                    raise _TooLarge
                self.chars.append(chars)
                here = (len(self.chars) - 1,)
                return _Part(here, here, 0)
            case Join(inner):
                whole = _NOTHING
                for part in inner:
                    whole = self._join(whole, self._build(part))
                return whole
            case Either(branches):
                built = [self._build(branch) for branch in branches]
                first = tuple(position for part in built for position in part.first)
                last = tuple(position for part in built for position in part.last)
                return _Part(first, last, min(2, sum(part.empty for part in built)))
            case Repeat(inner, low, high):
                return self._repeat(inner, low, high)
            case Edge():
                return _NOTHING
            case Ahead(inner):
                self._ahead.append(inner)
                return _NOTHING

    def _repeat(self, inner: Node, low: int, high: int | None) -> _Part:
        if high is None or high >= _LOOP:
            part = self._build(inner)
            self.edges.update((a, b) for a in part.last for b in part.first)
            return _Part(part.first, part.last, part.empty or int(low == 0))
        whole = _NOTHING
        for time in range(high):
            part = self._build(inner)
            whole = self._join(whole, _Part(part.first, part.last, min(2, part.empty + (time >= low))))
        return whole

    def _join(self, one: _Part, two: _Part) -> _Part:
        self.edges.update((a, b) for a in one.last for b in two.first)
        first = _twice(one.first + two.first * one.empty)
        last = _twice(two.last + one.last * two.empty)
        return _Part(first, last, min(2, one.empty * two.empty))


def _twice(positions: tuple[int, ...]) -> tuple[int, ...]:
    """Without what stands there more than twice."""
    return tuple(position for position, times in Counter(positions).items() for _ in range(min(2, times)))


def _meet(one: Chars, two: Chars) -> bool:
    """Whether two sets of characters have one in common."""
    a = b = 0
    while a < len(one) and b < len(two):
        if one[a][1] < two[b][0]:
            a += 1
        elif two[b][1] < one[a][0]:
            b += 1
        else:
            return True
    return False


def components(nodes: Iterable[Item], after: Callable[[Item], Iterable[Item]]) -> dict[Item, int]:
    """The strongly connected component of each node, by number (Tarjan 1972, without recursion)."""
    order: dict[Item, int] = {}
    low: dict[Item, int] = {}
    found: dict[Item, int] = {}
    stack: list[Item] = []
    for root in nodes:
        if root in order:
            continue
        order[root] = low[root] = len(order)
        stack.append(root)
        work = [(root, iter(after(root)))]
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in order:
                    order[other] = low[other] = len(order)
                    stack.append(other)
                    work.append((other, iter(after(other))))
                    break
                if other not in found:
                    low[node] = min(low[node], order[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    while True:
                        member = stack.pop()
                        found[member] = order[node]
                        if member == node:
                            break
    return found


def require_patient(schema: object) -> None:
    """Look at the patterns of a schema by which documents will be judged.

    Raises:
        SchemaError: matching one of them could take exponential time.
    """
    pending: list[tuple[tuple[str | int, ...], object]] = [((), schema)]
    while pending:
        path, part = pending.pop()
        if isinstance(part, dict):
            members = cast("dict[str, object]", part)
            named = members.get("patternProperties")
            patterns = [members.get("pattern"), *(cast("dict[str, object]", named) if isinstance(named, dict) else ())]
            for pattern in patterns:
                if isinstance(pattern, str) and explosive(pattern):
                    raise SchemaError(_advice(pattern, pointer(path)), pointer(path))
            pending += [((*path, key), inner) for key, inner in members.items()]
        elif isinstance(part, list):
            pending += [((*path, i), inner) for i, inner in enumerate(cast("list[object]", part))]


def _advice(pattern: str, at: str = "") -> str:
    place = f" at {at}" if at else ""
    return (
        f"Matching the pattern {pattern[:100]!r}{place} could take for ever, as its loops can read one text in many "
        "ways. Write it without a repetition inside another one."
    )
