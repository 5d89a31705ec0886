"""One turn of the model: its grammar, and the events that come of it.

A turn is ``text? call*`` or, with a typed output, ``text? call+`` or the final document. Text, calls and final output
are one grammar, so an output type never keeps a model from calling tools. What a turn may do is changed by the grammar
alone: the tools stay in the prompt as they are, and with them the pages of the prompt stay valid.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

from agentkit.runtime.closing import Hints
from agentkit.runtime.errors import SchemaError
from agentkit.runtime.grammar import (
    ChoiceSpec,
    GrammarSpec,
    JsonSpec,
    Judged,
    LarkSpec,
    RegexSpec,
)
from agentkit.runtime.schema.front import examples, inline
from agentkit.runtime.schema.report import SchemaReport
from agentkit.runtime.text import Piece
from agentkit.template import Signature, Tag, Tags

#: ``auto``: the model decides. ``required``: it calls some tool. ``none``: it answers. Else: it calls that tool.
Choice = Literal["auto", "required", "none"] | str

#: Most calls in one turn, so that none goes on for ever.
MAX_CALLS = 32

_HEADER, _MIDDLE = '\n{"name": "', '", "arguments": '
#: Text before a call cannot begin like a JSON document, so that the first character tells the two apart.
_JSON_STARTS = '{["-0123456789tfn'


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of what the model says."""

    text: str


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """More of the final, typed output."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The model calls a tool; its arguments follow.

    Attributes:
        index: which call of the turn, from 0.
    """

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentDelta:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallReady:
    """A call is complete. Its tool starts now, while the model may go on."""

    index: int
    name: str
    arguments: dict[str, Any]


_Reports = list[tuple[str, SchemaReport]]
Event = TextDelta | OutputDelta | CallStarted | ArgumentDelta | CallReady


def turn_spec(
    tools: Sequence[Signature],
    final: GrammarSpec | None,
    tags: Tags,
    *,
    choice: Choice = "auto",
    allowed: frozenset[str] | None = None,
    parallel: bool = True,
) -> GrammarSpec | None:
    """The grammar of one turn.

    Args:
        tools: that the model was shown.
        final: of a typed output; None for text.
        tags: around a call.
        choice: what the turn must do.
        allowed: names that may be called now; None for all.
        parallel: whether a turn may hold several calls.

    Returns:
        None where nothing is constrained: text without tools.

    Raises:
        SchemaError: a tool's schema cannot be used; the message names the tool.
    """
    usable = [t for t in tools if allowed is None or t.name in allowed]
    if choice not in ("auto", "required", "none"):
        usable = [t for t in usable if t.name == choice]
    if not usable or choice == "none":
        # Text without calls needs no grammar where a call begins with a control token: the engine allows none there.
        return final if final is not None or tags.open.token is not None or not tools else _plain(tags)
    schemas = [json.dumps(tool.schema) for tool in usable]
    if isinstance(final, JsonSpec):
        schemas.append(final.schema)
    reports: _Reports = []
    rules = _call_rules(usable, tags, parallel, reports)
    if choice == "auto":
        rules += _final_rules(final, reports)
    verified = {name for name, report in reports if report.status == "verified"}
    judged = [Judged(json.dumps(t.schema), *_header(t.name, tags)) for t in usable if f"tool {t.name}" in verified]
    if isinstance(final, JsonSpec) and "output" in verified:
        judged.append(Judged(final.schema))
    return LarkSpec(
        "\n".join([_start(choice, final, tags), *rules]),
        control=frozenset(t for t in (tags.open.token, tags.close.token) if t is not None),
        hints=Hints(
            json=isinstance(final, JsonSpec),
            # With the line break: in a string of the arguments it would be written as an escape.
            marker=tags.open.text + "\n",
            literals=() if tags.open.token is not None else (tags.open.text,),
            tokens=() if tags.open.token is None else (tags.open.token,),
            examples=tuple(sample for text in schemas for sample in examples(text)),
        ),
        reports=tuple(reports),
        judged=tuple(judged),
    )


def _header(name: str, tags: Tags) -> tuple[str, int | None]:
    """What stands before the arguments of a call, and the control token before that."""
    return ("" if tags.open.token is not None else tags.open.text) + _HEADER + name + _MIDDLE, tags.open.token


