"""What a run gives back: its output, how it ended, what it cost, and where a next run can go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from agentkit.limits import LimitName
from agentkit.runtime.request import Usage
from agentkit.transcript import Transcript

Out = TypeVar("Out", covariant=True)

#: ``answer``: the model answered of itself; a limit's name: it had to; ``length``: its text was cut at
#: `Limits.turn_tokens` (a typed output is never cut).
Stop = Literal["answer", "length"] | LimitName


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One tool call and what came of it.

    Attributes:
        name: of the tool.
        arguments: as the model gave them.
        result: what the model read.
        failed: the tool raised or ran out of time; ``result`` then says so.
        seconds: how long it ran.
    """

    name: str
    arguments: Mapping[str, Any]
    result: str
    failed: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation to go on from: ``agent.run(task, session=result.session)`` prefills the new words alone.

    A value: running on it makes a new one and leaves it as it is, so one session can be continued many ways.
    """

    transcript: Transcript
    model: str

    def fork(self) -> Session:
        """A session of its own that shares every KV page with this one."""
        return Session(self.transcript.fork(), self.model)


@dataclass(frozen=True, slots=True)
class RunResult(Generic[Out]):
    """The outcome of a run.

    Attributes:
        output: text, or what the agent's output type says.
        stop: how it ended.
        usage: tokens cached, prefilled, decoded, forced, recomputed and drafted over all turns.
        calls: every tool call, in order.
        seconds: wall-clock time.
        session: to go on from.
    """

    output: Out
    stop: Stop
    usage: Usage
    calls: tuple[CallRecord, ...]
    seconds: float
    session: Session

    @property
    def transcript(self) -> Transcript:
        """The token log of the conversation, and its messages."""
        return self.session.transcript
