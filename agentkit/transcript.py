"""The token log of a conversation: ids that are only ever appended, and the messages they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from agentkit.runtime.errors import AgentError
from agentkit.template import Assistant, ChatTemplate, Message, Signature

Kind = Literal["prompt", "system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the log that was appended at once.

    Attributes:
        kind: ``prompt`` for the first stretch (tools, instructions, history); ``assistant`` for what the
            model emitted; otherwise the role of the first of `messages`.
        start, end: positions in the log, the end exclusive. The span of a later input begins with the token
            that ends the turn before it, and ends where the model's turn begins.
        messages: what the stretch stands for.
    """

    kind: Kind
    start: int
    end: int
    messages: tuple[Message, ...]


class Log(Sequence[int]):
    """A read-only view of a list of ids that may still grow."""

    __slots__ = ("_ids",)

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._ids[index]

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"Log({len(self._ids)} ids)"


class Transcript:
    """One conversation as an append-only list of token ids.

    `append` encodes text once, when it arrives. `emit` takes the ids of a turn as the model produced them,
    which need not be those that its text would encode to. The log never holds the end token the model
    stopped with: the next `append` begins with the one the template writes, so it stands there once and
    only when it is needed.

    Args:
        template: encodes the text.
        tools: shown to the model at the beginning, in this order, for the whole conversation.
    """

    def __init__(self, template: ChatTemplate, tools: Sequence[Signature] = ()) -> None:
        self.template = template
        self.tools = tuple(tools)
        self._ids: list[int] = []
        self._spans: list[Span] = []

    @classmethod
    def of(
        cls, template: ChatTemplate, tools: Sequence[Signature], ids: Sequence[int], spans: Sequence[Span]
    ) -> Transcript:
        """A log as it was, from its ids and `spans`.

        Raises:
            ValueError: the spans do not cover the ids in order, or do not begin with the prompt.
        """
        ends = [0, *(span.end for span in spans)]
        if [span.start for span in spans] != ends[:-1] or ends != sorted(ends) or ends[-1] != len(ids):
            raise ValueError(f"the spans end at {ends[1:]}, which are no stretches of {len(ids)} ids in order")
        if any((span.kind == "prompt") != (i == 0) for i, span in enumerate(spans)):
            raise ValueError("the first span, and no other, is the prompt")
        transcript = cls(template, tools)
        transcript._ids += ids
        transcript._spans += spans
        return transcript

    @property
    def ids(self) -> Log:
        """Every id so far. The view grows with the log."""
        return Log(self._ids)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The stretches of the log, in order and without gaps."""
        return tuple(self._spans)

    @property
    def awaits_model(self) -> bool:
        """Whether the log ends where a turn of the model begins."""
        return bool(self._spans) and self._spans[-1].kind != "assistant"

    def messages(self) -> list[Message]:
        """The conversation as messages."""
        return [message for span in self._spans for message in span.messages]

    def append(self, *messages: Message) -> Span:
        """Encode what was said to the model and open its next turn.

        If the turn before was left without an answer, it stands in the log as an empty turn of the model.

        Raises:
            AgentError: no messages.
        """
        if not messages:
            raise AgentError("There is nothing to append: give at least one message.")
        if not self._spans:
            return self._extend("prompt", self.template.encode_start(messages, self.tools), messages)
        ids = self.template.encode_next(messages)
        if self.awaits_model:
            self.emit((), Assistant())
        return self._extend(messages[0].role.value, ids, messages)

    def emit(self, ids: Sequence[int], message: Assistant) -> Span:
        """Append a turn of the model as the ids it produced; `message` says what they mean.

        An end token at the end of `ids` is left out, whichever of the model's end tokens it is.

        Raises:
            AgentError: it is not the model's turn.
        """
        if not self.awaits_model:
            raise AgentError("It is not the model's turn: append a message first.")
        ended = bool(ids) and ids[-1] in self.template.vocab.end_ids
        return self._extend("assistant", ids[:-1] if ended else ids, (message,))

    def fork(self) -> Transcript:
        """A copy that goes on by itself. It shares the template, the tools and the messages."""
        other = Transcript(self.template, self.tools)
        other._ids = self._ids.copy()
        other._spans = self._spans.copy()
        return other

    def _extend(self, kind: Kind, ids: Sequence[int], messages: tuple[Message, ...]) -> Span:
        span = Span(kind, len(self._ids), len(self._ids) + len(ids), messages)
        self._ids += ids
        self._spans.append(span)
        return span
