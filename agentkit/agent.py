"""`Agent`: tools, instructions and an output type, run by a model in this process."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from agentkit.decision import C, Decision, decide, texts
from agentkit.limits import Limits
from agentkit.loop import Finished, Job, Loop, LoopEvent
from agentkit.result import Restored, RunResult, Session
from agentkit.runtime.errors import AgentError
from agentkit.runtime.request import Sampling
from agentkit.template import ChatTemplate, Message, System, User
from agentkit.tool import Tool, ToolError, toolset
from agentkit.transcript import Transcript
from agentkit.turn import Choice

if TYPE_CHECKING:
    from agentkit.output import Constraint
    from agentkit.runtime.engine import Engine
    from agentkit.runtime.grammar import GrammarSpec

Out = TypeVar("Out")
AgentEvent = LoopEvent | Finished[Any]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine, the chat template of its model, and the grammars made for its turns."""

    engine: Engine
    template: ChatTemplate
    specs: dict[Hashable, GrammarSpec | None] = field(default_factory=dict[Hashable, "GrammarSpec | None"])


#: Set by `agentkit.script`: the model every agent uses inside that block.
override: ContextVar[LoadedModel | None] = ContextVar("agentkit_model", default=None)


class _Lazy:
    """Loads a model once, whoever asks first, on a worker thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: LoadedModel | None = None

    def get(self, model: str | Path | Engine | None) -> LoadedModel:
        with self.lock:
            if self.loaded is None:
                from agentkit.loading import load

                engine = load(model) if model is None or isinstance(model, str | Path) else model
                self.loaded = LoadedModel(engine, ChatTemplate(engine.vocab))
            return self.loaded


@dataclass(frozen=True)
class Agent(Generic[Out]):
    """A model with tools. A value: making one loads nothing, and it keeps no state between runs.

    Attributes:
        tools: functions the model may call, in the order it is shown them.
        output: ``str``, or what the final answer must be: a pydantic model, dataclass, TypedDict, Literal, list, …
        instructions: what the model is told before the task.
        model: a name, a folder, a ``.gguf`` file, or an engine made by `load`. Default: the environment variable
            AGENTKIT_MODEL, else ``smollm2-135m``. Agents that shall share a model are given the same engine.
        limits: of each run.
        sampling: how tokens are chosen.
    """

    tools: Sequence[Tool[..., Any] | Callable[..., Any]] = ()
    output: type[Out] = cast("type[Out]", str)
    _: KW_ONLY
    instructions: str = ""
    model: str | Path | Engine | None = None
    limits: Limits = field(default_factory=Limits)
    sampling: Sampling = field(default_factory=Sampling)
    _lazy: _Lazy = field(default_factory=_Lazy, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", tuple(toolset(self.tools).values()))

    async def run(
        self,
        task: str,
        *,
        deps: object = None,
        session: Session | None = None,
        limits: Limits | None = None,
        tool_choice: Choice | Sequence[Choice] = "auto",
        parallel_tool_calls: bool = True,
    ) -> RunResult[Out]:
        """Run one task to its end; `stream` with nobody watching. For the arguments see there."""
        async with self.stream(
            task,
            deps=deps,
            session=session,
            limits=limits,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
        ) as run:
            async for _ in run:
                pass
        return run.result

    def run_sync(
        self,
        task: str,
        *,
        deps: object = None,
        session: Session | None = None,
        limits: Limits | None = None,
        tool_choice: Choice | Sequence[Choice] = "auto",
        parallel_tool_calls: bool = True,
    ) -> RunResult[Out]:
        """`run` for a program without an event loop."""

        async def main() -> RunResult[Out]:
            return await self.run(
                task,
                deps=deps,
                session=session,
                limits=limits,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
            )

        return anyio.run(main)

    def stream(
        self,
        task: str,
        *,
        deps: object = None,
        session: Session | None = None,
        limits: Limits | None = None,
        tool_choice: Choice | Sequence[Choice] = "auto",
        parallel_tool_calls: bool = True,
    ) -> Run[Out]:
        """Run one task and watch it: ``async with agent.stream(task) as run: async for event in run: ...``.

        Leaving the block early ends the run: the model stops, tools are cancelled, and there is no result; `Run.stop`
        ends it with one.

        Args:
            task: what the user says.
            deps: handed to tools that take a `RunContext`.
            session: go on from there.
            limits: instead of the agent's.
            tool_choice: what the first turn does: ``auto``, ``required``, ``none`` or a tool's name. A list says it for
                as many turns; those after them are free. A tool that may not be called any more is no choice: that
                turn is free as well.
            parallel_tool_calls: whether a turn may hold several calls.

        Raises:
            AgentError: the model cannot be loaded, the task can never fit, the session is of another agent.
        """
        return Run(self, task, deps, session, limits or self.limits, tool_choice, parallel_tool_calls)

    async def decide(
        self, question: str, choices: Iterable[C], *, session: Session | None = None, abstain: float | None = None
    ) -> Decision[C]:
        """How likely the model is to answer with each of some texts: no word is generated.

        The question is a user's turn in the conversation that a run would have, instructions and tools included, so
        both share their pages. Nothing is added to it: say in the question, or in the instructions, what the answers
        are. What is computed is the model's own probability, before `sampling`, that its turn is the text of a choice
        and then ends, divided by the sum over the choices. It is a joint probability, so longer choices tend to have
        less of it: choose texts of about the same length, or give them letters.

        Args:
            question: what the user asks.
            choices: at least two different texts, or Enum members whose values are texts; an Enum class gives all.
            session: ask at its end. It stays as it is; the question is not part of it afterwards.
            abstain: a probability; if the best choice has less, `Decision.choice` is None.

        Raises:
            ValueError: choices that are none, or ``abstain`` outside of 0 to 1.
            AgentError: as for `stream`.
        """
        said = texts(choices)
        if abstain is not None and not 0 <= abstain <= 1:
            raise ValueError(f"abstain must lie between 0 and 1, not {abstain}")
        loaded = await self.load()
        transcript = _transcript(self, loaded, session)
        transcript.append(*_messages(self, transcript, question))
        return await decide(loaded.engine, transcript.ids, said, abstain or 0.0)

    async def restore(self, path: str | Path, *, kv: bool = True) -> Restored:
        """Read a conversation that `Session.save` has written, to go on with ``agent.run(..., session=...)``.

        Its ids are the conversation, and they must be of this model, this tokenizer and these tools. KV only saves
        their prefill: where the file has none, or some of another dtype, page size or layout, or the page pool has no
        room for all of it, what is missing is prefilled by the next run, and the result says so.

        Args:
            path: of the file.
            kv: use the KV of the file. Turn it off for files that others may have made: a checksum tells damage, but
                nobody can tell by looking whether KV is what the model computes, and the engine shares it between all
                conversations that begin alike.

        Raises:
            StoreError: there is no such file, it is damaged, or of another model, tokenizer or other tools. The engine
                is then as it was.
        """
        from agentkit.archive import unpack
        from agentkit.runtime.store import Stored

        loaded = await self.load()
        tools = cast("Sequence[Tool[..., Any]]", self.tools)

        def read() -> Restored:
            with Stored(Path(path)) as stored:
                stored.require(loaded.engine)
                transcript = unpack(stored.note, stored.ids, loaded.template, tools, path)
                cached, missing = stored.restore(loaded.engine, kv=kv)
            return Restored(Session(transcript, loaded.engine), len(stored.ids), cached, missing)

        return await anyio.to_thread.run_sync(read)

    async def load(self) -> LoadedModel:
        """Load the agent's model now rather than at its first run."""
        inside = override.get()
        return inside if inside is not None else await anyio.to_thread.run_sync(self._lazy.get, self.model)


