"""A JSON document as a tree, and of each of its leaves where its source has it and how sure the model was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

_DECODER = json.JSONDecoder()
_BLANK = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What stands behind one value of a record.

    Attributes:
        span: where the text has the value, ``(start, end)`` in characters, so that ``text[start:end]`` is how the text
            writes it; None where it does not have it.
        confidence: how likely the model was to write just this value where it stands, between 0 and 1: the product of
            the probabilities of its tokens (`agentkit.confidence`).
    """

    span: tuple[int, int] | None
    confidence: float


@dataclass(frozen=True, slots=True)
class Leaf:
    """A string, a number, true, false or null, and what stands behind it."""

    value: str | int | float | bool | None
    evidence: Evidence


#: A document: its objects and arrays are Python's own.
Node = Leaf | dict[str, "Node"] | list["Node"]


@dataclass(frozen=True, slots=True)
class Written:
    """A leaf as the document writes it: ``text[start:end]``."""

    value: str | int | float | bool | None
    start: int
    end: int


def read(text: str, leaf: Callable[[Written], Leaf]) -> Node:
    """The tree of a JSON document.

    Args:
        text: one valid document; of a key that stands twice in an object the last value is taken.
        leaf: makes each leaf, called in the order of the text.
    """
    return _value(text, 0, leaf)[0]


def _value(text: str, at: int, leaf: Callable[[Written], Leaf]) -> tuple[Node, int]:
    """The value that begins at or behind ``at``, and where it ends."""
    at = _skip(text, at)
    if text[at] == "{":
        members: dict[str, Node] = {}
        at = _skip(text, at + 1)
        while text[at] != "}":
            key, at = _DECODER.raw_decode(text, _skip(text, at + (text[at] == ",")))
            members[key], at = _value(text, _skip(text, at) + 1, leaf)
            at = _skip(text, at)
        return members, at + 1
    if text[at] == "[":
        items: list[Node] = []
        at = _skip(text, at + 1)
        while text[at] != "]":
            item, at = _value(text, at + (text[at] == ","), leaf)
            items.append(item)
            at = _skip(text, at)
        return items, at + 1
    value, end = _DECODER.raw_decode(text, at)
    return leaf(Written(value, at, end)), end


def _skip(text: str, at: int) -> int:
    while text[at] in _BLANK:
        at += 1
    return at


def plain(node: Node) -> Any:
    """The document as JSON values."""
    if isinstance(node, Leaf):
        return node.value
    if isinstance(node, dict):
        return {key: plain(member) for key, member in node.items()}
    return [plain(item) for item in node]


def evidence(node: Node) -> dict[str, Evidence]:
    """What stands behind each leaf, by its JSON pointer (RFC 6901)."""
    found: dict[str, Evidence] = {}
    _collect(node, "", found)
    return found


def _collect(node: Node, pointer: str, found: dict[str, Evidence]) -> None:
    if isinstance(node, Leaf):
        found[pointer] = node.evidence
        return
    members = cast("Mapping[str | int, Node]", node if isinstance(node, dict) else dict(enumerate(node)))
    for key, member in members.items():
        _collect(member, pointer + step(key), found)


def step(key: str | int) -> str:
    """One more step of a JSON pointer."""
    return "/" + str(key).replace("~", "~0").replace("/", "~1")


def certainty(node: Node) -> float:
    """The least confidence of the leaves in a node; 1 where there are none."""
    if isinstance(node, Leaf):
        return node.evidence.confidence
    return min(map(certainty, node.values() if isinstance(node, dict) else node), default=1.0)
