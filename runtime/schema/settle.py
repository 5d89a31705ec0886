"""The last resort: what llguidance refuses is made wider until it does not, and said to be."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.schema.backend import refusal
from agentkit.runtime.schema.parts import Json, Part, children, pointer
from agentkit.runtime.schema.report import Finding

#: Compilations in search of what is refused, and parts that are made wider in one schema.
_TRIALS, _WIDENED = 96, 24
#: CPU time for all of that.
_SECONDS = 1.0
#: What is never left out of a part as long as something else can be.
_KEPT = ("type", "properties", "required", "items", "additionalProperties", "anyOf", "allOf", "$ref", "enum")
#: What is said of all the others must go with what names them, or it would be said of these as well.
_REST = {"properties": "additionalProperties", "patternProperties": "additionalProperties", "prefixItems": "items"}


class Settler:
    """Widens one schema.

    Args:
        options: for llguidance.
        places: pointers of the user's schema, by the identity of parts of what is settled.
    """

    def __init__(self, options: Json, places: Mapping[int, str]) -> None:
        self.findings: dict[Finding, None] = {}
        self._options, self._places = options, dict(places)
        self._left, self._until = _TRIALS, time.thread_time() + _SECONDS
        self._kept: list[Json] = []  # whose parts' identities are in `places`

    def settle(self, schema: Json) -> Json:
        """`schema`, with keywords left out where llguidance would not take it; each is among the findings.

        Raises:
            SchemaError: nothing satisfies it, or it could not be found what to leave out.
        """
        for _ in range(_WIDENED):
            reason = refusal({**schema, "x-guidance": self._options})
            if not reason:
                return schema
            self._kept.append(schema)
            path, part, why = self._locate(schema, reason)
            at = self._places.get(id(part), pointer(path))
            if "nsatisfiable" in why or "empty" in why:
                without = self._replaced(schema, part, False)
                if without is False:
                    raise _error(at, why)
                self.findings[Finding(at, "false", "exact", f"nothing satisfies this ({why}); it is left out.")] = None
                schema = without
            else:
                wider, key = self._wider(schema, part)
                if key is None:
                    raise _error(at, why)
                self.findings[Finding(at, key, "verified", f"{why}.")] = None
                schema = cast("Json", self._replaced(schema, part, wider))
        raise _error("", "too many of its keywords are unknown to the grammar")

    def _refused(self, schema: Json, part: Json) -> str:
        """Why a part is refused on its own; empty if it is not, or once there have been too many trials."""
        self._left -= 1
        if time.thread_time() > self._until:
            raise SchemaError("The schema cannot be enforced; what is at fault takes too long to find. Simplify it.")
        definitions = {"$defs": schema["$defs"]} if "$defs" in schema and part is not schema else {}
        return refusal({**definitions, **part, "x-guidance": self._options}) if self._left >= 0 else ""

    def _replaced(self, schema: Json, part: Json, value: Part) -> Part:
        """A copy of `schema` with `value` wherever `part` stands."""
        copies: dict[int, object] = {id(part): value}

        def copy(inner: object) -> object:
            key = id(inner)
            if key in copies:
                return copies[key]
            made = inner
            if isinstance(inner, dict):
                members = cast("Json", inner)
                changed = {name: copy(member) for name, member in members.items()}
                if any(changed[name] is not members[name] for name in members):
                    made = changed
                    if key in self._places:
                        self._places[id(changed)] = self._places[key]
            elif isinstance(inner, list):
                items = cast("list[object]", inner)
                copied = [copy(item) for item in items]
                if any(one is not other for one, other in zip(copied, items, strict=True)):
                    made = copied
            copies[key] = made
            return made

        return cast("Part", copy(schema))

    def _locate(self, schema: Json, reason: str) -> tuple[tuple[str | int, ...], Json, str]:
        """The innermost part that is refused on its own, its path, and why it is."""
        path: tuple[str | int, ...] = ()
        part = schema
        while True:
            for place, child in children(part):
                if why := self._refused(schema, child):
                    path, part, reason = path + place, child, why
                    break
            else:
                return path, part, reason

    def _wider(self, schema: Json, part: Json) -> tuple[Json, str | None]:
        """A part with as little less as llguidance takes, and the keyword that it lacks."""
        if self._left <= 0:
            kept = {key: part[key] for key in ("type", "$defs") if key in part}
            return kept, next((key for key in part if key not in kept), None)
        optional = [key for key in part if key not in _KEPT and key != "$defs"]
        for key in [*optional, *(key for key in part if key in _KEPT and key != "type")]:
            less = {other: value for other, value in part.items() if other not in (key, _REST.get(key))}
            if not self._refused(schema, less):
                return less, key
        kept = {key: part[key] for key in ("type", "$defs") if key in part}
        if len(kept) == len(part) or self._refused(schema, kept):
            return part, None
        return kept, next(key for key in part if key not in kept)


def _error(at: str, why: str) -> SchemaError:
    return SchemaError(
        f"The schema cannot be enforced at {at or 'its root'}: {why}. Leave that keyword out or write it otherwise.", at
    )
