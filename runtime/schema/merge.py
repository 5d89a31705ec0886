"""The conjunction of two flat parts as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from agentkit.runtime.schema.backtracking import search
from agentkit.runtime.schema.parts import Json, Part, has_type, identity, types

_LEAST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_MOST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_ONE = ("multipleOf", "pattern", "format")  # two of a kind cannot be written as one
_APART = {"email", "ipv4", "ipv6"}  # formats that jsonschema checks in every draft, and no string has two of
_UNITED = ("$loose", "allOf")
_CONTAINS = ("contains", "minContains", "maxContains")
_OBJECT = ("properties", "patternProperties", "additionalProperties")


@dataclass(frozen=True, slots=True)
class Children:
    """What merging has to know of sub-schemas.

    Attributes:
        both: the conjunction of two parts, made when it is looked at.
        empty: whether nothing is known to satisfy a part.
    """

    both: Callable[[Part, Part], Part]
    empty: Callable[[Part], bool]


def meet(a: Json, b: Json, children: Children) -> Json | None:
    """What satisfies `a` and `b`; None if nothing does, as far as this can be seen.

    Properties come in the order of `a`, then that of `b`.
    """
    out: Json = {}
    rest: Json = {}
    _unite_leaves(a, b, out, rest)
    for key in ("contains", "propertyNames"):
        if key in a and key in b and a[key] != b[key]:
            rest |= {k: b[k] for k in (_CONTAINS if key == "contains" else (key,)) if k in b}
        else:
            given = a if key in a else b
            out |= {k: given[k] for k in (_CONTAINS if key == "contains" else (key,)) if k in given}
    if any(key in a for key in _OBJECT) and any(key in b for key in _OBJECT):
        if _mergeable(a, b) and _mergeable(b, a):
            _unite_objects(a, b, out, children)
        else:
            out |= {key: a[key] for key in _OBJECT if key in a}
            rest |= {key: b[key] for key in _OBJECT if key in b}
    else:
        out |= {key: part[key] for part in (a, b) for key in _OBJECT if key in part}
    _unite_arrays(a, b, out, children)
    if rest:
        out["allOf"] = (*out.get("allOf", ()), {"$at": b.get("$at", ""), **rest})
    if "$seen" in a or "$seen" in b:
        out["$seen"] = a["$seen"] | b["$seen"] if "$seen" in a and "$seen" in b else a.get("$seen") or b["$seen"]
    return out if possible(out, children, _doubtful(a, b, out)) else None


def _unite_leaves(a: Json, b: Json, out: Json, rest: Json) -> None:
    """Keywords without sub-schemas."""
    out["$at"] = a.get("$at") or b.get("$at", "")
    for key in (*a, *(key for key in b if key not in a)):
        if key in _LEAST or key in _MOST:
            given = [part[key] for part in (a, b) if key in part]
            out[key] = max(given) if key in _LEAST else min(given)
        elif key in _ONE:
            out[key] = a[key] if key in a else b[key]
            if key in a and key in b and a[key] != b[key]:
                rest[key] = b[key]
        elif key in _UNITED:
            out[key] = (*a.get(key, ()), *(member for member in b.get(key, ()) if member not in a.get(key, ())))
        elif key == "uniqueItems":
            out[key] = a.get(key) is True or b.get(key) is True
        elif key == "required":
            out[key] = list(dict.fromkeys([*a.get(key, ()), *b.get(key, ())]))
        elif key == "$except":
            out[key] = [*a.get(key, ()), *b.get(key, ())]
    if "type" in a or "type" in b:
        out["type"] = common_types(types(a), types(b))
    if "enum" in a or "enum" in b:
        out["enum"] = _common_values(a, b)


def common_types(a: list[str], b: list[str]) -> list[str]:
    """The types in both lists, integers being numbers."""
    both = [kind for kind in a if kind in b or (kind == "integer" and "number" in b)]
    return both + ["integer"] * ("number" in a and "integer" in b and "number" not in b and "integer" not in both)


def _common_values(a: Json, b: Json) -> list[Any]:
    if "enum" not in a or "enum" not in b:
        return a["enum"] if "enum" in a else b["enum"]
    others = {identity(value) for value in b["enum"]}
    return [value for value in a["enum"] if identity(value) in others]


def _mergeable(a: Json, b: Json) -> bool:
    """Whether what `b` says of properties that it does not name can be said of those of `a`'s patterns."""
    rest = b.get("additionalProperties", {})
    if rest == {} or not (foreign := a.get("patternProperties", {}).keys() - b.get("patternProperties", {}).keys()):
        return True
    if b.get("patternProperties"):
        return False
    # The conjunction of pattern and rest would also be asked of names that `b` does list.
    return not any(matches(pattern, name) for pattern in foreign for name in b.get("properties", {}))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is found in a name, as jsonschema sees it; True where Python cannot tell."""
    try:
        return search(pattern, name)
    except re.error:
        return True


def _doubtful(a: Json, b: Json, out: Json) -> list[Part]:
    """Sub-schemas of required properties that were not both there and asked for, either in `a` or in `b`."""
    found: list[Part] = []
    for name in out.get("required", ()):
        part = property_of(out, name)
        if not any(name in each.get("required", ()) and property_of(each, name) is part for each in (a, b)):
            found.append(part)
    return found


def _unite_objects(a: Json, b: Json, out: Json, children: Children) -> None:
    """Unite what is said of properties."""
    ours, theirs = a.get("properties", {}), b.get("properties", {})
    patterns_a, patterns_b = a.get("patternProperties", {}), b.get("patternProperties", {})
    rest_a, rest_b = a.get("additionalProperties", {}), b.get("additionalProperties", {})
    properties: dict[str, Part] = {}
    for name in (*ours, *(name for name in theirs if name not in ours)):
        one = ours[name] if name in ours else _of_rest(name, patterns_a, rest_a)
        two = theirs[name] if name in theirs else _of_rest(name, patterns_b, rest_b)
        properties[name] = children.both(one, two)
    if properties:
        out["properties"] = properties
    patterns: dict[str, Part] = {}
    for pattern in (*patterns_a, *(pattern for pattern in patterns_b if pattern not in patterns_a)):
        patterns[pattern] = children.both(
            patterns_a.get(pattern, rest_a),
            patterns_b.get(pattern, rest_b),
        )
    if patterns:
        out["patternProperties"] = patterns
    if "additionalProperties" in a or "additionalProperties" in b:
        out["additionalProperties"] = children.both(rest_a, rest_b)


def _of_rest(name: str, patterns: Mapping[str, Part], rest: Part) -> Part:
    """What is said of a property that is not named: nothing where a pattern does, which stays beside."""
    return {} if any(matches(pattern, name) for pattern in patterns) else rest


def _unite_arrays(a: Json, b: Json, out: Json, children: Children) -> None:
    if not ({"items", "prefixItems"} & a.keys() and {"items", "prefixItems"} & b.keys()):
        out |= {key: part[key] for part in (a, b) for key in ("prefixItems", "items") if key in part}
        return
    ours, theirs = a.get("prefixItems", ()), b.get("prefixItems", ())
    rest_a, rest_b = a.get("items", {}), b.get("items", {})
    prefix = [
        children.both(ours[i] if i < len(ours) else rest_a, theirs[i] if i < len(theirs) else rest_b)
        for i in range(max(len(ours), len(theirs)))
    ]
    if prefix:
        out["prefixItems"] = prefix
    if "items" in a or "items" in b:
        out["items"] = children.both(rest_a, rest_b)


def possible(flat: Json, children: Children, doubtful: list[Part]) -> bool:
    """Strike out of a flat part the types and values that its other keywords exclude; False if none is left.

    Args:
        flat: which is changed.
        doubtful: sub-schemas without which no object satisfies it.
    """
    if "enum" in flat:
        excluded = {identity(value) for value in flat.pop("$except", ())}
        flat["enum"] = [value for value in flat["enum"] if identity(value) not in excluded and may_be(value, flat)]
        if not flat["enum"]:
            return False
    kinds = types(flat)
    left = [kind for kind in kinds if _open(flat, kind)]
    if "object" in left and any(children.empty(part) for part in doubtful):
        left.remove("object")
    if "enum" in flat:
        left = [kind for kind in left if any(has_type(value, [kind]) for value in flat["enum"])]
    if left != kinds:
        flat["type"] = left
    return bool(left)


def _open(flat: Json, kind: str) -> bool:
    """Whether the bounds for one type leave anything."""
    match kind:
        case "integer" | "number":
            low = max(flat.get("minimum", -float("inf")), flat.get("exclusiveMinimum", -float("inf")))
            high = min(flat.get("maximum", float("inf")), flat.get("exclusiveMaximum", float("inf")))
            strict = low == flat.get("exclusiveMinimum") or high == flat.get("exclusiveMaximum")
            return low < high or (low == high and not strict)
        case "string":
            formats = {part["format"] for part in (flat, *flat.get("allOf", ())) if "format" in part}
            return flat.get("minLength", 0) <= flat.get("maxLength", float("inf")) and len(formats & _APART) < 2
        case "array":
            least = flat.get("minItems", 0)
            return least <= flat.get("maxItems", float("inf")) and not _missing_item(flat, least)
        case "object":
            if flat.get("minProperties", 0) > flat.get("maxProperties", float("inf")):
                return False
            return not any(property_of(flat, name) is False for name in flat.get("required", ()))
        case "boolean" if "$except" in flat:
            return not all(any(value is each for each in flat["$except"]) for value in (True, False))
        case "null" if "$except" in flat:
            return all(value is not None for value in flat["$except"])
        case _:
            return True


def _missing_item(flat: Json, least: int) -> bool:
    prefix = flat.get("prefixItems", ())
    return any(part is False for part in prefix[:least]) or (least > len(prefix) and flat.get("items") is False)


def property_of(flat: Json, name: str) -> Part:
    """What a flat part says of one property, the patterns it matches aside."""
    properties = flat.get("properties", {})
    if name in properties:
        return properties[name]
    for pattern, part in flat.get("patternProperties", {}).items():
        if matches(pattern, name):
            return part
    return flat.get("additionalProperties", {})


def may_be(value: object, flat: Json) -> bool:
    """Whether a value satisfies the keywords of a flat part that need no sub-schemas."""
    if not has_type(value, types(flat)):
        return False
    match value:
        case bool() | None:
            return True
        case int() | float():
            return (
                flat.get("minimum", value) <= value <= flat.get("maximum", value)
                and ("exclusiveMinimum" not in flat or value > flat["exclusiveMinimum"])
                and ("exclusiveMaximum" not in flat or value < flat["exclusiveMaximum"])
            )
        case str():
            return flat.get("minLength", 0) <= len(value) <= flat.get("maxLength", len(value)) and (
                "pattern" not in flat or matches(flat["pattern"], value)
            )
        case list():
            return flat.get("minItems", 0) <= len(cast("list[object]", value)) <= flat.get("maxItems", 10**9)
        case _:
            members = cast("Json", value)
            return all(name in members for name in flat.get("required", ())) and not any(
                property_of(flat, name) is False for name in members
            )
