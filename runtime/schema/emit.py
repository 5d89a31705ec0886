"""Parts as a schema that llguidance takes, if it takes what their keywords say."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.schema.exclusion import spread
from agentkit.runtime.schema.lower import Lowering
from agentkit.runtime.schema.parts import LISTS, MAPS, SINGLES, Json, Part, name_of, trivial
from agentkit.runtime.schema.report import Finding, Note

#: Schemas written in all: what conjunctions multiplied beyond it would take the compiler too long.
MAX_WRITTEN = 20_000

Rewriting = Callable[[Json, Note], Json]


class Emitter:
    """Writes the parts of one document.

    Attributes:
        findings: on what has been written.
        places: pointers of the user's schema, by the identity of what has been written for it.
    """

    def __init__(self, lowering: Lowering, leaves: tuple[Rewriting, ...]) -> None:
        self.findings: dict[Finding, None] = {}
        self.places: dict[int, str] = {}
        self._lowering, self._leaves = lowering, leaves
        self._written: dict[int, Part] = {}
        self._open: dict[int, str | None] = {}  # parts being written, and their names where they are met again
        self._kept: list[Part] = []
        self._definitions: dict[str, Part] = {}
        self._queue: list[str] = []
        self._count = 0

    def document(self, root: Part) -> Part:
        """The whole schema, with all that it refers to in ``$defs``."""
        written = self.write(root)
        while self._queue:
            name = self._queue.pop()
            self._definitions[name] = self.write(self._lowering.part(name))
        if written is False:
            return False
        return {**written, "$defs": self._definitions} if self._definitions else written

    def write(self, part: Part) -> Part:
        """One part; False if nothing satisfies it.

        Raises:
            SchemaError: too much has been written.
        """
        if part is False:
            return False
        if trivial(part):
            return {}
        key = id(part)
        if key in self._written:
            return self._written[key]
        if key in self._open:  # inside itself
            name = self._open[key] = self._open[key] or f"r{len(self._kept)}"
            return {"$ref": f"#/$defs/{name}"}
        self._open[key] = None
        members = [self._flat(flat) for lowered in self._lowering.lower(part) for flat in spread(lowered)]
        found = [member for member in members if isinstance(member, dict)]
        written: Part = False
        if found:
            written = found[0] if len(found) == 1 else {"anyOf": found}
        if written is not False:
            self.places.setdefault(id(written), part.get("$at", ""))
        name = self._open.pop(key)
        if name is not None:
            self._definitions[name] = written
            written = {"$ref": f"#/$defs/{name}"}
        self._kept.append(part)
        self._written[key] = written
        return written

    def _flat(self, flat: Json) -> Part:
        self._count += 1
        if self._count > MAX_WRITTEN:
            raise SchemaError(
                f"The schema becomes more than {MAX_WRITTEN:,} schemas when its combinations are written out. "
                "Use fewer conditions and alternatives beside each other."
            )
        for finding in flat.get("$loose", ()):
            self.findings[finding] = None
        name = name_of(flat)
        if name is not None:
            return self._reference(name, flat)
        at: str = flat.get("$at", "")
        out: Json = {}
        for key, value in flat.items():
            if key in MAPS:
                out[key] = {inner: self.write(member) for inner, member in cast("dict[str, Part]", value).items()}
            elif key in LISTS:
                out[key] = [self.write(member) for member in cast("list[Part]", value)]
            elif key in SINGLES:
                out[key] = self.write(value)
            elif not key.startswith("$"):
                out[key] = value
        for rewriting in self._leaves:
            out = rewriting(out, lambda keyword, status, reason: self._note(Finding(at, keyword, status, reason)))
        if any(member is False for member in out.get("allOf", ())):
            return False
        if out.keys() == {"allOf"} and len(out["allOf"]) == 1:
            out = out["allOf"][0]
        self.places.setdefault(id(out), at)
        self._kept.append(out)
        return out

    def _note(self, finding: Finding) -> None:
        if finding.status == "refused":
            raise SchemaError(
                f"At {finding.pointer or 'the root'}: {finding.keyword}: {finding.reason}", finding.pointer
            )
        self.findings[finding] = None

    def _reference(self, name: str, flat: Json) -> Part:
        if not self._lowering.opened(flat):  # which raises if it leads to itself
            return False
        if name not in self._definitions:
            self._definitions[name] = {}
            self._queue.append(name)
        return {"$ref": f"#/$defs/{name}"}
