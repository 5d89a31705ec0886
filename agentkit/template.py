"""The chat template: messages and tools to token ids, with control tokens only from the template itself.

A template joins its own control tokens with text that others wrote, and afterwards nothing tells the two
apart. So the text is *shielded* before rendering: the punctuation that control tokens are written with is
replaced by lone surrogates, which no valid text holds. In what comes out, every literal of a control token
is therefore the template's own; it becomes its id, the stretches between are restored and encoded as
ordinary text. Each stretch is encoded whole, as the reference tokenizer does it, so the ids of a benign
chat are the reference's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar, Literal, NoReturn, Protocol, cast

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentkit.runtime.errors import ModelError
from agentkit.runtime.vocab import Vocabulary
from agentkit.schema import Json, signature

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_RESULT_OPEN, _RESULT_CLOSE = "<tool_response>", "</tool_response>"
# A word that no chat and no template holds, to be found again in a rendering; letters are never shielded.
_PROBE = "agentkitprobe7f3a"


class Role(StrEnum):
    """Who speaks. No other role ever reaches a template."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class System:
    """Instructions of the developer."""

    role: ClassVar[Role] = Role.SYSTEM
    text: str


@dataclass(frozen=True, slots=True)
class User:
    """What the user says."""

    role: ClassVar[Role] = Role.USER
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call the model made: the tool's name and the arguments as JSON values."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Assistant:
    """What the model said in one turn: text, then calls; either may be empty."""

    role: ClassVar[Role] = Role.ASSISTANT
    text: str = ""
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the tool `name` returned, as text."""

    role: ClassVar[Role] = Role.TOOL
    name: str
    text: str


Message = System | User | Assistant | ToolResult


class Signature(Protocol):
    """What a template needs to know of a tool. `agentkit.tool.Tool` has it."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def schema(self) -> Json: ...


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag as text, and its id if it is one control token of the vocabulary."""

    text: str
    token: int | None


@dataclass(frozen=True, slots=True)
class Tags:
    """What stands around one call: `open`, newline, ``{"name": …, "arguments": …}``, newline, `close`."""

    open: Tag
    close: Tag


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model is told of its tools.

    Attributes:
        kind: ``native``: the chat template lists the tools and writes calls between `tags`. ``compact``: it
            cannot, or writes calls in another form; then we put a few lines for each tool into the system
            message, calls into the text of the messages in the same form, and results between tags.
        tags: around a call, in both kinds.
    """

    kind: Literal["native", "compact"]
    tags: Tags


