"""Bounds of our own, so that no document grows without end."""

from __future__ import annotations

from typing import cast

from agentkit.runtime.schema.parts import LISTS, MAPS, SINGLES, Json

#: Defaults for what a schema leaves open.
MAX_ITEMS, MAX_INTEGER, MAX_NUMBER, RESOLUTION = 1024, 10**18, 10**15, 1e-9
_COMBINING = {"$ref", "anyOf", "enum"}

_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = r"(([0-9]{2}(0[48]|[2468][048]|[13579][26]))|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    rf"|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
# llguidance's own let through days that no month has, and any number of digits of a second.
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


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
            elif kind == "string":
                _bound_string(copy)
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


def _bound_string(part: Json) -> None:
    """Exact patterns for dates and times. Lengths are left alone: a bound makes a mask cost twenty times as much, and
    the budget ends a string as well (`closing.Closer`)."""
    if part.get("format") in _PATTERNS and "pattern" not in part:
        part["pattern"] = _PATTERNS[part.pop("format")]
