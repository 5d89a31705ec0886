"""JSON schemas as llguidance is given them: checked, bounded, and refused where they could not be enforced.

A schema is only ever narrowed, so that whatever is decoded satisfies the user's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import jsonschema
from jsonschema.validators import validator_for

from agentkit.runtime.closing import example
from agentkit.runtime.errors import SchemaError
from agentkit.runtime.schema.backend import refusal
from agentkit.runtime.schema.limits import require_bounded
from agentkit.runtime.schema.report import Finding, SchemaReport

Style = Literal["call", "document"]
Json = dict[str, Any]

#: Characters of a schema; `limits` has what else is bounded.
MAX_BYTES = 256 * 1024
#: Defaults for what a schema leaves open, so that no document grows without end.
MAX_ITEMS, MAX_INTEGER, MAX_NUMBER, RESOLUTION = 1024, 10**18, 10**15, 1e-9
# One space, or a new line with indentation: what models write, and no way to go on for ever.
_STYLES: dict[Style, Json] = {
    "call": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "document": {"whitespace_pattern": r" |\n[ \t]{0,24}"},
}


_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = (
    "items",
    "additionalProperties",
    "additionalItems",
    "contains",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
)
_COMBINING = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
#: Formats that llguidance enforces. JSON Schema lets every other one be an annotation.
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}

_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = r"(([0-9]{2}(0[48]|[2468][048]|[13579][26]))|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    rf"|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
# llguidance's own let through days that no month has, and any number of digits of a second.
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
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


@dataclass(frozen=True, slots=True)
class Front:
    """A schema ready for llguidance, and what became of the user's own.

    Attributes:
        schema: as llguidance is given it, alone or after ``%json`` in a grammar.
        report: on the user's schema, whose pointers it uses.
    """

    schema: Json
    report: SchemaReport


def prepare(text: str) -> tuple[Json, list[Finding]]:
    """The schema in `text` checked, and without what is an annotation; and findings about the latter.

    Raises:
        SchemaError: not JSON, not a valid schema, too large or too deep, or it refers to another document.
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
    validator = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        pointer = _pointer(error.absolute_path)
        raise SchemaError(
            f"The schema is not valid at {pointer or 'the root'}: {error.message[:300]}. Correct it.", pointer
        ) from None
    findings: list[Finding] = []
    schema.pop("x-guidance", None)  # would change how llguidance compiles it
    for pointer, part in _parts(schema):
        _require_local(part, pointer)
        kind = part.get("format")
        if isinstance(kind, str) and kind not in _FORMATS:
            del part["format"]
            findings.append(Finding(pointer, "format", "exact", f"{kind!r} is an annotation and not enforced."))
    return schema, findings


def inline(text: str, style: Style) -> Front:
    """The schema in `text` as llguidance is given it, alone or after ``%json`` in a grammar, and the report on it.

    First exact, then with ``oneOf`` taken as ``anyOf``, which is among the findings; never more lenient.

    Raises:
        SchemaError: as `prepare`, or llguidance cannot enforce a part of it, which the message names.
    """
    schema, findings = prepare(text)
    narrowed = narrow(schema)
    error = ""
    for coerce in (False, True):
        options = {**_STYLES[style], "coerce_one_of": coerce}
        # A bound of ours may contradict one that stands elsewhere (behind a $ref): then do without ours.
        for candidate in (narrowed, schema):
            compiled = {**candidate, "x-guidance": options}
            reason = refusal(compiled)
            if not reason:
                if coerce:
                    looser = "that exactly one branch fits is not enforced, only that one does."
                    findings.append(Finding("", "oneOf", "verified", looser))
                return Front(compiled, SchemaReport(tuple(findings)))
            error = error or reason
    pointer = _locate(schema, lambda part: bool(refusal({**part, "x-guidance": options})))
    raise SchemaError(
        f"The schema cannot be enforced at {pointer or 'its root'}: {error}. Leave that keyword out "
        "or write it otherwise.",
        pointer,
    )


def _require_local(part: Json, pointer: str) -> None:
    target = part.get("$ref")
    if isinstance(target, str) and not target.startswith("#"):
        raise SchemaError(
            f"At {pointer or 'the root'}: $ref to {target!r}, another document. Copy what it refers to into $defs.",
            pointer,
        )


def _pointer(path: Sequence[str | int]) -> str:
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)