def _plain(tags: Tags) -> LarkSpec:
    """Text in which a tag that is ordinary text must not occur."""
    return LarkSpec(f"start: TEXT\n{_text(tags)}")


def _start(choice: Choice, final: GrammarSpec | None, tags: Tags) -> str:
    if choice != "auto":
        return f"start: {_open(tags)} calls"
    ending = f"TEXT\n{_text(tags)}" if final is None else "final"
    if final is not None and not isinstance(final, JsonSpec):  # nothing would tell text from the final output
        return f"start: {_open(tags)} calls | {ending}"
    first = "(?s:.)" if final is None else "[^" + "".join(map(_escaped, _JSON_STARTS)) + r"\s]"
    if tags.open.token is not None:
        return f"start: before? {_open(tags)} calls | {ending}\nbefore: /{first}(?s:.)*/"
    # The tag is ordinary text: the shortest stretch that ends with it is the text before the call.
    return f"start: before calls | {ending}\nbefore[lazy]: /({first}(?s:.)*)?{_pattern(tags.open.text)}/"


def _text(tags: Tags) -> str:
    if tags.open.token is not None:
        return "TEXT: /(?s:.)*/"
    # Where tags are ordinary text, a small model that has read them answers in tags of its own making. So text neither
    # begins with one nor holds one of ours; where tags are control tokens, masks see to that.
    return r"TEXT: /([^<\s](?s:.)*)?/ & ~/(?s:.)*<\/?tool_(?s:.)*/"


def _call_rules(tools: Sequence[Signature], tags: Tags, parallel: bool, reports: _Reports) -> list[str]:
    """The calls of a turn, each after its opening tag, byte for byte as chat templates write them."""
    # A line break is what an untrained model writes after anything: the tag of ordinary text follows without one, so
    # that one more call is a choice of its own, beside the end of the turn.
    line = "" if tags.open.token is None else '"\\n" '
    again = f" ({line}{_open(tags)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    close = f'"\\n" {_token(tags.close)}' if tags.close.token is not None else _literal("\n" + tags.close.text)
    names = [f"tool{i}" for i in range(len(tools))]
    rules = [f"calls: call{again}", f'call: "\\n{{\\"name\\": \\"" ({" | ".join(names)}) "}}" {close}']
    for name, tool in zip(names, tools, strict=True):
        try:
            front = inline(json.dumps(tool.schema), "call")
        except SchemaError as error:
            raise SchemaError(f"The arguments of the tool {tool.name}: {error}", error.pointer) from None
        reports.append((f"tool {tool.name}", front.report))
        rules.append(f"{name}: {_literal(tool.name + _MIDDLE)} %json {json.dumps(front.schema)}")
    return rules


def _final_rules(final: GrammarSpec | None, reports: _Reports) -> list[str]:
    match final:
        case None:
            return []
        case JsonSpec(text, style):
            front = inline(text, style)
            reports.append(("output", front.report))
            return [f"final: %json {json.dumps(front.schema)}"]
        case RegexSpec(pattern):
            return [f"final: FINAL\nFINAL: /{pattern.replace('/', chr(92) + '/')}/"]
        case ChoiceSpec(options):
            return ["final: FINAL\nFINAL: " + " | ".join(map(_literal, options))]
        case LarkSpec():
            raise SchemaError(
                "An output type that is a grammar cannot be used beside tools. Use a schema, a regular expression or a "
                "choice, or leave the tools out."
            )


def _open(tags: Tags) -> str:
    return _token(tags.open)


def _token(tag: Tag) -> str:
    return _literal(tag.text) if tag.token is None else f"<[{tag.token}]>"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    return "".join(map(_escaped, text))


def _escaped(char: str) -> str:
    return char if char.isalnum() or char in '<>_"' else "\\" + char


class _State(Enum):
    TEXT = auto()
    HEADER = auto()
    ARGUMENTS = auto()
    CLOSING = auto()


