"""JSON schemas as llguidance is given them: checked, rewritten, bounded, and reported on.

A schema becomes parts in normal form (`refs`), these become alternatives without combinators (`lower`), and these are
written again (`emit`), what llguidance lacks in other keywords (`leaves`). What cannot be written to the letter is made
wider, never in silence: the report says ``verified``, and the document is validated when it is complete. All else that
is done to a schema narrows it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import reduce
from typing import Literal, cast

import jsonschema

from agentkit.runtime.closing import example
from agentkit.runtime.errors import SchemaError
from agentkit.runtime.schema.automaton import Automaton, searched
from agentkit.runtime.schema.backend import refusal
from agentkit.runtime.schema.backtracking import require_patient
from agentkit.runtime.schema.drafts import dialect_of
from agentkit.runtime.schema.emit import Emitter
from agentkit.runtime.schema.leaves import LEAVES
from agentkit.runtime.schema.limits import require_bounded, require_writable
from agentkit.runtime.schema.lower import Lowering
from agentkit.runtime.schema.narrow import narrow
from agentkit.runtime.schema.parts import Json, children, pointer
from agentkit.runtime.schema.patterns import Untranslatable
from agentkit.runtime.schema.refs import Reader
from agentkit.runtime.schema.report import Finding, SchemaReport
from agentkit.runtime.schema.settle import Settler
from agentkit.runtime.schema.shape import plainly_valid

Style = Literal["call", "document"]

#: Characters of a schema; `limits` has what else is bounded.
MAX_BYTES = 256 * 1024
# One space, or a new line with indentation: what models write, and no way to go on for ever.
_STYLES: dict[Style, Json] = {
    "call": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "document": {"whitespace_pattern": r" |\n[ \t]{0,24}"},
}
_SAMPLES = {
    "date": "2000-01-01",
    "time": "00:00:00Z",
    "date-time": "2000-01-01T00:00:00Z",
    "duration": "P1D",
    "email": "a@a.aa",
    "hostname": "a.aa",
    "ipv4": "0.0.0.0",
    "ipv6": "::1",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "uri": "a:a",
}


@dataclass(frozen=True, slots=True)
class Front:
    """A schema ready for llguidance, and what became of the user's own.

    Attributes:
        schema: as llguidance is given it, alone or after ``%json`` in a grammar.
        report: on the user's schema, whose pointers it uses.
    """

    schema: Json
    report: SchemaReport


def prepare(text: str) -> Json:
    """The schema in `text`, checked.

    Raises:
        SchemaError: not JSON, not a valid schema, too large or too deep.
    """
    if len(text) > MAX_BYTES:
        raise SchemaError(f"The schema has {len(text):,} characters; the limit is {MAX_BYTES:,}. Split it.")
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"The schema is not JSON ({error}). Pass JSON text.") from None
    require_bounded(value)
    if value is False:
        raise SchemaError("The schema is `false`: nothing satisfies it. Pass another schema.")
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise SchemaError("A schema is a JSON object. Pass one.")
    schema = cast("Json", value)
    dialect = dialect_of(schema)
    if plainly_valid(schema, dialect):
        return schema
    try:
        dialect.check_schema(schema)
    except jsonschema.SchemaError as error:
        at = pointer(error.absolute_path)
        raise SchemaError(
            f"The schema is not valid at {at or 'the root'}: {error.message[:300]}. Correct it.", at
        ) from None
    return schema


def inline(text: str, style: Style) -> Front:
    """The schema in `text` as llguidance is given it, alone or after ``%json`` in a grammar, and the report on it.

    Raises:
        SchemaError: as `prepare`; it refers to another document; nothing satisfies it; or a part of it, which the
            message names, can neither be enforced nor be left to the judge.
    """
    document = prepare(text)
    reader = Reader(document)
    root = reader.read()
    emitter = Emitter(Lowering(reader.named), LEAVES)
    try:
        written = emitter.document(root)
    except RecursionError:
        raise SchemaError("The schema's parts refer to each other too deeply. Use fewer levels.") from None
    if written is False:
        raise SchemaError("Nothing satisfies the schema: its parts contradict each other. Look at allOf and not.")
    require_writable(written)
    findings = list(emitter.findings)
    options = _STYLES[style]
    narrowed = narrow(written)
    if refusal({**narrowed, "x-guidance": options}):
        settler = Settler(options, emitter.places)
        written = settler.settle(written)
        findings += settler.findings
        narrowed = narrow(written)
        # A bound of ours may contradict one that stands elsewhere: then do without ours.
        if refusal({**narrowed, "x-guidance": options}):
            narrowed = written
    report = SchemaReport(tuple(findings))
    if report.status == "verified":
        require_patient(document)
    return Front({**narrowed, "x-guidance": options}, report)


def report_on(text: str, style: Style = "document") -> SchemaReport:
    """How the schema in `text` would be enforced; ``refused``, with the reason, where `inline` would raise."""
    try:
        return inline(text, style).report
    except SchemaError as error:
        return SchemaReport((Finding(error.pointer, "", "refused", str(error)),))


def examples(text: str) -> tuple[str, ...]:
    """Short strings that the patterns and formats of a schema allow, written as in JSON."""
    schema: object = json.loads(text)
    found: dict[str, None] = {}
    pending = [cast("Json", schema)] if isinstance(schema, dict) else []
    while pending:
        part = pending.pop()
        pending += (child for _, child in children(part))
        beside = cast("list[object]", part.get("allOf", []))
        conjuncts = [part, *(cast("Json", inner) for inner in beside if isinstance(inner, dict))]
        patterns: list[str] = [inner["pattern"] for inner in conjuncts if isinstance(inner.get("pattern"), str)]
        if len(patterns) == 1:
            found[example(patterns[0])] = None
        elif patterns:
            found[_example_of_all(patterns)] = None
        elif part.get("format") in _SAMPLES:
            found[_SAMPLES[part["format"]]] = None
    return tuple(json.dumps(sample, ensure_ascii=False)[1:-1] for sample in found if sample)[:32]


def _example_of_all(patterns: list[str]) -> str:
    """A short text that matches several patterns; "" if none is found."""
    try:
        return reduce(Automaton.both, map(searched, patterns)).shortest()
    except (Untranslatable, re.error):
        return ""
