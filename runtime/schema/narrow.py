"""Bounds of our own, so that no document grows without end.

Lengths of strings are left alone: a bound makes a mask cost twenty times as much, and the budget ends a string as well
(`closing.Closer`).
"""

from __future__ import annotations

from typing import cast

from agentkit.runtime.schema.parts import LISTS, MAPS, SINGLES, Json

#: Defaults for what a schema leaves open.
MAX_ITEMS, MAX_INTEGER, MAX_NUMBER, RESOLUTION = 1024, 10**18, 10**15, 1e-9
_COMBINING = {"$ref", "anyOf", "enum"}


def narrow(schema: Json) -> Json:
    """A copy in which numbers and arrays are bounded. It admits less than `schema`, never more.

    Args:
        schema: without keywords under which less would be more (``not``, ``oneOf``).
    """
    copy: Json = {}
    for key, value in schema.items():
        if (key in MAPS or key == "$defs") and isinstance(value, dict):
            copy[key] = {name: _narrowed(member) for name, member in cast("Json", value).items()}
        elif key in LISTS and isinstance(value, list):
            copy[key] = [_narrowed(member) for member in cast("list[object]", value)]
        elif key in SINGLES:
            copy[key] = _narrowed(value)
        else:
            copy[key] = value
    if _COMBINING.isdisjoint(copy):
        kinds = copy.get("type")
        for kind in cast("list[str]", kinds if isinstance(kinds, list) else [kinds]):
            if kind in ("number", "integer"):
                _bound_number(copy, kind)
            elif kind == "array":
                copy.setdefault("maxItems", max(MAX_ITEMS, int(copy.get("minItems", 0))))
    return copy


def _narrowed(value: object) -> object:
    return narrow(cast("Json", value)) if isinstance(value, dict) else value


def _bound_number(part: Json, kind: str) -> None:
    """Bounds on both sides and, for a fraction, on its digits; both written without an exponent."""
    given = [part[k] for k in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if k in part]
    limit = MAX_INTEGER if kind == "integer" else MAX_NUMBER
    if any(abs(value) >= limit for value in given):
        return
    if "minimum" not in part and "exclusiveMinimum" not in part:
        part["minimum"] = -limit
    if "maximum" not in part and "exclusiveMaximum" not in part:
        part["maximum"] = limit
    if kind == "number" and "multipleOf" not in part and all(round(v, 6) == v for v in given):
        part["multipleOf"] = RESOLUTION
