"""The normal form of a schema, on which all rewritings work.

A *part* is one schema with the keywords of draft 2020-12, annotations left out, every ``$ref`` of the form
``{"$ref": name}`` to one of the named parts of the same document, and ``True`` written as ``{}``. A part is never
changed once made, so that its identity may stand for it. Private keywords beside JSON Schema's own:

``$at``      pointer of the user's schema that the part comes from.
``$except``  values that are not allowed, as in ``{"not": {"enum": [...]}}``.
``$loose``   findings: where, and by which keyword, the part is wider than what it stands for.
``$seen``    what ``unevaluatedProperties`` and ``unevaluatedItems`` would take as evaluated (`unevaluated.Seen`).

A *flat* part has no combinator but ``allOf``, whose members are what could not be merged into it; or it is a ``$ref``
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

Json = dict[str, Any]
Part = dict[str, Any] | Literal[False]

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
#: Keywords whose values are schemas: by name, in a list, alone.
MAPS = ("properties", "patternProperties", "dependentSchemas")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLES = (
    "items",
    "additionalProperties",
    "contains",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
    "unevaluatedItems",
    "unevaluatedProperties",
)
PRIVATE = ("$at", "$except", "$loose", "$seen")


def pointer(path: Sequence[str | int]) -> str:
    """A path as a JSON pointer."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)


def trivial(part: Part) -> bool:
    """Whether a part allows everything, to the letter."""
    return part is not False and part.keys() <= {"$at"}


def name_of(part: Part) -> str | None:
    """The name in a part that is a ``$ref`` alone."""
    return part["$ref"] if part is not False and "$ref" in part and part.keys() <= {"$ref", "$at"} else None


def is_loose(part: object) -> bool:
    """Whether a part, or a sub-schema of it that is not behind a reference, is wider than what it stands for."""
    if isinstance(part, dict):
        members = cast("Json", part)
        return bool(members.get("$loose")) or any(map(is_loose, members.values()))
    return isinstance(part, list) and any(map(is_loose, cast("list[object]", part)))


def types(part: Json) -> list[str]:
    """The types a part allows; ``number`` stands for ``integer`` as well."""
    kinds = part.get("type")
    if kinds is None:
        return [kind for kind in TYPES if kind != "integer"]
    return [kinds] if isinstance(kinds, str) else cast("list[str]", kinds)


def kind_of(value: object) -> str:
    """The narrowest type of a JSON value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def has_type(value: object, kinds: Sequence[str]) -> bool:
    """Whether a value is of one of several types."""
    kind = kind_of(value)
    return kind in kinds or (kind == "integer" and "number" in kinds)


def identity(value: object) -> object:
    """A key that is equal for values that are equal in JSON: 1 and 1.0 are, 1 and true are not."""
    match value:
        case bool():
            return ("boolean", value)
        case list():
            return ("array", *map(identity, cast("list[object]", value)))
        case dict():
            members = cast("Json", value)
            return ("object", frozenset((key, identity(member)) for key, member in members.items()))
        case _:
            return value


def children(schema: Json) -> Iterator[tuple[tuple[str | int, ...], Json]]:
    """The schemas directly inside a schema of any draft, with their places."""
    for key, value in schema.items():
        if key in (*MAPS, "$defs", "definitions", "dependencies") and isinstance(value, dict):
            for name, member in cast("Json", value).items():
                if isinstance(member, dict):
                    yield (key, name), cast("Json", member)
        elif key in (*LISTS, "items") and isinstance(value, list):
            for i, member in enumerate(cast("list[object]", value)):
                if isinstance(member, dict):
                    yield (key, i), cast("Json", member)
        elif key in (*SINGLES, "additionalItems") and isinstance(value, dict):
            yield (key,), cast("Json", value)