def _children(part: Json) -> Iterator[tuple[tuple[str | int, ...], Json]]:
    """The schemas directly inside a schema, with their places."""
    for key, value in part.items():
        if key in _MAPS and isinstance(value, dict):
            for name, member in cast("Json", value).items():
                if isinstance(member, dict):
                    yield (key, name), cast("Json", member)
        elif key in _LISTS and isinstance(value, list):
            for i, member in enumerate(cast("list[object]", value)):
                if isinstance(member, dict):
                    yield (key, i), cast("Json", member)
        elif key in _SINGLE and isinstance(value, dict):
            yield (key,), cast("Json", value)


def _parts(schema: Json, pointer: str = "") -> Iterator[tuple[str, Json]]:
    """Every schema inside `schema`, itself included, with its pointer."""
    yield pointer, schema
    for place, child in _children(schema):
        yield from _parts(child, pointer + _pointer(place))


def examples(text: str) -> tuple[str, ...]:
    """Short strings that the patterns and formats of a schema allow, written as in JSON."""
    schema: object = json.loads(text)
    found: dict[str, None] = {}
    for _, part in _parts(cast("Json", schema)) if isinstance(schema, dict) else ():
        if isinstance(pattern := part.get("pattern"), str):
            found[example(pattern)] = None
        elif part.get("format") in _SAMPLES:
            found[_SAMPLES[part["format"]]] = None
    return tuple(json.dumps(sample, ensure_ascii=False)[1:-1] for sample in found if sample)[:32]


def _locate(schema: Json, refuses: Callable[[Json], bool]) -> str:
    """Pointer of the innermost part that is refused on its own, after at most 64 compilations."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    pointer, part, left = "", schema, 64
    while True:
        for place, child in _children(part):
            left -= 1
            if left < 0:
                return pointer
            if refuses({**definitions, **child}):
                pointer, part = pointer + _pointer(place), child
                break
        else:
            return pointer


def narrow(schema: Json) -> Json:
    """A copy in which numbers and arrays are bounded, so that no document grows without end.

    It admits less than `schema`, never more. A branch of ``oneOf`` itself is left alone: there less can be
    more, as branches that overlapped would no longer do so.
    """
    return _narrow(schema, True)


def _narrow(schema: Json, bound: bool) -> Json:
    copy: Json = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            copy[key] = {name: _narrowed(member) for name, member in cast("Json", value).items()}
        elif key in _LISTS and isinstance(value, list):
            copy[key] = [_narrowed(member, key != "oneOf") for member in cast("list[object]", value)]
        elif key in _SINGLE and key != "not" and isinstance(value, dict):
            copy[key] = _narrowed(cast("Json", value))
        else:
            copy[key] = value
    if bound and _COMBINING.isdisjoint(copy):
        kinds = copy.get("type")
        for kind in cast("list[str]", kinds if isinstance(kinds, list) else [kinds]):
            if kind in ("number", "integer"):
                _bound_number(copy, kind)
            elif kind == "string":
                _bound_string(copy)
            elif kind == "array":
                copy.setdefault("maxItems", max(MAX_ITEMS, int(copy.get("minItems", 0))))
    return copy


def _narrowed(value: object, bound: bool = True) -> object:
    if not isinstance(value, dict):
        return value
    return _narrow(cast("Json", value), bound)


def _bound_number(part: Json, kind: str) -> None:
    """Bounds on both sides and, for a fraction, on its digits; both written without an exponent."""
    given = [part[k] for k in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if k in part]
    limit = MAX_INTEGER if kind == "integer" else MAX_NUMBER
    if any(isinstance(value, bool) or abs(value) >= limit for value in given):
        return  # draft 4, or beyond our bounds
    if "minimum" not in part and "exclusiveMinimum" not in part:
        part["minimum"] = -limit
    if "maximum" not in part and "exclusiveMaximum" not in part:
        part["maximum"] = limit
    if kind == "number" and "multipleOf" not in part and all(round(v, 6) == v for v in given):
        part["multipleOf"] = RESOLUTION


def _bound_string(part: Json) -> None:
    """Exact patterns for dates and times. Lengths are left alone: a bound makes a mask cost twenty times as much, and
    the budget ends a string as well (`closing.Closer`)."""
    if part.get("format") in _PATTERNS and "pattern" not in part:
        part["pattern"] = _PATTERNS[part.pop("format")]
