"""What a finished document fails of its schema, and where: jsonschema's verdict, brought down to one value."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jsonschema
from jsonschema.validators import validator_for
from referencing.exceptions import Unresolvable

from agentkit.runtime.schema.front import Json

Step = str | int
Span = tuple[int, int]

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\]}]+")
_BLANK = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Fault:
    """One value that keeps a document from satisfying its schema.

    Attributes:
        pointer: JSON pointer of the value in the document; ``""`` for the whole.
        keyword: of the schema, such as ``uniqueItems``.
        message: what is wrong with the value.
        span: where the value stands in the document's text: its first character and the one after its last.
        members: where the values directly inside it stand.
        excess: the value is one too many: no other one in its place could be right.
    """

    pointer: str
    keyword: str
    message: str
    span: Span
    members: tuple[Span, ...] = ()
    excess: bool = False

    def __str__(self) -> str:
        return f"{self.pointer or 'the whole document'}: {self.message} ({self.keyword})"


class _Blame(NamedTuple):
    """A failing place: the way to the value, and the key there if that is what is wrong."""

    path: tuple[Step, ...]
    key: str | None = None
    excess: bool = False


class Judge:
    """Judges documents by one schema, as jsonschema does with formats checked.

    Args:
        schema: JSON text of a valid schema.
    """

    def __init__(self, schema: str) -> None:
        value: Any = json.loads(schema)
        kind = validator_for(value, default=jsonschema.Draft202012Validator)
        self._validator = kind(value, format_checker=kind.FORMAT_CHECKER)

    def fault(self, document: str) -> Fault | None:
        """The failing value that is complete first, of those the innermost; None if the document is valid.

        What comes behind that value will be decoded again with it, so it is mended first. A key that stands twice is
        a fault: which of the two counts is not defined.
        """
        twice = _repeated_key(document)
        if twice is not None:
            return twice
        try:
            value: Any = json.loads(document)
            errors = [leaf for error in self._validator.iter_errors(value) for leaf in _leaves(error)]
            found = [self._locate(document, value, error) for error in errors]
        except (ValueError, ArithmeticError, RecursionError, re.error, Unresolvable) as error:
            # A number, a depth, a pattern that Python does not take, or a reference to nothing.
            return Fault("", "type", f"it cannot be judged: {error}", _whole(document))
        return min(found, key=lambda fault: (fault.span[1], -fault.span[0]), default=None)

    def _locate(self, document: str, value: Any, error: Any) -> Fault:
        path = tuple(cast("Sequence[Step]", error.absolute_path))
        blame = _blame(error, path, value)
        span = _whole(document)
        for step in blame.path:
            span = next(member.value for member in _members(document, span[0]) if member.step == step)
        members = tuple(member.value for member in _members(document, span[0]))
        if blame.key is not None:
            span, members = next(m.key for m in _members(document, span[0]) if m.step == blame.key), ()
        return Fault(_pointer(blame.path), str(error.validator), str(error.message)[:300], span, members, blame.excess)


def _leaves(error: Any) -> Iterator[Any]:
    """The errors of the branch of a union that comes closest; the error itself where it is of no union, or where two
    branches come equally close."""
    branches: dict[Hashable, list[Any]] = {}
    for inner in error.context:
        branches.setdefault(inner.relative_schema_path[0], []).append(inner)
    ranked = sorted((_distance(errors), index) for index, errors in enumerate(branches.values()))
    if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
        yield error
        return
    for inner in list(branches.values())[ranked[0][1]]:
        yield from _leaves(inner)


def _distance(errors: Sequence[Any]) -> tuple[int, int]:
    """How far a branch is: what tells branches apart counts first, then how much is wrong."""
    return sum(error.validator in ("const", "enum", "type") for error in errors), len(errors)


def _blame(error: Any, path: tuple[Step, ...], root: Any) -> _Blame:
    """The most specific place that a failing keyword can be laid on."""
    keyword, limit, instance = error.validator, error.validator_value, error.instance
    if isinstance(instance, list):
        items = cast("list[Any]", instance)
        if keyword == "uniqueItems":
            return _Blame((*path, _repeated(items)))
        if keyword == "maxItems":
            return _Blame((*path, int(limit)), excess=True)
    if isinstance(instance, dict):
        members = cast("Json", instance)
        if keyword == "additionalProperties" and limit is False:
            return _Blame(path, next(key for key in members if _is_extra(key, error.schema)))
        if keyword == "maxProperties":
            return _Blame((*path, list(members)[int(limit)]), excess=True)
    elif isinstance(instance, str) and "propertyNames" in error.absolute_schema_path:
        holder = root
        for step in path:
            holder = holder[step]
        if isinstance(holder, dict) and instance in holder:
            return _Blame(path, instance)
    return _Blame(path)


def _is_extra(key: str, schema: Any) -> bool:
    return key not in schema.get("properties", {}) and not any(
        re.search(pattern, key) for pattern in schema.get("patternProperties", {})
    )


def _repeated(items: Sequence[Any]) -> int:
    """Index of the first item that is equal to one before it."""
    seen: set[Hashable] = set()
    for index, item in enumerate(items):
        identity = _identity(item)
        if identity in seen:
            return index
        seen.add(identity)
    return len(items) - 1


def _identity(value: Any) -> Hashable:
    """Equal for values that are equal in JSON: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return frozenset((key, _identity(member)) for key, member in cast("Json", value).items())
    if isinstance(value, list):
        return tuple(map(_identity, cast("list[Any]", value)))
    return (isinstance(value, bool), value)