class Run(Generic[Out]):
    """A run in progress: an asynchronous iterator of events, ending with `Finished`."""

    def __init__(
        self,
        agent: Agent[Out],
        task: str,
        deps: object,
        session: Session | None,
        limits: Limits,
        tool_choice: Choice | Sequence[Choice],
        parallel: bool,
    ) -> None:
        self._agent, self._task, self._deps, self._session = agent, task, deps, session
        self._limits, self._parallel = limits, parallel
        self._choices = (tool_choice,) if isinstance(tool_choice, str) else tuple(tool_choice)
        self._send, self._receive = anyio.create_memory_object_stream[AgentEvent](math.inf)
        self._group: TaskGroup | None = None
        self._result: RunResult[Out] | None = None
        self._error: Exception | None = None
        self._running: Loop[Out] | None = None
        self._stopped = False

    @property
    def result(self) -> RunResult[Out]:
        """The outcome, once the events have ended."""
        if self._result is None:
            raise AgentError("the run has not finished: read its events to the end first") from self._error
        return self._result

    @property
    def partial(self) -> Out | None:
        """The output as far as it has been decoded, which may be further than the last event.

        For ``str`` the text of this turn. For a pydantic model, dataclass, TypedDict, list or dict of these, or a JSON
        schema a new value of that type at each call, which has not been validated: strings are as long as they have
        come, what has not arrived is None (a TypedDict lacks it), and a union of several types is None until it is
        complete. None before anything has arrived, and for types without parts.
        """
        if self._result is not None:
            return self._result.output
        return None if self._running is None else self._running.so_far()

    def stop(self) -> None:
        """End the run with what there is, as its caller has enough; the events then end soon, with `Finished`.

        The model stops, tools that run are cancelled, a call that is not complete is not made. The result's ``stop`` is
        ``stopped`` and its output is `partial`; its session goes on from what the model had written. An answer that
        was complete by then is the result as ever.
        """
        self._stopped = True
        if self._running is not None:
            self._running.stop()

    async def __aenter__(self) -> Self:
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(self._drive)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._group is not None
        self._group.cancel_scope.cancel()
        try:
            return await self._group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            if error is not None and len(group.exceptions) == 1:  # the caller's own, wrapped by the task group
                raise error from None
            raise
        finally:
            self._receive.close()

    async def __aiter__(self) -> AsyncIterator[AgentEvent]:
        async for event in self._receive:
            yield event
        if self._error is not None:
            raise self._error

    async def _drive(self) -> None:
        with self._send:
            try:
                self._result = await self._loop()
                self._send.send_nowait(Finished(self._result))
            except Exception as error:
                self._error = error

    async def _loop(self) -> RunResult[Out]:
        loaded = await self._agent.load()
        transcript = _transcript(self._agent, loaded, self._session)
        tools = {tool.name: tool for tool in cast("Sequence[Tool[..., Any]]", self._agent.tools)}
        unknown = [c for c in self._choices if c not in ("auto", "required", "none") and c not in tools]
        if unknown:
            raise ToolError(f"tool_choice names {unknown[0]!r}; the tools are {', '.join(tools) or 'none'}")
        job = Job(
            engine=loaded.engine,
            tools=tools,
            constraint=_constraint(self._agent.output),
            limits=self._limits,
            sampling=self._agent.sampling,
            output=self._agent.output,
            choices=self._choices,
            parallel=self._parallel,
            deps=self._deps,
            specs=loaded.specs,
        )
        messages = _messages(self._agent, transcript, self._task)
        self._running = Loop(job, transcript, self._send.send_nowait)
        if self._stopped:
            self._running.stop()
        return await self._running.run(messages)


def _transcript(agent: Agent[Any], loaded: LoadedModel, session: Session | None) -> Transcript:
    """A conversation of the agent: a new one, or a copy of the session's."""
    tools = cast("Sequence[Tool[..., Any]]", agent.tools)
    if session is None:
        return Transcript(loaded.template, tools)
    if session.engine.runner.digest != loaded.engine.runner.digest:
        raise AgentError(
            f"the session is of {session.engine.name}, this agent runs {loaded.engine.name}: "
            "token ids of one model mean nothing to another"
        )
    if [t.name for t in session.transcript.tools] != [t.name for t in tools]:
        raise AgentError("the session was begun with other tools: continue it with the agent that made it")
    return session.transcript.fork()


def _messages(agent: Agent[Any], transcript: Transcript, task: str) -> list[Message]:
    """What to append for a task; the instructions stand once, at the beginning."""
    messages: list[Message] = [User(task)]
    if not transcript.ids and agent.instructions:
        messages.insert(0, System(agent.instructions))
    return messages


def _constraint(output: type[Out]) -> Constraint[Out] | None:
    if output is str:
        return None
    from agentkit.output import constraint

    return constraint(output)
