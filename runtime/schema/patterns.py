"""A schema's patterns, from what Python's `re` takes them for, as jsonschema does, to what llguidance can enforce.

A pattern is parsed by `re` itself into a small tree, and the tree is written in the syntax that Rust's `regex`
shares with `re`, its character classes spelled out. Where the two dialects of JSON Schema differ (`charsets`), or
``$`` could stand before a last newline, the result admits what both admit. Look-ahead at the beginning of a string
is a condition of its own: a pattern becomes several, all of which a string has to match.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from agentkit.runtime.schema.charsets import ANY, Chars, category, complement, intersection, spelled, union


class Untranslatable(Exception):
    """A pattern that no regular expression for llguidance was found for; says what is in it."""


@dataclass(frozen=True, slots=True)
class Set:
    """One character out of `chars`; none if that is empty."""

    chars: Chars


@dataclass(frozen=True, slots=True)
class Join:
    """One part after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """One of several branches."""

    branches: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`node` from `low` to `high` times; without end if that is None."""

    node: Node
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Edge:
    """The beginning of the text, or its end."""

    end: bool


@dataclass(frozen=True, slots=True)
class Ahead:
    """What follows begins with `node`; with `negated` it does not."""

    node: Node
    negated: bool


Node = Set | Join | Either | Repeat | Edge | Ahead

EMPTY = Join(())
REST = Repeat(Set(ANY), 0, None)
# Neither a long pattern nor a deep one may keep us, or Python's stack, busy.
_LONGEST, _DEEPEST = 20_000, 60
# The parser that jsonschema's own `re.search` uses. It has no public name; a parser of ours could disagree with it.
_parser = import_module("re._parser")


@lru_cache(maxsize=256)
def parse(pattern: str, wide: bool = False) -> Node:
    """The tree of a pattern: of what both dialects find it in, or with `wide` of what either does.

    Raises:
        Untranslatable: it holds what the tree has no word for, such as a back-reference.
        re.error: it is not a pattern.
    """
    if len(pattern) > _LONGEST or _nesting(pattern) > _DEEPEST:
        raise Untranslatable("size")
    tree = _parser.parse(pattern)
    return _Reader(wide).sequence(tree, tree.state.flags)


def _nesting(pattern: str) -> int:
    """How deep the parentheses of a pattern are nested, those that are no groups included."""
    depth = deepest = 0
    for char in pattern:
        depth += (char == "(") - (char == ")")
        deepest = max(deepest, depth)
    return deepest


@dataclass(frozen=True, slots=True)
class _Reader:
    """From `re`'s tree to ours; `wide` says how to take a class that is not negated (see `charsets`)."""

    wide: bool

    def sequence(self, tree: Any, flags: int) -> Node:
        return joined([self._node(str(op), value, flags) for op, value in tree])

    def _node(self, op: str, value: Any, flags: int) -> Node:
        match op:
            case "LITERAL":
                return Set(intersection(self._cased(((value, value),), flags, self.wide), ANY))
            case "NOT_LITERAL":
                return Set(complement(self._cased(((value, value),), flags, not self.wide)))
            case "ANY":
                return Set(ANY if flags & re.DOTALL else complement(((10, 10),)))
            case "IN":
                return Set(self._members(value, flags))
            case "BRANCH":
                return Either(tuple(self.sequence(branch, flags) for branch in value[1]))
            case "SUBPATTERN":
                _, added, removed, inner = value
                return self.sequence(inner, (flags | added) & ~removed)
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high, inner = value
                bound = None if high is _parser.MAXREPEAT else int(high)
                return Repeat(self.sequence(inner, flags), int(low), bound)
            case "AT":
                return self._edge(str(value), flags)
            case "ASSERT" | "ASSERT_NOT":
                return self._ahead(value, op == "ASSERT_NOT", flags)
            case _:
                raise Untranslatable("back-references" if op.startswith("GROUPREF") else "possessive or atomic groups")

    def _edge(self, where: str, flags: int) -> Node:
        if "BOUNDARY" in where:
            raise Untranslatable("word boundaries")
        if flags & re.MULTILINE and not where.endswith("_STRING"):
            raise Untranslatable("anchors at every line")
        if where == "AT_END" and self.wide:  # also before a last newline
            return Either((Edge(True), Join((Set(((10, 10),)), Edge(True)))))
        return Edge(end=where.startswith("AT_END"))

    def _ahead(self, value: Any, negated: bool, flags: int) -> Node:
        direction, inner = value
        if direction < 0:
            raise Untranslatable("look-behind")
        reader = _Reader(self.wide != negated)
        return Ahead(reader.sequence(inner, flags), negated)

    def _members(self, members: Sequence[tuple[Any, Any]], flags: int) -> Chars:
        negated = bool(members) and str(members[0][0]) == "NEGATE"
        wide = self.wide != negated
        found: list[Chars] = []
        names = {str(value) for op, value in members if str(op) == "CATEGORY"}
        if any(name.replace("_NOT_", "_") in names for name in names if "_NOT_" in name):
            found.append(ANY)  # such as [\\s\\S]
        for op, value in members:
            match str(op):
                case "LITERAL":
                    found.append(self._cased(((value, value),), flags, wide))
                case "RANGE":
                    found.append(self._cased((value,), flags, wide))
                case "CATEGORY":
                    found.append(self._category(str(value), wide))
                case _:  # NEGATE
                    continue
        chars = union(*found)
        return complement(chars) if negated else intersection(chars, ANY)

    @staticmethod
    def _category(name: str, wide: bool) -> Chars:
        letter = {"DIGIT": "d", "WORD": "w", "SPACE": "s"}[name.rpartition("_")[2]]
        if "_NOT_" in name:
            return complement(category(letter, not wide))
        return category(letter, wide)

    @staticmethod
    def _cased(chars: Chars, flags: int, wide: bool) -> Chars:
        """With the other case of ASCII's letters where case is ignored; ``wide``: with all that `re` equals to them."""
        if not flags & re.IGNORECASE:
            return chars
        if wide and not all(high < 0x80 for _, high in chars):
            raise Untranslatable("letters beyond ASCII of any case")
        found = [chars]
        for low, high in ((0x41, 0x5A), (0x61, 0x7A)):
            letters = intersection(chars, ((low, high),))
            found.append(tuple((a ^ 0x20, b ^ 0x20) for a, b in letters))
        if wide:
            found.append(((0x130, 0x131), (0x17F, 0x17F), (0x212A, 0x212A)))
        return union(*found)


