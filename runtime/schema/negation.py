"""What does not satisfy a part, as a part, by De Morgan's laws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, Protocol, cast

from agentkit.runtime.schema.conditions import plain
from agentkit.runtime.schema.parts import TYPES, Json, Part, name_of, trivial
from agentkit.runtime.schema.report import Finding

#: References followed in one place, and branches of a ``oneOf`` of which pairs are taken.
_DEPTH, _BRANCHES = 3, 6


class Names(Protocol):
    """Where named parts are looked up."""

    def part(self, name: str) -> Part:
        """The part of this name."""
        ...

    def inverse(self, name: str, loose: Finding) -> Part:
        """Its complement, always the same object, which need not be looked at yet."""
        ...


def negate(part: Part, names: Names, loose: Finding, depth: int = _DEPTH) -> Part:
    """The complement of a part, or something wider, which then has `loose` among its findings.

    Args:
        part: in normal form, with nothing left out of it: what is wider inside a negation is narrower outside.
        names: looks named parts up.
        loose: says which keyword of the user's schema is not enforced to the letter.
        depth: references that are still followed. Sub-schemas that are one are left to whoever looks at them.
    """
    if part is False:
        return {}
    if "$loose" in part:
        return {"$loose": (loose,)}
    part = plain(part)
    alternatives: list[Part] = []
    for key, value in part.items():
        if key not in ("$at", "minContains", "maxContains"):
            alternatives += _violations(key, value, part, names, loose, depth)
    if not alternatives:
        return False
    return alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}


def _violations(key: str, value: Any, part: Json, names: Names, loose: Finding, depth: int) -> Iterator[Part]:
    """Parts that together allow what violates one keyword."""

    def inverse(inner: Part) -> Part:
        return negate(inner, names, loose, depth)

    def other(inner: Part) -> Part:
        return inverse(inner) if (name := name_of(inner)) is None else names.inverse(name, loose)

    match key:
        case "$ref":
            yield negate(names.part(value), names, loose, depth - 1) if depth else {"$loose": (loose,)}
        case "allOf":
            yield from map(inverse, value)
        case "anyOf":
            yield {"allOf": list(map(inverse, value))}
        case "oneOf":
            yield {"allOf": list(map(inverse, value))}
            if len(value) <= _BRANCHES:
                yield from ({"allOf": list(pair)} for pair in combinations(cast("list[Part]", value), 2))
            else:
                yield {"$loose": (loose,)}
        case "not":
            yield value
        case "type":
            yield _other_types([value] if isinstance(value, str) else value, loose)
        case "enum":
            yield {"$except": value}
        case "required":
            yield from ({"type": "object", "properties": {name: False}} for name in value)
        case "properties":
            for name, inner in value.items():
                yield {"type": "object", "required": [name], "properties": {name: other(inner)}}
        case "items":
            yield from _other_item(value, part, other, loose)
        case "prefixItems":
            for i, inner in enumerate(value):
                yield {"type": "array", "minItems": i + 1, "prefixItems": [*[{}] * i, other(inner)]}
        case "contains" if "maxContains" not in part and part.get("minContains", 1) == 1:
            yield {"type": "array", "items": other(value)}
        case "pattern" if not value.startswith("(?"):  # flags have to come first
            yield {"type": "string", "pattern": rf"^(?![\s\S]*(?:{value}))"}
        case _:
            yield from _bound(key, value, loose)


def _bound(key: str, value: Any, loose: Finding) -> Iterator[Part]:
    """What violates a keyword without sub-schemas that is about one type."""
    opposite: dict[str, tuple[str, str, int]] = {
        "minLength": ("string", "maxLength", -1),
        "maxLength": ("string", "minLength", 1),
        "minItems": ("array", "maxItems", -1),
        "maxItems": ("array", "minItems", 1),
        "minProperties": ("object", "maxProperties", -1),
        "maxProperties": ("object", "minProperties", 1),
        "minimum": ("number", "exclusiveMaximum", 0),
        "maximum": ("number", "exclusiveMinimum", 0),
        "exclusiveMinimum": ("number", "maximum", 0),
        "exclusiveMaximum": ("number", "minimum", 0),
    }
    only = {"pattern": "string", "format": "string", "multipleOf": "number", "uniqueItems": "array"}
    if key in opposite:
        kind, other, step = opposite[key]
        if not (step == -1 and value <= 0):
            yield {"type": kind, other: value + step}
    elif key == "uniqueItems" and value is not True:
        return
    elif key in ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"):
        if not isinstance(value, dict) or cast("Json", value).keys() - {"$at"}:
            yield {"type": "object", "minProperties": 1, "$loose": (loose,)}
    elif key in ("contains", "unevaluatedItems"):
        yield {"type": "array", "$loose": (loose,)}
    else:
        yield {"type": only[key], "$loose": (loose,)} if key in only else {"$loose": (loose,)}


def _other_types(kinds: list[str], loose: Finding) -> Part:
    rest = [kind for kind in TYPES if kind not in kinds and kind != "integer"]
    if "integer" in kinds and "number" in rest:
        # A number that is no integer has no type of its own.
        return {"anyOf": [{"type": [k for k in rest if k != "number"]}, {"type": "number", "$loose": (loose,)}]}
    return {"type": rest} if rest else False


def _other_item(value: Part, part: Json, other: Callable[[Part], Part], loose: Finding) -> Iterator[Part]:
    """One item behind the prefix is another one."""
    prefix = len(part.get("prefixItems", ()))
    if value is False:
        yield {"type": "array", "minItems": prefix + 1}
    elif not trivial(value):
        found: Json = {"type": "array", "minItems": prefix + 1}
        yield {**found, "contains": other(value)} if not prefix else {**found, "$loose": (loose,)}
