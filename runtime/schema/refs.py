"""A schema and all that its ``$ref``s lead to, as parts in normal form.

References are resolved by the library `referencing`, as jsonschema does: relative to ``$id``, by pointer, by anchor,
into the metaschemas it brings along, and nowhere else.
"""

from __future__ import annotations

from typing import Any, cast

import referencing.exceptions
from jsonschema_specifications import REGISTRY
from referencing.jsonschema import lookup_recursive_ref, specification_with

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.schema.drafts import Dialect, dialect_of, modern
from agentkit.runtime.schema.parts import LISTS, MAPS, SINGLES, Json, Part, pointer
from agentkit.runtime.schema.report import Finding

Resolver = Any
"""`referencing`'s, whose types are only known to it."""

#: Parts of a document, so that no chain of references can go on for ever.
MAX_PARTS = 100_000


class Reader:
    """Reads one document.

    Attributes:
        named: the parts that references lead to, by the names in them.
    """

    def __init__(self, document: Json) -> None:
        self.named: dict[str, Part] = {}
        self._document = document
        self._names: dict[tuple[int, Dialect, str], str] = {}
        self._pointers: dict[int, str] = {}
        self._queue: list[tuple[str, object, str, Dialect, Resolver]] = []
        self._parts = self._identified = 0
        self._kept: list[object] = []  # contents that `referencing` made, so that no other object gets their id

    def read(self) -> Part:
        """The document's root; all of `named` is there afterwards.

        Raises:
            SchemaError: a reference that leads nowhere, or to another document.
        """
        dialect = dialect_of(self._document)
        specification = _specification(dialect)
        resolver = REGISTRY.resolver_with_root(specification.create_resource(self._document))
        root = self._part(self._document, "", dialect, resolver)
        while self._queue:
            name, contents, at, dialect, resolver = self._queue.pop()
            self.named[name] = self._part(contents, at, dialect, resolver)
        return root

    def _part(self, value: object, at: str, dialect: Dialect, resolver: Resolver) -> Part:
        if value is False:
            return False
        if value is True:
            return {}
        if not isinstance(value, dict):
            raise SchemaError(f"At {at or 'the root'}: a schema is an object or a truth value. Correct it.", at)
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise SchemaError(f"The schema has more than {MAX_PARTS:,} parts. Split it.")
        schema = cast("Json", value)
        dialect = dialect_of(schema, dialect)
        if schema is not self._document and isinstance(schema.get("$id", schema.get("id")), str):
            resolver = resolver.in_subresource(_specification(dialect).create_resource(schema))
        kept, places = modern(schema, dialect)
        part: Json = {"$at": at}
        more: list[Part] = []
        for key, inner in kept.items():
            place = f"{at}/{places.get(key, key)}"
            if key in ("$ref", "$dynamicRef", "$recursiveRef"):
                self._refer(part, more, key, inner, dialect, resolver)
            elif key in MAPS:
                part[key] = {
                    name: self._part(member, place + pointer([name]), dialect, resolver)
                    for name, member in cast("Json", inner).items()
                }
            elif key in LISTS:
                part[key] = [
                    self._part(member, f"{place}/{i}", dialect, resolver)
                    for i, member in enumerate(cast("list[object]", inner))
                ]
            elif key in SINGLES:
                part[key] = self._part(inner, place, dialect, resolver)
            else:
                part[key] = inner
        if more:
            part["allOf"] = [*more, *part.get("allOf", [])]
        return part

    def _refer(self, part: Json, more: list[Part], key: str, target: str, dialect: Dialect, resolver: Resolver) -> None:
        """Add what a reference leads to: as ``$ref``, or to `more` where there is one already."""
        at: str = part["$at"]
        if key == "$dynamicRef" and self._resources() > 1:
            reason = f"{target!r} depends on where the schema is used from, which is not followed."
            part["$loose"] = (Finding(at, key, "verified", reason),)
            return
        try:
            found = lookup_recursive_ref(resolver) if key == "$recursiveRef" else resolver.lookup(target)
        except (referencing.exceptions.Unresolvable, ValueError, TypeError, LookupError, AttributeError):
            remedy = (
                "which does not exist. Correct it."
                if target.startswith("#")
                else "another document. Copy what it refers to into $defs."
            )
            raise SchemaError(f"At {at or 'the root'}: {key} to {target!r}, {remedy}", at) from None
        name = self._name(found.contents, found.resolver, dialect, at)
        if "$ref" in part:
            more.append({"$ref": name, "$at": at})
        else:
            part["$ref"] = name

    def _resources(self) -> int:
        """How many identified schemas the document has: with one, ``$dynamicRef`` leads where ``$ref`` would."""
        self._pointer(self._document, "")
        return self._identified

    def _name(self, contents: object, resolver: Resolver, dialect: Dialect, at: str) -> str:
        key = (id(contents), dialect, str(resolver._base_uri))
        if key not in self._names:
            self._kept.append(contents)
            self._names[key] = str(len(self._names))
            self._queue.append((self._names[key], contents, self._pointer(contents, at), dialect, resolver))
        return self._names[key]

    def _pointer(self, contents: object, default: str) -> str:
        """Where in the document `contents` stand; `default` if they are not of the document."""
        if not self._pointers:
            self._index(self._document, "")
        return self._pointers.get(id(contents), default)

    def _index(self, value: object, at: str) -> None:
        if isinstance(value, dict):
            self._pointers.setdefault(id(cast("Json", value)), at)
            self._identified += not at or isinstance(cast("Json", value).get("$id"), str)
            for key, member in cast("Json", value).items():
                self._index(member, at + pointer([key]))
        elif isinstance(value, list):
            for i, member in enumerate(cast("list[object]", value)):
                self._index(member, f"{at}/{i}")


def _specification(dialect: Dialect) -> Any:
    meta: Json = dialect.META_SCHEMA
    return specification_with(meta.get("$schema") or meta["$id"])
