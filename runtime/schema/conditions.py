"""``if``, ``then``, ``else`` and what depends on a property being there, as ``anyOf``."""

from __future__ import annotations

from typing import cast

from agentkit.runtime.schema.parts import Json, Part

_CONDITIONS = ("if", "then", "else", "dependentRequired", "dependentSchemas")


def plain(part: Json) -> Json:
    """A part without conditions: what they say is in ``allOf``, in the words of ``anyOf`` and ``not``."""
    if not any(key in part for key in _CONDITIONS):
        return part
    conjuncts = [*part.get("allOf", ()), *_conditions(part)]
    rest = {key: value for key, value in part.items() if key not in _CONDITIONS}
    return {**rest, "allOf": conjuncts} if conjuncts else rest


def _conditions(part: Json) -> list[Part]:
    """What the conditions of a part say, one part each."""
    at = part.get("$at", "")
    found: list[Part] = []
    for name, names in part.get("dependentRequired", {}).items():
        if names:
            needed: Json = {"$at": at, "type": "object", "required": [name, *names]}
            found.append({"$at": at, "anyOf": [_without(name, at), needed]})
    for name, inner in part.get("dependentSchemas", {}).items():
        present: Json = {"$at": at, "type": "object", "required": [name]}
        found.append({"$at": at, "anyOf": [_without(name, at), {"$at": at, "allOf": [present, inner]}]})
    if "if" in part and ("then" in part or "else" in part):
        found.append(_choice(part["if"], part.get("then", {}), part.get("else", {}), at))
    elif "if" in part:  # which asks for nothing, but what it has looked at counts as evaluated
        found.append({"$at": at, "anyOf": [part["if"], {"$at": at, "not": part["if"], "$by": "if"}]})
    return found


def _without(name: str, at: str) -> Part:
    """Anything but an object with a property of this name."""
    return {"$at": at, "properties": {name: cast("Part", False)}}


def _choice(condition: Part, then: Part, otherwise: Part, at: str) -> Part:
    holds: Part = {"$at": at, "allOf": [condition, then]}
    fails: Part = {"$at": at, "not": condition, "$by": "if", "allOf": [otherwise]}
    return {"$at": at, "anyOf": [holds, fails]}
