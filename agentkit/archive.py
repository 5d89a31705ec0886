"""A transcript as plain JSON values and back: what a saved session says beside its ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from agentkit.runtime.errors import StoreError
from agentkit.template import Assistant, Call, ChatTemplate, Message, Role, Signature, System, ToolResult, User
from agentkit.transcript import Kind, Span, Transcript


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Message:
    role: Role
    text: str
    name: str = ""
    calls: list[_Call] = field(default_factory=list[_Call])


@dataclass(frozen=True, slots=True)
class _Span:
    kind: Kind
    end: int
    messages: list[_Message]


@dataclass(frozen=True, slots=True)
class _Note:
    tools: list[str]
    spans: list[_Span]


def pack(transcript: Transcript) -> dict[str, object]:
    """The tools by name, and the stretches of the log with their messages."""
    spans = [_Span(span.kind, span.end, [_plain(message) for message in span.messages]) for span in transcript.spans]
    return asdict(_Note([tool.name for tool in transcript.tools], spans))


def unpack(
    note: object, ids: Sequence[int], template: ChatTemplate, tools: Sequence[Signature], source: object
) -> Transcript:
    """The transcript again.

    Args:
        note: from `pack`, by way of a file.
        ids: of the log.
        template: of the model.
        tools: those the agent has now.
        source: the file, for messages.

    Raises:
        StoreError: the note is none, does not fit the ids, or the tools are others.
    """
    try:
        found = TypeAdapter(_Note).validate_python(note)
        spans: list[Span] = []
        for entry in found.spans:
            start = spans[-1].end if spans else 0
            spans.append(Span(entry.kind, start, entry.end, tuple(map(_message, entry.messages))))
        transcript = Transcript.of(template, tools, ids, spans)
    except (ValidationError, ValueError) as error:
        raise StoreError(f"{source} does not hold the session of an agent: {error}") from error
    names = [tool.name for tool in tools]
    if found.tools != names:
        raise StoreError(
            f"the session in {source} was begun with the tools {', '.join(found.tools) or 'none'}, this agent has "
            f"{', '.join(names) or 'none'}: restore it with an agent of the same tools in the same order"
        )
    return transcript


def _plain(message: Message) -> _Message:
    match message:
        case ToolResult(name, text):
            return _Message(Role.TOOL, text, name)
        case Assistant(text, calls):
            return _Message(Role.ASSISTANT, text, calls=[_Call(call.name, dict(call.arguments)) for call in calls])
        case System(text) | User(text):
            return _Message(message.role, text)


def _message(plain: _Message) -> Message:
    match plain.role:
        case Role.SYSTEM:
            return System(plain.text)
        case Role.USER:
            return User(plain.text)
        case Role.TOOL:
            return ToolResult(plain.name, plain.text)
        case Role.ASSISTANT:
            return Assistant(plain.text, tuple(Call(call.name, call.arguments) for call in plain.calls))