class _Member(NamedTuple):
    """A value directly inside another one: its key or index, and where key (of an array: nothing) and value stand."""

    step: Step
    key: Span
    value: Span


def _members(text: str, start: int) -> Iterator[_Member]:
    """Members of the value that begins at ``start``, which is JSON; none of a scalar."""
    opening, at, index = text[start], _skip(text, start + 1), 0
    while opening in "{[" and text[at] not in "}]":
        step, key = index, (at, at)
        if opening == "{":
            key = (at, _end(text, at))
            step = json.loads(text[slice(*key)])
            at = _skip(text, _skip(text, key[1]) + 1)
        value = (at, _end(text, at))
        yield _Member(step, key, value)
        index += 1
        at = _skip(text, value[1])
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    blank = _BLANK.match(text, at)
    return blank.end() if blank is not None else at


def _end(text: str, start: int) -> int:
    """Where the value that begins at ``start`` ends."""
    if text[start] not in "{[":
        token = (_STRING if text[start] == '"' else _SCALAR).match(text, start)
        return token.end() if token is not None else start + 1
    depth = 0
    for mark in _BRACKET.finditer(text, start):
        depth += (mark[0] in "{[") - (mark[0] in "}]")
        if depth == 0:
            return mark.end()
    return len(text)


def _whole(text: str) -> Span:
    start = _skip(text, 0)
    return start, max(start, len(text.rstrip(" \t\n\r")))


def _repeated_key(text: str) -> Fault | None:
    """The first key that stands a second time in its object."""

    def refuse(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise _RepeatedKeyError

    try:
        json.loads(text, object_pairs_hook=refuse)
    except _RepeatedKeyError:
        return _first_repeated(text, (), _whole(text)[0])
    except (ValueError, RecursionError):  # not this function's matter
        pass
    return None


class _RepeatedKeyError(Exception):
    pass


def _first_repeated(text: str, path: tuple[Step, ...], start: int) -> Fault | None:
    seen: set[Step] = set()
    for member in _members(text, start):
        if member.step in seen:
            return Fault(
                _pointer(path), "properties", f"the key {member.step!r} stands twice in this object", member.key
            )
        seen.add(member.step)
        fault = _first_repeated(text, (*path, member.step), member.value[0])
        if fault is not None:
            return fault
    return None


def _pointer(path: Sequence[Step]) -> str:
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)