def joined(parts: Sequence[Node]) -> Node:
    """One after the other, without nesting."""
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, Join) else (part,))]
    return flat[0] if len(flat) == 1 else Join(tuple(flat))


def conditions(pattern: str, wide: bool = False) -> tuple[Node, tuple[Ahead, ...]]:
    """A pattern as one without look-ahead, and conditions on the beginning of a string beside it; `wide` as in `parse`.

    Raises:
        Untranslatable: look-ahead stands elsewhere.
    """
    sequence = list(parts(parse(pattern, wide)))
    at, anchored = 0, False
    found: list[Ahead] = []
    while at < len(sequence):
        part = sequence[at]
        if isinstance(part, Ahead) and anchored:
            found.append(part)
        elif isinstance(part, Edge) and not part.end:
            anchored = True
        else:
            break
        at += 1
    rest = sequence[at:]
    if rest and isinstance(last := rest[-1], Ahead) and not last.negated:
        rest[-1] = last.node  # a search goes on with anything, and so with what must follow
    node = joined([Edge(end=False), *rest] if anchored else rest)
    if any(isinstance(inner, Ahead) for inner in walk(node)) or any(
        isinstance(inner, Ahead) for condition in found for inner in walk(condition.node)
    ):
        raise Untranslatable("look-ahead")
    return node, tuple(found)


def parts(node: Node) -> tuple[Node, ...]:
    """What comes one after the other."""
    return node.parts if isinstance(node, Join) else (node,)


def walk(node: Node) -> Iterator[Node]:
    """A node and all inside it."""
    yield node
    match node:
        case Join(inner) | Either(inner):
            for part in inner:
                yield from walk(part)
        case Repeat(inner) | Ahead(inner):
            yield from walk(inner)
        case _:
            pass


def written(node: Node) -> str:
    """A tree without look-ahead in the syntax that Rust's `regex` shares with `re`."""
    match node:
        case Set(chars):
            return spelled(chars) if chars else r"[^\s\S]"
        case Join(inner):
            return "".join(map(_group, inner))
        case Either(branches):
            return "|".join(map(written, branches))
        case Repeat(inner, low, high):
            if inner == Set(ANY):  # llguidance's masks are fast for this spelling: 0.1 ms, not 1.4
                return f"(?s:.{_counted(low, high)})"
            return _atom(inner) + _counted(low, high)
        case Edge(end):
            return "$" if end else "^"
        case Ahead():
            raise Untranslatable("look-ahead")


def _group(node: Node) -> str:
    return f"(?:{written(node)})" if isinstance(node, Either) else written(node)


def _atom(node: Node) -> str:
    return written(node) if isinstance(node, Set) else f"(?:{written(node)})"


def _counted(low: int, high: int | None) -> str:
    if high is None:
        return {0: "*", 1: "+"}.get(low, f"{{{low},}}")
    if low == high:
        return f"{{{low}}}" if low != 1 else ""
    return "?" if (low, high) == (0, 1) else f"{{{low},{high}}}"
