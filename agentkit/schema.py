"""What a model is told of a function's arguments: from its docstring, as JSON schema, or as a signature."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

_SECTION = re.compile(
    r"(Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments|Returns?|Yields?|Raises|Examples?"
    r"|Notes?|Attributes|References|See Also|Todo|Warnings?|Warns)\s*:\s*"
)
_ARGUMENTS = {"Args", "Arguments", "Parameters", "Params", "Keyword Args", "Keyword Arguments"}
_ENTRY = re.compile(r"\*{0,2}(?P<name>\w+)\s*(?:\(.*?\))?\s*:(?:\s+(?P<text>.*))?")

# Keywords whose value is a map from names to schemas, a list of schemas, or one schema. Everything else
# (default, enum, const, examples) is data and is left alone: a property may well be called "title".
_MAPS = {"properties", "$defs", "patternProperties", "dependentSchemas"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_SINGLE = {"items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"}

_TYPES = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "array": "list",
    "object": "dict",
}

Json = dict[str, Any]  # a JSON object


@dataclass(frozen=True, slots=True)
class Docstring:
    """A docstring in Google style: what the function does, and the text of each documented parameter."""

    description: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict[str, str])


def parse_docstring(text: str | None) -> Docstring:
    """Read a docstring in Google style.

    The description is everything before the first section (``Args:``, ``Returns:`` …). A parameter is
    ``name: text`` or ``name (type): text``; more deeply indented lines continue it and are joined by spaces.
    Sections other than the arguments are ignored.
    """
    lines = inspect.cleandoc(text or "").splitlines()
    headers = [i for i, line in enumerate(lines) if _SECTION.fullmatch(line)]
    description = "\n".join(lines[: headers[0]] if headers else lines).strip()
    parameters: dict[str, str] = {}
    for header in headers:
        if lines[header].partition(":")[0].strip() in _ARGUMENTS:
            parameters |= _entries(lines[header + 1 :])
    return Docstring(description, parameters)


def _entries(lines: list[str]) -> dict[str, str]:
    """The parameters of one section, which ends at the first line that is not indented."""
    entries: dict[str, str] = {}
    name, margin = "", 0
    for line in lines:
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            break
        margin = margin or indent
        entry = _ENTRY.fullmatch(line.strip()) if indent <= margin else None
        if entry:
            name = entry["name"]
            entries[name] = (entry["text"] or "").strip()
        elif name:
            entries[name] = f"{entries[name]} {line.strip()}".strip()
    return entries


def clean(schema: Json) -> Json:
    """A schema as pydantic writes it, without what a model has no use for, and closed.

    Titles and OpenAPI's `discriminator` go. An object with properties that says nothing of others admits
    no others, so that a model cannot invent arguments. Definitions and defaults come last.
    """
    cleaned: Json = {}
    for key, value in schema.items():
        if key in ("title", "discriminator"):
            continue
        if key in _MAPS:
            members = cast("dict[str, Json]", value)
            cleaned[key] = {name: clean(member) for name, member in members.items()}
        elif key in _LISTS:
            cleaned[key] = [clean(member) for member in cast("list[Json]", value)]
        elif key in _SINGLE and isinstance(value, dict):
            cleaned[key] = clean(cast("Json", value))
        else:
            cleaned[key] = value
    if "properties" in cleaned:
        cleaned.setdefault("additionalProperties", False)
    for last in ("default", "$defs"):
        if last in cleaned:
            cleaned[last] = cleaned.pop(last)
    return cleaned


def described(schema: Json) -> list[str]:
    """A line for each field that has a description, ``- items.price: what it costs``, in the order of the schema.

    References into ``$defs`` are followed, but never into a definition from within itself.
    """
    lines: list[str] = []
    _describe(schema, schema.get("$defs", {}), "", frozenset(), lines)
    return lines


def _describe(schema: Json, defs: Json, path: str, seen: frozenset[str], lines: list[str]) -> None:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    if name in defs and name not in seen:
        _describe(defs[name], defs, path, seen | {name}, lines)
    inner = [schema.get("items"), *(option for key in ("anyOf", "oneOf", "allOf") for option in schema.get(key, []))]
    for part in inner:
        if isinstance(part, dict):
            _describe(cast("Json", part), defs, path, seen, lines)
    for name, member in cast("dict[str, Any]", schema.get("properties", {})).items():
        if isinstance(member, dict):
            here, part = f"{path}.{name}" if path else name, cast("Json", member)
            if text := " ".join(str(part.get("description", "")).split()):
                lines.append(f"- {here}: {text}")
            _describe(part, defs, here, seen, lines)


def signature(schema: Json) -> str:
    """The arguments on one line, ``path: str, limit: int = 200``, for a model too small to read JSON schema.

    Types are Python's, values are JSON's. A type that contains itself is named, not expanded again.
    """
    return ", ".join(_fields(schema, schema.get("$defs", {}), frozenset()))


def _fields(schema: Json, defs: Json, seen: frozenset[str]) -> list[str]:
    required = schema.get("required", [])
    fields: list[str] = []
    for name, member in cast("dict[str, Json]", schema.get("properties", {})).items():
        text = f"{name}: {_type(member, defs, seen)}"
        if "default" in member:
            text += f" = {json.dumps(member['default'], ensure_ascii=False)}"
        elif name not in required:
            text += " = ..."
        fields.append(text)
    return fields


def _type(schema: Json, defs: Json, seen: frozenset[str]) -> str:
    """Python's way to write the type that `schema` describes; `seen` are the definitions being expanded."""
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        return name if name in seen or name not in defs else _type(defs[name], defs, seen | {name})
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    if "enum" in schema:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " | ".join(_type(member, defs, seen) for member in cast("list[Json]", schema[key]))
    if schema.get("properties"):
        return "{" + ", ".join(_fields(schema, defs, seen)) + "}"
    kind = schema.get("type", "any")
    if kind == "array" and isinstance(items := schema.get("items"), dict):
        return f"list[{_type(cast('Json', items), defs, seen)}]"
    if kind == "object" and isinstance(values := schema.get("additionalProperties"), dict):
        return f"dict[str, {_type(cast('Json', values), defs, seen)}]"
    kinds = cast("list[str]", kind if isinstance(kind, list) else [kind])
    return " | ".join(_TYPES.get(one, one) for one in kinds)
