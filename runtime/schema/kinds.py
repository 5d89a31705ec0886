"""What one schema object says about types, and other small questions that every rewriting asks of a part."""

from __future__ import annotations

from typing import Any, cast

Json = dict[str, Any]

#: Keywords that hold a part to values or to other schemas, whatever else stands beside them.
COMBINING = frozenset({"$ref", "$dynamicRef", "anyOf", "oneOf", "allOf", "enum", "const"})


def admits(part: Json, kind: str) -> bool:
    """Whether the ``type`` of a part leaves room for values of `kind`; ``number`` includes ``integer``."""
    given = part.get("type")
    if given is None:
        return True
    kinds = cast("list[str]", given if isinstance(given, list) else [given])
    return kind in kinds or (kind == "number" and "integer" in kinds)


def without(part: Json, *keywords: str) -> Json:
    """A part with some keywords left out, in its order."""
    return {key: value for key, value in part.items() if key not in keywords}


def whole(part: Json, *keywords: str) -> Json:
    """A part whose counts are integers: JSON Schema lets 2 be written 2.0, llguidance does not."""
    counts = {key: int(part[key]) for key in keywords if isinstance(part.get(key), float)}
    return {**part, **counts} if counts else part


def annotations(part: Json) -> Json:
    """What a part says that stays with it when the rest moves into branches."""
    kept = ("$schema", "$id", "$anchor", "$defs", "definitions", "title", "description")
    return {key: part[key] for key in kept if key in part}
