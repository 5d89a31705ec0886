"""Arrays: distinct items and items of which some must be of a kind, in the few forms llguidance has."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any, cast

from agentkit.runtime.schema.kinds import COMBINING, Json, admits, lasting, met, satisfies, whole, without
from agentkit.runtime.schema.report import Note

_KEYWORDS = ("prefixItems", "items", "minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains")

# Items in all orders of a few values, each of which is a branch of its own. All 24 orders of 4 values are 96 items:
# 3.4 ms to compile, masks of 15 µs. 5 values would take 24 ms, 6 values 208 ms and masks of some milliseconds.
_WRITTEN = 200
# Places that are tried for an item that must be there; each is a branch as long as its number.
_PLACES = 8


def rewrite(part: Json, note: Note) -> Json:
    """A part whose array keywords llguidance takes."""
    if not any(key in part for key in _KEYWORDS):
        return part
    if not admits(part, "array"):
        return without(part, *_KEYWORDS)
    part = whole(part, "minItems", "maxItems", "minContains", "maxContains")
    part = _unique(part, note)
    return _contains(part, note)


def _contains(part: Json, note: Note) -> Json:
    """``contains`` by the places that the item may have, where those are few."""
    if "contains" not in part:
        return without(part, "minContains", "maxContains")
    wanted, least, most = part["contains"], part.get("minContains", 1), part.get("maxContains")
    rest = without(part, "contains", "minContains", "maxContains")
    if wanted is True or wanted == {} or _every_item(rest, wanted):
        return _at_least(rest, least, most)
    if wanted is False:
        return {**rest, "minItems": 1, "maxItems": 0} if least else rest  # no array at all
    if most is not None:
        note("maxContains", "verified", "the items of one kind are not counted while decoding.")
    if least == 0:
        return rest
    places = rest.get("maxItems")
    if least > 1 or places is None or places > _PLACES or not COMBINING.isdisjoint(part):
        reason = "that an item of this kind is there cannot be enforced in an array of any length."
        note("contains", "verified", reason)
        return _at_least(rest, least, None)
    prefix = cast("list[Any]", rest.get("prefixItems", []))
    branches = [_with_item(rest, prefix, wanted, at) for at in range(places)]
    if None in branches:
        note("contains", "verified", "what an item of this kind and of the array's is has no grammar.")
        return _at_least(rest, least, None)
    return {"anyOf": [*branches, *_others(part)], **lasting(part)}


def _every_item(part: Json, wanted: object) -> bool:
    return "prefixItems" not in part and part.get("items") == wanted


def _at_least(part: Json, least: int, most: int | None) -> Json:
    """A part with bounds on its number of items that are no wider than given."""
    bounds: Json = {}
    if least > part.get("minItems", 0):
        bounds["minItems"] = least
    if most is not None:
        bounds["maxItems"] = min(most, part.get("maxItems", most))
    return {**part, **bounds}


def _with_item(part: Json, prefix: list[Any], wanted: Json, at: int) -> Json | None:
    """Arrays whose item at one place is also a `wanted` one; None if that cannot be said."""
    items = part.get("items", True)
    places = [prefix[i] if i < len(prefix) else items for i in range(max(at + 1, len(prefix)))]
    places[at] = met([places[at], wanted])
    if places[at] is None:
        return None
    least = max(at + 1, part.get("minItems", 0))
    return {**without(part, *lasting(part)), "type": "array", "prefixItems": places, "minItems": least}


def _others(part: Json) -> list[Json]:
    """Values of the part's other types: its array keywords say nothing about them."""
    kinds = part.get("type", ["null", "boolean", "number", "string", "object"])
    others = [kind for kind in (cast("list[str]", kinds) if isinstance(kinds, list) else [kinds]) if kind != "array"]
    plain = without(part, *_KEYWORDS, *lasting(part))
    return [{**plain, "type": others}] if others else []


def _unique(part: Json, note: Note) -> Json:
    """``uniqueItems`` by writing the arrays out, where those are few."""
    unique = part.get("uniqueItems")
    part = without(part, "uniqueItems")
    most = part.get("maxItems")
    if not unique or (most is not None and most <= 1):
        return part
    alone = COMBINING.isdisjoint(part) and "prefixItems" not in part and "contains" not in part
    values = _values(part.get("items")) if alone else None
    if values is not None:
        length = len(values) if most is None else min(len(values), most)
        if math.perm(len(values), length) * length <= _WRITTEN:
            return _written_out(part, values, length)
        part = {**part, "maxItems": length}
    note("uniqueItems", "verified", "items are not compared while decoding.")
    return part


def _values(items: object) -> list[object] | None:
    """All values that an item may have, distinct; None where they are not few and known."""
    if not isinstance(items, dict):
        return None
    schema = cast("Json", items)
    if "const" in schema:
        given: list[object] = [schema["const"]]
    elif "enum" in schema:
        given = list(cast("list[object]", schema["enum"]))
    elif schema.get("type") == "boolean":
        given = [True, False]
    elif schema.get("type") == "null":
        given = [None]
    else:
        return None
    if set(schema) - {"enum", "const", "type", "title", "description", "default", "examples"} or len(given) > 512:
        return None
    kinds: Json = {"type": schema["type"]} if "type" in schema else {}
    found: list[object] = []
    for value in given:
        if satisfies(value, kinds) and not satisfies(value, {"enum": found}):
            found.append(value)
    return found


def _written_out(part: Json, values: list[object], length: int) -> Json:
    """The orders of `length` of the values, each of which may end early."""
    least = part.get("minItems", 0)
    branches: list[Json] = [
        {
            "type": "array",
            "prefixItems": [{"const": value} for value in order],
            "items": False,
            "minItems": least,
            "maxItems": length,
        }
        for order in permutations(values, length)
    ]
    if least > length:
        branches = [{"type": "array", "minItems": least, "maxItems": length}]  # no array at all
    return {"anyOf": [*branches, *_others(part)], **lasting(part)}
