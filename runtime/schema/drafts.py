"""Drafts 4 to 2020-12, read as draft 2020-12.

What a keyword means in its draft is what jsonschema takes it to mean, which judges documents afterwards: a keyword
that its validator of that draft does not know is an annotation.
"""

from __future__ import annotations

from typing import Any, cast

import jsonschema
from jsonschema.validators import validator_for

from agentkit.runtime.schema.parts import Json, identity

#: Keywords that modify another one and have no validator of their own.
_MODIFIERS = {"if": ("then", "else"), "contains": ("minContains", "maxContains")}
_MODERN = (jsonschema.Draft201909Validator, jsonschema.Draft202012Validator)

Dialect = Any
"""One of jsonschema's validator classes."""


def dialect_of(schema: Json, default: Dialect = jsonschema.Draft202012Validator) -> Dialect:
    """The draft that a schema's ``$schema`` names."""
    return validator_for(schema, default=default) if isinstance(schema.get("$schema"), str) else default


def modern(schema: Json, dialect: Dialect) -> tuple[Json, dict[str, str]]:
    """A schema's own keywords in those of draft 2020-12, its sub-schemas as they are.

    Returns:
        the keywords, and under which one of the user's a new one's sub-schemas are found.
    """
    known = dialect.VALIDATORS
    if "$ref" in schema and dialect not in _MODERN:
        return {"$ref": schema["$ref"]}, {}  # which hides its siblings
    kept: Json = {}
    for key, value in schema.items():
        if key in known:
            kept[key] = value
            if key != "contains" or dialect in _MODERN:
                kept |= {k: schema[k] for k in _MODIFIERS.get(key, ()) if k in schema}
    places: dict[str, str] = {}
    if dialect is jsonschema.Draft4Validator:
        _bound_exclusively(kept, schema)
    if dialect is not jsonschema.Draft202012Validator:
        _read_items(kept, places)
    if "dependencies" in kept:
        _read_dependencies(kept, places)
    if kept.get("uniqueItems") is False:
        del kept["uniqueItems"]
    if "const" in kept:
        kept["enum"] = _both(kept.pop("const"), kept.get("enum"))
    return kept, places


def _both(value: object, values: list[object] | None) -> list[object]:
    """``const`` beside ``enum``."""
    if values is None or any(identity(value) == identity(other) for other in values):
        return [value]
    return []


def _bound_exclusively(kept: Json, schema: Json) -> None:
    """Draft 4 has a truth value beside the bound."""
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if bound in kept and schema.get(exclusive) is True:
            kept[exclusive] = kept.pop(bound)


def _read_items(kept: Json, places: dict[str, str]) -> None:
    """A list of ``items`` is what ``prefixItems`` are; ``additionalItems`` count only beside one."""
    rest = kept.pop("additionalItems", None)
    if isinstance(kept.get("items"), list):
        kept["prefixItems"], places["prefixItems"] = kept.pop("items"), "items"
        if rest is not None:
            kept["items"], places["items"] = rest, "additionalItems"


def _read_dependencies(kept: Json, places: dict[str, str]) -> None:
    given = cast("dict[str, object]", kept.pop("dependencies"))
    lists = {name: cast("list[str]", value) for name, value in given.items() if isinstance(value, list)}
    schemas = {name: value for name, value in given.items() if not isinstance(value, list)}
    if lists:
        kept["dependentRequired"] = lists
    if schemas:
        kept["dependentSchemas"], places["dependentSchemas"] = schemas, "dependencies"