class TurnParser:
    """Turns the pieces of one turn into events, in one pass.

    What arrives was generated under the turn's grammar, so there is nothing to recover from: the parser only has to
    know where it is.

    Args:
        tags: around a call.
        final: of a typed output, as given to `turn_spec`.
    """

    def __init__(self, tags: Tags, final: GrammarSpec | None = None) -> None:
        self._tags, self._final = tags, final
        self._state = _State.TEXT
        self._held = ""  # text that may turn out to be part of a tag or a header
        self._kind: type[TextDelta | OutputDelta] | None = None
        self._calls = 0
        self._name = ""
        self._arguments: list[str] = []
        self._depth, self._string, self._escape = 0, False, False

    def feed(self, piece: Piece) -> list[Event]:
        """The events that a piece brings about."""
        if piece.control is not None:
            return self._tag(piece.control)
        events: list[Event] = []
        self._held += piece.text
        while self._step(events):
            pass
        return events

    @property
    def in_text(self) -> bool:
        """Whether the turn stands in text, neither in a call nor in a typed output."""
        return self._state is _State.TEXT and not self._calls and self._kind is not OutputDelta

    @property
    def between(self) -> bool:
        """Whether the turn stands outside of calls, and what came last cannot be the beginning of one."""
        return self._state is _State.TEXT and not self._held

    def end(self) -> list[Event]:
        """The text that was still held back, once the turn has ended."""
        held, self._held = self._held, ""
        return self._say(held) if self._state is _State.TEXT else []

    def _tag(self, token: int) -> list[Event]:
        """A control token: a tag, or an end token, which says nothing here."""
        if token == self._tags.open.token:
            events = self.end()
            self._state = _State.HEADER
            return events
        if token == self._tags.close.token:
            self._state, self._held = _State.TEXT, ""
        return []

    def _step(self, events: list[Event]) -> bool:
        """Take what can be taken from the held text; True if there may be more."""
        match self._state:
            case _State.TEXT:
                return self._in_text(events)
            case _State.HEADER:
                return self._in_header(events)
            case _State.ARGUMENTS:
                return self._in_arguments(events)
            case _State.CLOSING:
                return self._in_closing()

    def _in_text(self, events: list[Event]) -> bool:
        if self._tags.open.token is not None:
            events += self.end()
            return False
        before, found, after = self._held.partition(self._tags.open.text)
        if found:
            events += self._say(before)
            self._state, self._held = _State.HEADER, after
            return bool(after)
        keep = next((n for n in range(len(found or self._tags.open.text) - 1, 0, -1) if self._begins(n)), 0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        events += self._say(text)
        return False

    def _begins(self, size: int) -> bool:
        return size <= len(self._held) and self._tags.open.text.startswith(self._held[-size:])

    def _say(self, text: str) -> list[Event]:
        if not text or self._calls:  # after a call there is only the line break before the next one
            return []
        if self._kind is None:
            typed = self._final is not None and (not isinstance(self._final, JsonSpec) or text[0] in _JSON_STARTS)
            self._kind = OutputDelta if typed else TextDelta
        return [self._kind(text)]

    def _in_header(self, events: list[Event]) -> bool:
        name, found, after = self._held.partition(_MIDDLE)
        if not found:
            return False
        self._name = name.removeprefix(_HEADER)
        events.append(CallStarted(self._calls, self._name))
        self._state, self._held = _State.ARGUMENTS, after
        self._arguments, self._depth = [], 0
        return bool(after)

    def _in_arguments(self, events: list[Event]) -> bool:
        """Follow brackets and strings up to the end of the arguments object."""
        end = 0
        for char in self._held:
            end += 1
            if self._string:
                if self._escape:
                    self._escape = False
                elif char == "\\":
                    self._escape = True
                elif char == '"':
                    self._string = False
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    break
        if end:
            self._arguments.append(self._held[:end])
            events.append(ArgumentDelta(self._calls, self._held[:end]))
        self._held = self._held[end:]
        if end == 0 or self._depth:
            return False
        events.append(CallReady(self._calls, self._name, json.loads("".join(self._arguments))))
        self._calls += 1
        self._state = _State.CLOSING
        return True

    def _in_closing(self) -> bool:
        """Drop what stands after the arguments: ``}``, a line break, the closing tag."""
        if self._tags.close.token is not None:
            self._held = ""
            return False
        _, found, after = self._held.partition(self._tags.close.text)
        if found:
            self._state, self._held = _State.TEXT, after
        return bool(found and after)
