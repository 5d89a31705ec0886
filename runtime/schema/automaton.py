"""Finite automata of patterns: their complements and conjunctions, written as patterns again.

llguidance's patterns have neither complement nor difference, which look-ahead and names under several patterns ask
for. A pattern becomes a deterministic automaton (subset construction over the characters that its classes tell
apart), and an automaton becomes a pattern by elimination of its states (Brzozowski and McCluskey 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from agentkit.runtime.schema.charsets import Chars, holds, intersection, told_apart, union
from agentkit.runtime.schema.patterns import (
    EMPTY,
    Ahead,
    Edge,
    Either,
    Join,
    Node,
    Repeat,
    Set,
    Untranslatable,
    conditions,
    joined,
    walk,
    written,
)

State = TypeVar("State")

# Larger automata, and longer patterns, are not worth what they cost: with these limits none takes more than 0.1 s.
_STATES, _STEPS, _LENGTH, _WAYS = 300, 3000, 8000, 5000


@dataclass(frozen=True, slots=True)
class Automaton:
    """A complete deterministic automaton over whole texts. It begins in state 0.

    Attributes:
        atoms: sets of characters that it does not tell apart; together all characters.
        moves: the next state by state and atom.
        final: states in which a text may end.
    """

    atoms: tuple[Chars, ...]
    moves: tuple[tuple[int, ...], ...]
    final: frozenset[int]

    @property
    def empty(self) -> bool:
        """Whether it accepts no text."""
        return not self.final

    def others(self) -> Automaton:
        """All texts that this one does not accept."""
        return _least(Automaton(self.atoms, self.moves, frozenset(range(len(self.moves))) - self.final))

    def both(self, other: Automaton) -> Automaton:
        """Texts that this one and `other` accept."""
        pairs = [
            (shared, a, b)
            for a, b in product(range(len(self.atoms)), range(len(other.atoms)))
            if (shared := intersection(self.atoms[a], other.atoms[b]))
        ]

        def moves(state: tuple[int, int]) -> list[tuple[int, int]]:
            one, two = state
            return [(self.moves[one][a], other.moves[two][b]) for _, a, b in pairs]

        atoms = tuple(shared for shared, _, _ in pairs)
        return _explored(atoms, (0, 0), moves, lambda state: state[0] in self.final and state[1] in other.final)

    def minus(self, other: Automaton) -> Automaton:
        """Texts that this one accepts and `other` does not."""
        return self.both(other.others())

    def shortest(self) -> str:
        """One of the shortest texts it accepts, of common characters where it can be; "" if there is none."""
        letters = [_common(atom) for atom in self.atoms]
        texts = {0: ""}
        queue = [0]
        for state in queue:
            if state in self.final:
                return texts[state]
            for letter, after in zip(letters, self.moves[state], strict=True):
                if after not in texts:
                    texts[after] = texts[state] + letter
                    queue.append(after)
        return ""

    def pattern(self) -> str:
        """A pattern of the texts it accepts, anchored at both ends.

        Raises:
            Untranslatable: it accepts nothing, or the pattern would be too long.
        """
        if self.empty:
            raise Untranslatable("no text that matches")
        text = written(joined([Edge(False), _expression(self), Edge(True)]))
        if len(text) > _LENGTH:
            raise Untranslatable("size")
        return text


def _common(chars: Chars) -> str:
    """A letter or digit of a set of characters, else a printable one, else any."""
    for preferred in (((0x61, 0x7A),), ((0x30, 0x39),), ((0x41, 0x5A),), ((0x20, 0x7E),), chars):
        if shared := intersection(chars, preferred):
            return chr(shared[0][0])
    return ""


def searched(pattern: str, wide: bool = False) -> Automaton:
    """Texts in which a pattern, as a schema has it, is found; with `wide` also those in which only one of the two
    dialects finds it: for a complement, which then leaves them out.

    Raises:
        Untranslatable: as `conditions`, or it is too large.
    """
    node, ahead = conditions(pattern, wide)
    found = automaton(node)
    for condition in ahead:
        found = found.both(allowed(condition))
    return found


def allowed(condition: Ahead) -> Automaton:
    """Texts whose beginning meets a condition."""
    follows = automaton(joined([Edge(False), condition.node]))
    return follows.others() if condition.negated else follows


def automaton(node: Node) -> Automaton:
    """Texts in which a pattern is found.

    Raises:
        Untranslatable: it has look-ahead or is too large.
    """
    if any(isinstance(inner, Ahead) for inner in walk(node)):
        raise Untranslatable("look-ahead")
    atoms = told_apart([inner.chars for inner in walk(node) if isinstance(inner, Set)])
    graph = _Graph()
    end = graph.add(node, 0)
    return graph.determined(atoms, end)


def listed(texts: Iterable[str]) -> Automaton:
    """A few texts."""
    return automaton(joined([Edge(False), Either(tuple(map(_literal, texts))), Edge(True)]))


def _literal(text: str) -> Node:
    return Join(tuple(Set(((ord(char), ord(char)),)) for char in text))


class _Graph:
    """A non-deterministic automaton under construction: of each state its steps by a character and without one."""

    def __init__(self) -> None:
        self._steps: list[list[tuple[Chars, int]]] = [[]]
        self._free: list[list[tuple[Edge | None, int]]] = [[]]

    def add(self, node: Node, start: int) -> int:
        """Ways through `node` from `start`; returns where they end."""
        match node:
            case Set(chars):
                end = self._state()
                self._steps[start].append((chars, end))
                return end
            case Join(parts):
                for part in parts:
                    start = self.add(part, start)
                return start
            case Either(branches):
                end = self._state()
                for branch in branches:
                    self._free[self.add(branch, self._from(start))].append((None, end))
                return end
            case Repeat(inner, low, high):
                return self._repeat(inner, low, high, start)
            case Edge():
                end = self._state()
                self._free[start].append((node, end))
                return end
            case Ahead():
                raise Untranslatable("look-ahead")

    def _repeat(self, inner: Node, low: int, high: int | None, start: int) -> int:
        for _ in range(low):
            start = self.add(inner, start)
        end = self._state()
        if high is None:
            loop = self._from(start)
            self._free[self.add(inner, loop)].append((None, loop))
            self._free[loop].append((None, end))
            return end
        for _ in range(high - low):
            self._free[start].append((None, end))
            start = self.add(inner, start)
        self._free[start].append((None, end))
        return end

    def _state(self) -> int:
        if len(self._steps) >= _STEPS:
            raise Untranslatable("size")
        self._steps.append([])
        self._free.append([])
        return len(self._steps) - 1

    def _from(self, start: int) -> int:
        state = self._state()
        self._free[start].append((None, state))
        return state

    def determined(self, atoms: tuple[Chars, ...], found: int) -> Automaton:
        """The deterministic automaton of texts that hold a way from state 0 to `found`."""
        steps: list[list[tuple[int, int]]] = [
            [(a, end) for chars, end in own for a, atom in enumerate(atoms) if holds(chars, atom[0][0])]
            for own in self._steps
        ]

        def moves(config: _Config) -> list[_Config]:
            if (found, False) in config:
                return [config] * len(atoms)
            after: list[set[int]] = [{0} for _ in atoms]  # a match may begin anywhere
            for state, ended in config:
                for a, end in () if ended else steps[state]:
                    after[a].add(end)
            return [self._closure(states, found, False) for states in after]

        start = self._closure({0}, found, True)
        return _explored(atoms, start, moves, lambda config: any(state == found for state, _ in config))

    def _closure(self, states: set[int], found: int, first: bool) -> _Config:
        """All that is reached without a character: of each state, whether the text must have ended there."""
        seen = {(state, False) for state in states}
        stack = list(seen)
        while stack:
            state, ended = stack.pop()
            for edge, end in self._free[state]:
                if edge is not None and not edge.end and not first:
                    continue
                after = (end, ended or (edge is not None and edge.end))
                if after not in seen:
                    seen.add(after)
                    stack.append(after)
        if (found, False) in seen:
            return frozenset({(found, False)})  # whatever follows
        return frozenset(seen)


_Config = frozenset[tuple[int, bool]]


def _explored(
    atoms: tuple[Chars, ...],
    start: State,
    moves: Callable[[State], list[State]],
    accepts: Callable[[State], bool],
) -> Automaton:
    """The automaton of all states that are reached from `start`."""
    numbers: dict[State, int] = {start: 0}
    queue, table = [start], list[tuple[int, ...]]()
    for state in queue:
        row: list[int] = []
        for after in moves(state):
            if after not in numbers:
                if len(numbers) >= _STATES:
                    raise Untranslatable("size")
                numbers[after] = len(numbers)
                queue.append(after)
            row.append(numbers[after])
        table.append(tuple(row))
    final = frozenset(number for state, number in numbers.items() if accepts(state))
    return _least(Automaton(atoms, tuple(table), final))


def _least(given: Automaton) -> Automaton:
    """The automaton with the fewest states that accepts the same (Moore 1956)."""
    count = len(given.moves)
    block = [int(state in given.final) for state in range(count)]
    while True:
        keys = {state: (block[state], tuple(block[after] for after in given.moves[state])) for state in range(count)}
        order = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
        finer = [order[keys[state]] for state in range(count)]
        if len(order) == len(set(block)):
            break
        block = finer
    first: dict[int, int] = {}
    for state in range(count):
        first.setdefault(finer[state], state)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(finer))}  # state 0 stays 0
    table = [tuple(numbers[finer[after]] for after in given.moves[state]) for state in first.values()]
    final = frozenset(numbers[finer[state]] for state in given.final)
    return Automaton(given.atoms, tuple(table), final)


def _expression(given: Automaton) -> Node:
    """The texts from state 0 to a final one, by taking out one state after the other, cheapest first."""
    arcs = _Arcs()
    alive = _alive(given)
    for state in alive:
        sets: dict[int, list[Chars]] = {}
        for atom, after in zip(given.atoms, given.moves[state], strict=True):
            if after in alive:
                sets.setdefault(after, []).append(atom)
        for after, atoms in sets.items():
            arcs.add(state, after, Set(union(*atoms)), 1)
    start, end = -1, -2
    arcs.add(start, 0, EMPTY, 0)
    for state in given.final:
        arcs.add(state, end, EMPTY, 0)
    left = set(alive)
    while left:
        state = min(left, key=lambda one: (arcs.price(one), one))
        left.discard(state)
        arcs.take_out(state)
    return arcs.out[start][end][0]


def _alive(given: Automaton) -> set[int]:
    """States from which a text can still be accepted."""
    alive = set(given.final)
    while True:
        more = {state for state, row in enumerate(given.moves) if state not in alive and not alive.isdisjoint(row)}
        if not more:
            return alive
        alive |= more


class _Arcs:
    """Patterns between states, each with its size.

    Attributes:
        out: by the state they lead from, then the state they lead to.
    """

    def __init__(self) -> None:
        self.out: dict[int, dict[int, tuple[Node, int]]] = {}
        self._into: dict[int, set[int]] = {}
        self._ways = 0

    def add(self, source: int, state: int, node: Node, size: int) -> None:
        """One more way from `source` to `state`."""
        row = self.out.setdefault(source, {})
        if state in row:
            known, before = row[state]
            node, size = _either(known, node), before + size + 1
        self._ways += 1
        if size > _LENGTH or self._ways > _WAYS:
            raise Untranslatable("size")
        row[state] = node, size
        self._into.setdefault(state, set()).add(source)

    def price(self, state: int) -> int:
        """What taking out a state adds."""
        sources = self._into.get(state, set()) - {state}
        leaving = [size for after, (_, size) in self.out.get(state, {}).items() if after != state]
        arriving = [self.out[source][state][1] for source in sources]
        return sum(arriving) * len(leaving) + sum(leaving) * len(arriving)

    def take_out(self, state: int) -> None:
        """Lead what passes through a state around it."""
        leaving = self.out.pop(state, {})
        loop, around = leaving.pop(state, (EMPTY, 0))
        for after in leaving:
            self._into[after].discard(state)
        for source in self._into.pop(state, set()) - {state}:
            arriving, before = self.out[source].pop(state)
            for after, (node, size) in leaving.items():
                way = [arriving, node] if loop == EMPTY else [arriving, Repeat(loop, 0, None), node]
                self.add(source, after, joined(way), before + around + size)


def _either(one: Node, other: Node) -> Node:
    """One or the other, with sets of characters joined and nothing made an option."""
    if isinstance(one, Set) and isinstance(other, Set):
        return Set(union(one.chars, other.chars))
    if EMPTY in (one, other):
        node = other if one == EMPTY else one
        return node if isinstance(node, Repeat) and node.low == 0 else Repeat(node, 0, 1)
    branches = [*(one.branches if isinstance(one, Either) else (one,)), other]
    return Either(tuple(branches))
