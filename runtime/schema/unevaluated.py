"""``unevaluatedProperties`` and ``unevaluatedItems``, where it is known what has been evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from agentkit.runtime.schema.parts import Json, Part

_REST = ("additionalProperties", "unevaluatedProperties")


@dataclass(frozen=True, slots=True)
class Seen:
    """What the keywords of a flat part have evaluated in an object, and in an array.

    Attributes:
        names, patterns: of properties.
        others: all other properties.
        prefix: leading items.
        items: all items.
        unsure: some items more, which cannot be told beforehand (``contains``).
    """

    names: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    others: bool = False
    prefix: int = 0
    items: bool = False
    unsure: bool = False

    def __or__(self, other: Seen) -> Seen:
        return Seen(
            self.names | other.names,
            tuple(dict.fromkeys(self.patterns + other.patterns)),
            self.others or other.others,
            max(self.prefix, other.prefix),
            self.items or other.items,
            self.unsure or other.unsure,
        )


ALL = Seen(others=True, items=True)


def seen_by(part: Json) -> Seen:
    """What a part's own keywords evaluate; everything, where it is not known what the part says."""
    unknown = "$loose" in part
    return Seen(
        frozenset(part.get("properties", ())),
        tuple(part.get("patternProperties", ())),
        unknown or any(key in part for key in _REST),
        len(part.get("prefixItems", ())),
        unknown or "items" in part or "unevaluatedItems" in part,
        "contains" in part,
    )


def close(flat: Json, properties: Part | None, items: Part | None) -> Json:
    """What is asked of the properties and items of `flat` that its ``$seen`` leaves out, as a part to be met with it.

    Raises:
        ValueError: which items are left out is not known.
    """
    seen: Seen = flat["$seen"]
    asked: Json = {"$at": flat.get("$at", "")}
    if properties is not None and not seen.others:
        if seen.names:
            asked["properties"] = {name: cast("Part", {}) for name in flat.get("properties", ()) if name in seen.names}
        if seen.patterns:
            asked["patternProperties"] = {pattern: cast("Part", {}) for pattern in seen.patterns}
        asked["additionalProperties"] = properties
    if items is not None and not seen.items:
        if seen.unsure:
            raise ValueError("items found by `contains` count as evaluated")
        if seen.prefix:
            asked["prefixItems"] = [cast("Part", {})] * seen.prefix
        asked["items"] = items
    return asked
