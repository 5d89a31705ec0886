"""A quick look at whether a schema is one.

jsonschema answers by validating it against its metaschema, which took most of the time of a compilation (2 of 3 ms for
a tool). Nearly every schema is plainly valid, and only where this is not seen at a glance is jsonschema asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import jsonschema

from agentkit.runtime.schema.drafts import Dialect
from agentkit.runtime.schema.parts import TYPES, Json, identity

_DRAFT4 = jsonschema.Draft4Validator
_NAME = re.compile(r"[A-Za-z_][-A-Za-z0-9._]*")
_TYPES = frozenset(TYPES)


def plainly_valid(value: object, dialect: Dialect) -> bool:
    """Whether `value` is certainly a valid schema of a draft. False says nothing."""
    if not isinstance(value, dict):
        return isinstance(value, bool) and dialect is not _DRAFT4
    for key, inner in cast("Json", value).items():
        check = _LEAVES.get(key)
        if check is not None:
            if not check(inner):
                return False
        elif key in _SCHEMAS:
            if not (plainly_valid(inner, dialect) or (isinstance(inner, bool) and key in _SWITCHES)):
                return False
        elif key in _MAPS:
            if not _map(key, inner, dialect):
                return False
        elif key in _LISTS:
            if not _list(inner, dialect):
                return False
        elif key == "items":
            if not (plainly_valid(inner, dialect) or (dialect in _TUPLES and _list(inner, dialect))):
                return False
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            if dialect is _DRAFT4 or not _number(inner):
                return False
        elif key in _RARE:
            return False
    return True


def _map(key: str, value: object, dialect: Dialect) -> bool:
    if not isinstance(value, dict):
        return False
    members = cast("Json", value)
    if key == "patternProperties" and not all(map(_pattern, members)):
        return False
    if key == "dependentRequired":
        return all(map(_names, members.values()))
    return all(
        plainly_valid(member, dialect) or (key == "dependencies" and _names(member)) for member in members.values()
    )


def _list(value: object, dialect: Dialect) -> bool:
    return (
        isinstance(value, list)
        and bool(cast("list[object]", value))
        and all(plainly_valid(member, dialect) for member in cast("list[object]", value))
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _names(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    names = cast("list[object]", value)
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _type(value: object) -> bool:
    return value in TYPES if isinstance(value, str) else _names(value) and _TYPES.issuperset(cast("list[str]", value))


def _pattern(value: object) -> bool:
    try:
        re.compile(cast("str", value))
    except (re.error, RecursionError, OverflowError, TypeError):
        return False
    return True


def _values(value: object) -> bool:
    values = cast("list[object]", value) if isinstance(value, list) else []
    return bool(values) and len({identity(each) for each in values}) == len(values)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _flag(value: object) -> bool:
    return isinstance(value, bool)


_LEAVES: dict[str, Callable[[Any], bool]] = {
    "type": _type,
    "enum": _values,
    "required": _names,
    "pattern": _pattern,
    "multipleOf": lambda value: _number(value) and value > 0,
    "minimum": _number,
    "maximum": _number,
    "examples": lambda value: isinstance(value, list),
    "$id": lambda value: isinstance(value, str) and "#" not in value,
    "$anchor": lambda value: isinstance(value, str) and _NAME.fullmatch(value) is not None,
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _count),
    **dict.fromkeys(("minContains", "maxContains"), _count),
    **dict.fromkeys(("uniqueItems", "readOnly", "writeOnly", "deprecated"), _flag),
    **dict.fromkeys(("$ref", "$schema", "$comment", "id", "title", "description", "format"), _text),
    **dict.fromkeys(("contentEncoding", "contentMediaType"), _text),
}
_SWITCHES = ("additionalProperties", "additionalItems")
_SCHEMAS = frozenset(
    (*_SWITCHES, "contains", "propertyNames", "not", "if", "then", "else", "unevaluatedItems", "unevaluatedProperties")
)
_MAPS = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependentRequired", "dependencies")
)
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
_TUPLES = (jsonschema.Draft4Validator, jsonschema.Draft6Validator, jsonschema.Draft7Validator)
_RARE = frozenset(
    ("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary", "contentSchema", "extends")
)
