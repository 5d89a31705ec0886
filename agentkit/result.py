"""What a run gives back: its output, how it ended, what it cost, and where a next run can go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import anyio.to_thread

from agentkit import archive
from agentkit.limits import LimitName
from agentkit.runtime.request import Usage
from agentkit.transcript import Transcript

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine
    from agentkit.runtime.store import Saved

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
    engine: Engine

    def fork(self) -> Session:
        """A session of its own that shares every KV page with this one."""
        return Session(self.transcript.fork(), self.engine)

    async def save(self, path: str | Path, *, kv: bool = True) -> Saved:
        """Write the conversation to a file, from which `Agent.restore` goes on, in this program or another.

        Other requests go on meanwhile. The file appears when it is complete; one that was there is replaced.

        Args:
            path: of the file.
            kv: also write the KV of what is cached, so that it need not be computed again. KV is large: tokens times
                layers times 2 × KV heads × head size values. Without it the file holds a few bytes a token.

        Returns:
            How many tokens were written, and how many of them with their KV: none if the engine has been closed.

        Raises:
            StoreError: the file cannot be written.
        """
        from agentkit.runtime.store import save

        note = archive.pack(self.transcript)
        run = partial(save, self.engine, Path(path), tuple(self.transcript.ids), note, kv=kv)
        return await anyio.to_thread.run_sync(run)


@dataclass(frozen=True, slots=True)
class Restored:
    """What `Agent.restore` has found in a file.

    Attributes:
        session: to go on from.
        tokens: of the conversation.
        cached: so many of them, from the first one on, need not be computed: the engine has their KV. The others are
            prefilled by the next run.
        missing: why the engine has less KV than was cached when the session was saved; empty if it has not.
    """

    session: Session
    tokens: int
    cached: int
    missing: str


@dataclass(frozen=True, slots=True)
class RunResult(Generic[Out]):
    """The outcome of a run.

    Attributes:
        output: text, or what the agent's output type says.
        stop: how it ended.
        usage: tokens cached, prefilled, decoded, forced, recomputed, drafted and retried over all turns.
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
