"""``$except``: values that a flat part does not allow, in keywords that a grammar can enforce."""

from __future__ import annotations

from typing import Any, cast

from agentkit.runtime.schema.parts import Json, has_type, identity, types
from agentkit.runtime.schema.report import Finding

#: Characters of excluded strings of which a pattern is made.
_CHARACTERS = 4096


def spread(flat: Json) -> list[Json]:
    """A flat part without ``$except``, as one part for each type that has excluded values and one for the others."""
    excluded: list[Any] | None = flat.get("$except")
    if excluded is None:
        return [flat]
    rest = {key: value for key, value in flat.items() if key != "$except"}
    excluded = [value for value in excluded if has_type(value, types(flat))]
    if not excluded:
        return [rest]
    kinds = types(flat)
    touched = [kind for kind in kinds if any(has_type(value, [kind]) for value in excluded)]
    others = [kind for kind in kinds if kind not in touched]
    parts = [{**rest, "type": others}] if others else []
    for kind in touched:
        values = [value for value in excluded if has_type(value, [kind])]
        parts += _without({**rest, "type": [kind]}, kind, values)
    return parts


def _without(part: Json, kind: str, values: list[Any]) -> list[Json]:
    match kind:
        case "null":
            return []
        case "boolean":
            left = [value for value in (True, False) if not any(value is each for each in values)]
            return [{**part, "enum": left}] if left else []
        case "string" if sum(map(len, values)) <= _CHARACTERS:
            return [
                {**part, "allOf": (*part.get("allOf", ()), {"$at": part.get("$at", ""), "pattern": other_than(values)})}
            ]
        case "integer" | "number":
            return _gaps(part, kind, values)
        case "array" if values == [[]]:
            return [{**part, "minItems": max(1, part.get("minItems", 0))}]
        case "object" if values == [{}]:
            return [{**part, "minProperties": max(1, part.get("minProperties", 0))}]
        case _:
            loose = Finding(
                part.get("$at", ""), "not", "verified", f"excluding these values of type {kind} is not a grammar."
            )
            return [{**part, "$loose": (*part.get("$loose", ()), loose)}]


def _gaps(part: Json, kind: str, values: list[Any]) -> list[Json]:
    """The ranges between excluded numbers."""
    found: list[Json] = []
    distinct = sorted({identity(value): value for value in values}.values())
    for low, high in zip([None, *distinct], [*distinct, None], strict=True):
        piece = dict(part)
        if low is not None:
            _raise(piece, low, kind)
        if high is not None:
            _lower(piece, high, kind)
        least, most = piece.get("minimum"), piece.get("maximum")
        if kind != "integer" or least is None or most is None or least <= most:
            found.append(piece)
    return found


def _raise(part: Json, value: Any, kind: str) -> None:
    if kind == "integer":
        part["minimum"] = max(part.get("minimum", value + 1), int(value) + 1)
    elif part.get("minimum", value) <= value:
        part["exclusiveMinimum"] = max(part.get("exclusiveMinimum", value), value)
        part.pop("minimum", None)


def _lower(part: Json, value: Any, kind: str) -> None:
    if kind == "integer":
        part["maximum"] = min(part.get("maximum", value - 1), int(value) - 1)
    elif part.get("maximum", value) >= value:
        part["exclusiveMaximum"] = min(part.get("exclusiveMaximum", value), value)
        part.pop("maximum", None)


def other_than(words: list[str]) -> str:
    """A pattern, anchored, of all strings but some: where one leaves the tree of the words, or stops too early."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return f"^{_other(tree)}$"


def _other(tree: dict[str, Any]) -> str:
    branches = [_character(c) + _other(cast("dict[str, Any]", node)) for c, node in tree.items() if c]
    first = "".join(map(_character, filter(None, tree)))
    branches.append(f"[^{first}](.|\\n)*" if first else "(.|\\n)+")
    return f"({'|'.join(branches)}){'' if '' in tree else '?'}"


def _character(c: str) -> str:
    return c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}"
