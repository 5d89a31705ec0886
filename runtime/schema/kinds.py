"""What one schema object says about types, and other small questions that every rewriting asks of a part."""

from __future__ import annotations

from typing import Any, cast

from jsonschema import Draft202012Validator

from agentkit.runtime.schema.backtracking import Patient

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


def lasting(part: Json) -> Json:
    """What a part says that stays with it when the rest moves into branches."""
    kept = ("$schema", "$id", "$anchor", "$defs", "definitions", "title", "description")
    return {key: part[key] for key in kept if key in part}


# Keywords of which llguidance intersects two schemas seldom or never.
_CONFLICTING = {"patternProperties", "minProperties", "maxProperties", "$ref", "$dynamicRef"}


def met(schemas: list[object]) -> object | None:
    """A schema for what satisfies all of `schemas`; None if llguidance has no conjunction of them."""
    distinct = [schema for i, schema in enumerate(schemas) if schema not in schemas[:i] and schema not in (True, {})]
    if False in distinct:
        return False
    if len(distinct) < 2:
        return distinct[0] if distinct else True
    return None if any(map(_conflicts, distinct)) else {"allOf": distinct}


def _conflicts(value: object) -> bool:
    """Whether one of those keywords, or a name that reads like one, stands anywhere inside."""
    if isinstance(value, dict):
        inner = cast("Json", value)
        return not _CONFLICTING.isdisjoint(inner) or any(map(_conflicts, inner.values()))
    return isinstance(value, list) and any(map(_conflicts, cast("list[object]", value)))


def satisfies(value: object, schema: Json) -> bool:
    """Whether jsonschema finds a value valid, formats included."""
    judge = Patient(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return bool(judge.is_valid(value))
