"""Output types: from a Python type to what the decoder may write, and back to a value.

outlines is the front end: its types (`Regex`, `JsonSchema`, `CFG`, `Choice`) and whatever its DSL makes of Python types
are taken as they are. Types that pydantic can describe become JSON schemas by pydantic itself.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast, get_args, get_origin

from jsonschema.validators import validator_for
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from agentkit.runtime.errors import AgentError, SchemaError
from agentkit.runtime.grammar import ChoiceSpec, GrammarSpec, JsonSpec, LarkSpec, RegexSpec
from agentkit.schema import Json, clean

Out = TypeVar("Out")


class OutputError(AgentError):
    """An output does not fit its type. What the grammar enforces is right by construction; this is about the rest."""


@dataclass(frozen=True, slots=True)
class Constraint(Generic[Out]):
    """How one output type is decoded and read.

    Attributes:
        spec: what the decoder may write.
        parse: from the text to a value; raises `OutputError`.
        schema: the JSON schema, where there is one.
    """

    spec: GrammarSpec
    parse: Callable[[str], Out]
    schema: Json | None = None


def constraint(output: Any) -> Constraint[Any]:
    """The constraint of an output type.

    Args:
        output: a pydantic model, dataclass, TypedDict, Enum, Literal, number, bool, list or union of these; a JSON
            schema as a dict; a compiled regular expression; or a type of outlines.

    Raises:
        SchemaError: it has no schema; the message says what to use instead.
    """
    if isinstance(output, Mapping):
        return _document(dict(cast("Mapping[str, Any]", output)), None)
    if isinstance(output, re.Pattern):
        pattern = cast("re.Pattern[str]", output)
        return Constraint(RegexSpec(pattern.pattern), str)
    texts = _texts(output)
    if texts is not None:
        return Constraint(ChoiceSpec(tuple(texts)), texts.__getitem__)
    if type(output).__module__.startswith("outlines."):
        return _term(output)
    try:
        adapter = TypeAdapter[Any](output)
        schema = adapter.json_schema()
    except PydanticUserError as error:
        reason = str(error).partition("\n")[0]
        raise SchemaError(
            f"{output!r} cannot be an output type: {reason}. Use a pydantic model, a dataclass, a TypedDict, Literal, "
            "an Enum, a list of these, or a JSON schema as a dict."
        ) from error
    return _document(schema, adapter)


def _texts(output: Any) -> dict[str, Any] | None:
    """The members of a type of a few strings, by what the model writes; None for other types."""
    if get_origin(output) is Literal and all(isinstance(value, str) for value in get_args(output)):
        return {value: value for value in get_args(output)}
    if isinstance(output, type) and issubclass(output, enum.Enum):
        members = list(output)
        if all(isinstance(member.value, str) for member in members):
            return {member.value: member for member in members}
    return None


def _term(output: Any) -> Constraint[Any]:
    """A type of outlines, as its own DSL reads it."""
    from outlines.types import CFG, JsonSchema
    from outlines.types.dsl import python_types_to_terms, to_regex

    term = python_types_to_terms(output)
    if isinstance(term, JsonSchema):
        return _document(json.loads(term.schema), None)
    if isinstance(term, CFG):
        return Constraint(LarkSpec(term.definition), str)
    return Constraint(RegexSpec(to_regex(term)), str)


def _document(schema: Json, adapter: TypeAdapter[Any] | None) -> Constraint[Any]:
    # A type is decoded closed: pydantic ignores further members by default, and a model would make some up.
    spec = JsonSpec(json.dumps(schema if adapter is None else clean(schema), ensure_ascii=False))

    def parse(document: str) -> Any:
        validator = validator_for(schema)
        try:
            value = json.loads(document)
        except ValueError as error:
            raise OutputError(f"it is not one JSON document ({error})") from None
        faults = list(validator(schema, format_checker=validator.FORMAT_CHECKER).iter_errors(value))
        if faults:
            raise OutputError("; ".join(f"{fault.json_path}: {fault.message[:200]}" for fault in faults[:3]))
        if adapter is None:
            return value
        try:
            return adapter.validate_json(document)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors(include_url=False)[:3]]
            raise OutputError("; ".join(lines)) from error

    return Constraint(spec, parse, schema)
