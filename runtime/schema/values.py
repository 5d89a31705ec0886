"""Parts that list their values: ``enum`` and ``const``, of which the other keywords leave some."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import cast

from agentkit.runtime.schema.kinds import Json, satisfies, without
from agentkit.runtime.schema.numbers import EXACT, GREATEST
from agentkit.runtime.schema.report import Note

# Keywords that hold no schema: each listed value satisfies them or does not.
_PLAIN = (
    *("type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties", "required"),
)
# More values than these are left to llguidance: to judge one takes about 20 µs.
_JUDGED = 2000


def rewrite(part: Json, note: Note) -> Json:
    """A part with those of its listed values that its own keywords allow and that llguidance can write."""
    if "const" not in part and "enum" not in part:
        return part
    listed = cast("list[object]", part["enum"]) if "enum" in part else [part["const"]]
    plain = {key: part[key] for key in _PLAIN if key in part}
    if "enum" in part and "const" in part:
        plain["const"] = part["const"]
    kept = listed
    if plain and len(listed) <= _JUDGED:
        kept = [value for value in listed if satisfies(value, plain)]
        part = without(part, *plain, "const" if "enum" in part else "")
    writable = [value for value in kept if _writable(value)]
    if kept and not writable:
        return _near(part, kept, note)
    if len(writable) < len(kept):
        note("enum", "exact", "numbers that no 64 bits hold are left out.")
    if "enum" not in part and len(writable) == 1:
        return part
    return {**without(part, "const"), "enum": writable}


def _writable(value: object) -> bool:
    """Whether llguidance writes each number in `value` in digits that are read as that number."""
    match value:
        case bool() | None | str():
            return True
        case int():
            return abs(value) <= GREATEST and int(float(value)) == value
        case float():
            return abs(value) < EXACT or int(Decimal(repr(value))) == int(value)
        case list():
            return all(map(_writable, cast("list[object]", value)))
        case _:
            return all(map(_writable, cast("Json", value).values()))


def _near(part: Json, values: list[object], note: Note) -> Json:
    """Integers about the first of `values`, none of which can be written alone."""
    keyword = "enum" if "enum" in part else "const"
    value = values[0]
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > GREATEST:
        note(keyword, "refused", f"a number beyond {GREATEST:,} cannot be written. Use a string.")
        return part
    note(keyword, "verified", f"integers beyond {EXACT:,} are only enforced to the nearest float.")
    low, high = (int(math.nextafter(float(value), end)) for end in (-math.inf, math.inf))
    return {**without(part, "enum", "const"), "type": "integer", "minimum": low, "maximum": high}
