"""Whether a schema is plainly a valid one.

Validating a schema against its metaschema takes jsonschema some milliseconds, a hundred tools a fifth of a second.
Nearly all schemas hold a few keywords with nothing special about them, which is seen in microseconds; only the others
need the metaschema, which also says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

_TYPES = {"string", "integer", "number", "boolean", "null", "array", "object"}
_DRAFTS = re.compile(r"https?://json-schema\.org/(draft-0[67]|draft/20(19-09|20-12))/schema#?")
_REFERENCE = re.compile(r"#(/[\w$.-]+)*")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, cast("list[Any]", value))) and _distinct(cast("list[Any]", value))


def _distinct(values: list[Any]) -> bool:
    return len(set(values)) == len(values)


def _kind(value: Any) -> bool:
    if isinstance(value, str):
        return value in _TYPES
    return _names(value) and bool(value) and set(value) <= _TYPES


def _pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, OverflowError, RecursionError):
        return False
    return True


def _schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(sound, cast("list[Any]", value)))


def _members(value: Any) -> bool:
    return isinstance(value, dict) and all(map(sound, cast("dict[str, Any]", value).values()))


def _any(value: Any) -> bool:
    return True


_KEYWORDS: dict[str, Callable[[Any], bool]] = {
    "$schema": lambda value: isinstance(value, str) and _DRAFTS.fullmatch(value) is not None,
    "$ref": lambda value: isinstance(value, str) and _REFERENCE.fullmatch(value) is not None,
    "type": _kind,
    "const": _any,
    "default": _any,
    "enum": lambda value: isinstance(value, list) and bool(value) and all(map(_text, value)) and _distinct(value),
    "examples": lambda value: isinstance(value, list),
    "uniqueItems": lambda value: isinstance(value, bool),
    "items": lambda value: sound(value),
    "additionalProperties": lambda value: sound(value),
    "required": _names,
    "pattern": _pattern,
    **dict.fromkeys(("title", "description", "format"), _text),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _number),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _size),
    **dict.fromkeys(("anyOf", "allOf", "oneOf"), _schemas),
    **dict.fromkeys(("properties", "$defs", "definitions"), _members),
}


def sound(schema: object) -> bool:
    """True only if `schema` is valid in each draft from 6 to 2020-12; False where that would take a closer look."""
    if not isinstance(schema, dict):
        return isinstance(schema, bool)
    members = cast("dict[str, Any]", schema)
    return all(key in _KEYWORDS and _KEYWORDS[key](value) for key, value in members.items())