class ChatTemplate:
    """Encodes conversations for one model. Immutable and safe to share between threads.

    Args:
        vocab: the model's vocabulary.
        source: Jinja source of the template; None takes the vocabulary's own.

    Attributes:
        tool_format: how tools are shown to this model.

    Raises:
        ModelError: there is no template, or it does not compile.
    """

    def __init__(self, vocab: Vocabulary, source: str | None = None) -> None:
        source = vocab.chat_template if source is None else source
        if source is None:
            raise ModelError("This checkpoint has no chat template. Use an instruct model, or pass the Jinja source.")
        self.vocab = vocab
        try:
            self._template = _compile(source)
        except TemplateError as error:
            raise ModelError(f"The chat template does not compile: {error}. Pass a corrected Jinja source.") from error
        self._shield = Shield(vocab.control)
        tags = Tags(Tag(_OPEN, vocab.control.get(_OPEN)), Tag(_CLOSE, vocab.control.get(_CLOSE)))
        self.tool_format = ToolFormat("native" if self._knows_tools() else "compact", tags)

    def encode_start(self, messages: Sequence[Message], tools: Sequence[Signature] = ()) -> list[int]:
        """Ids of a whole conversation so far with its tools, up to where the model's next turn begins.

        Raises:
            ModelError: the template refuses the conversation.
        """
        return self._encode(self._render(messages, tools))

    def encode_next(self, messages: Sequence[Message]) -> list[int]:
        """Ids that follow a turn of the model: the end of that turn, `messages`, the beginning of the next.

        The turn's own ids must end just before the end-of-turn token, which is the first id returned.

        Raises:
            ModelError: the template refuses the messages, or does not write what an assistant says.
        """
        # Only the template knows what ends a turn: render one that can be found again and take the rest.
        rendered = self._render([User(_PROBE), Assistant(_PROBE * 2), *messages], ())
        _, found, rest = rendered.partition(_PROBE * 2)
        if not found:
            raise ModelError("The chat template drops the text of an assistant's turn. Pass another Jinja source.")
        return self._encode(rest)

    def _knows_tools(self) -> bool:
        """Whether the template lists tools and writes calls in the form that the turn's grammar produces."""
        question = _plain(User("q"))
        called = Call(f"{_PROBE}call", {"a": 1})
        try:
            listing = self._fill([question], [_function(_PROBE, "", {"type": "object", "properties": {}})])
            history = self._fill([question, _native(Assistant("", (called,))), question])
        except ModelError:
            return False
        return _PROBE in listing and _call(called) in history

    def _render(self, messages: Sequence[Message], tools: Sequence[Signature]) -> str:
        """Shielded text of the conversation, ending where the model goes on."""
        covered = [self._cover(message) for message in messages]
        if self.tool_format.kind == "native":
            shown = [_function(tool.name, tool.description, tool.schema) for tool in tools]
            return self._fill([_native(message) for message in covered], cast("list[Json]", self._shield.cover(shown)))
        if tools:
            head = covered.pop(0).text if covered and isinstance(covered[0], System) else ""
            listing = "\n".join(self._shield.text(_entry(tool)) for tool in tools)
            covered.insert(0, System(_instructions(head, listing)))
        return self._fill(_compact(covered))

    def _cover(self, message: Message) -> Message:
        """The same message with all its text shielded."""
        cover = self._shield.text
        match message:
            case System(text):
                return System(cover(text))
            case User(text):
                return User(cover(text))
            case ToolResult(name, text):
                return ToolResult(cover(name), cover(text))
            case Assistant(text, calls):
                covered = [
                    Call(cover(call.name), cast("Json", self._shield.cover(dict(call.arguments)))) for call in calls
                ]
                return Assistant(cover(text), tuple(covered))

    def _fill(self, messages: list[Json], tools: list[Json] | None = None) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=True,
                bos_token=self.vocab.bos_text,
                eos_token=self.vocab.eos_text,
            )
        except Exception as error:  # a template is a program of the checkpoint's author: it can raise anything
            raise ModelError(
                f"The model's chat template refuses this conversation: {error}. Change the order of the "
                "messages, or pass another template."
            ) from error

    def _encode(self, rendered: str) -> list[int]:
        ids: list[int] = []
        for part in self._shield.split(rendered):
            control = self.vocab.control.get(part)
            ids += self.vocab.encode(self._shield.restore(part)) if control is None else [control]
        return ids


class Shield:
    """Keeps text that others wrote apart from the control tokens of a template, through its rendering.

    The punctuation that occurs in control literals is replaced in shielded text by lone surrogates, one for
    each character, so that lengths, white space and emptiness stay what they were. Lone surrogates that were
    there before become U+FFFD, as they cannot be encoded anyway. However a template cuts and joins shielded
    texts, no control literal can come out of them: it would have to write all of its punctuation itself.
    """

    def __init__(self, literals: Iterable[str]) -> None:
        ordered = sorted(literals, key=len, reverse=True)  # the longest literal wins, as in the tokenizer
        chars = sorted({char for literal in ordered for char in _punctuation(literal)})
        self._substitutes = {char: chr(0xD800 + i) for i, char in enumerate(chars)}
        self._originals = {ord(substitute): char for char, substitute in self._substitutes.items()}
        self._literal = re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None

    def text(self, text: str) -> str:
        """`text` shielded."""
        text = _SURROGATE.sub("\ufffd", text)
        for char, substitute in self._substitutes.items():
            text = text.replace(char, substitute)
        return text

    def cover(self, value: object) -> object:
        """A JSON value with every string in it shielded, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            members = cast("Mapping[str, object]", value)
            return {self.text(str(key)): self.cover(member) for key, member in members.items()}
        if isinstance(value, list | tuple):
            return [self.cover(member) for member in cast("Sequence[object]", value)]
        return value

    def split(self, rendered: str) -> list[str]:
        """`rendered` cut at its control literals, which are parts of their own."""
        return self._literal.split(rendered) if self._literal else [rendered]

    def restore(self, text: str) -> str:
        """`text` as it was before it was shielded."""
        return text if text.isascii() else text.translate(self._originals)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _punctuation(literal: str) -> str:
    """The characters to shield: templates compare letters and trim white space, but not these."""
    return "".join(char for char in literal if not char.isalnum() and not char.isspace()) or literal[0]


def _plain(message: System | User | Assistant) -> Json:
    return {"role": message.role.value, "content": message.text}


def _native(message: Message) -> Json:
    """The message in the form that transformers hands to chat templates."""
    if isinstance(message, ToolResult):
        return {"role": message.role.value, "name": message.name, "content": message.text}
    plain = _plain(message)
    if isinstance(message, Assistant) and message.calls:
        plain["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in message.calls
        ]
    return plain


def _function(name: str, description: str, schema: Json) -> Json:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _compact(messages: Iterable[Message]) -> list[Json]:
    """The messages with calls and results as text; results that follow each other share one user message."""
    compact: list[Json] = []
    results: list[str] = []
    for message in messages:
        if isinstance(message, ToolResult):
            results.append(f"{_RESULT_OPEN}\n{message.text}\n{_RESULT_CLOSE}")
            continue
        compact += [_plain(User("\n".join(results)))] if results else []
        results = []
        if isinstance(message, Assistant):
            calls = "".join(map(_call, message.calls))  # no line break between them: see `turn._call_rules`
            message = Assistant("\n".join(filter(None, [message.text, calls])))
        compact.append(_plain(message))
    return compact + ([_plain(User("\n".join(results)))] if results else [])


def _call(call: Call) -> str:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return f'{_OPEN}\n{{"name": "{call.name}", "arguments": {arguments}}}\n{_CLOSE}'


def _entry(tool: Signature) -> str:
    """One tool on one line, and a line for each argument that is described."""
    members = cast("dict[str, Json]", tool.schema.get("properties", {}))
    described = {name: _first(str(member.get("description", ""))) for name, member in members.items()}
    lines = [
        f"{tool.name}({signature(tool.schema)})",
        *(f"- {name}: {text}" for name, text in described.items() if text),
    ]
    if text := _first(tool.description):
        lines[0] += f": {text}"
    return "\n".join(lines)


def _first(description: str) -> str:
    """The first paragraph, as small models get lost in more."""
    return " ".join(description.partition("\n\n")[0].split())


def _instructions(system: str, listed: str) -> str:
    """The system message of a model whose template knows no tools.

    The tools stand last and the form of a call holds nothing that could be copied into one: of four layouts this one
    serves the embedded model best (`bench/bfcl.py`).
    """
    form = f'{_OPEN}\n{{"name": ..., "arguments": {{...}}}}\n{_CLOSE}'
    block = f"You can call tools. To call one, write:\n{form}\nThese are the tools:\n{listed}"
    return f"{system}\n\n{block}" if system else block


class _Generation(Extension):
    """``{% generation %}``, with which templates mark what a model is trained on: rendered as its content."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> Template:
    """The template in the environment in which transformers renders: same white space, filters and functions.

    Sandboxed, as a template comes with the weights and is a program.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source, globals=functions)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
