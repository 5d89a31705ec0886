"""The loop of an agent, one turn after the other: prepare, decode, act, append.

A tool starts the moment its call is complete, while the model may still be writing the next one. What a turn costs
does not depend on how long the conversation is: ids are appended, the prefix is found in the engine's tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread

from agentkit.limits import LimitName, Limits, Meter
from agentkit.output import Constraint, OutputError
from agentkit.result import CallRecord, RunResult, Session, Stop
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import AgentError, CapacityError, DocumentError
from agentkit.runtime.generation import Generation
from agentkit.runtime.grammar import GrammarSpec
from agentkit.runtime.pins import Pin
from agentkit.runtime.request import Finish, Progress, Request, Sampling, Usage
from agentkit.runtime.text import Detokenizer
from agentkit.template import Assistant, Call, Message, ToolResult, User
from agentkit.tool import RunContext, Tool
from agentkit.transcript import Transcript
from agentkit.turn import CallReady, Choice, Event, OutputDelta, TextDelta, TurnParser, turn_spec

Out = TypeVar("Out")
_CHOICES = ("auto", "required", "none")
#: Where results have less room than this each, what stands around them is counted too.
_RESULT_TOKENS = 256
#: A result of which less than this would be left at either end is left out whole.
_SHORTEST_PART = 8


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """The model is reading a prompt that takes it more than one step; where one is enough there is no such event.

    Attributes:
        step: which turn, from 0.
        done: tokens of the prompt that it has read, those kept from earlier turns included; it never falls.
        total: tokens of the prompt.
        recomputed: tokens read a second time so far because memory was short: while they are, ``done`` stands still.
    """

    step: int
    done: int
    total: int
    recomputed: int


@dataclass(frozen=True, slots=True)
class ToolFinished:
    """A tool has returned, failed or run out of time.

    Attributes:
        index: which call of the turn, from 0.
        record: the call and its result.
    """

    index: int
    record: CallRecord


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The model has ended a turn; tools it called may still run.

    Attributes:
        step: which turn, from 0.
        usage: its tokens.
    """

    step: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Finished(Generic[Out]):
    """The last event of a run."""

    result: RunResult[Out]


@dataclass(frozen=True, slots=True)
class Job(Generic[Out]):
    """Everything a run needs that does not change while it runs.

    Attributes:
        engine: the model.
        tools: by name, in the order the model was shown them.
        constraint: of a typed output; None for text.
        limits: how long it may take.
        sampling: how tokens are chosen.
        choices: what the first turns must do, one after the other; later ones are free.
        deps: handed to tools that take a `RunContext`.
        specs: grammars of turns made so far, kept from run to run of one agent.
    """

    engine: Engine
    tools: Mapping[str, Tool[..., Any]]
    constraint: Constraint[Out] | None
    limits: Limits
    sampling: Sampling
    choices: tuple[Choice, ...] = ()
    deps: object = None
    specs: dict[Hashable, GrammarSpec | None] = field(default_factory=dict[Hashable, "GrammarSpec | None"])


@dataclass(slots=True)
class _Turn:
    """One turn as it comes in."""

    text: list[str] = field(default_factory=list[str])
    calls: list[Call] = field(default_factory=list[Call])
    records: dict[int, CallRecord] = field(default_factory=dict[int, CallRecord])
    ids: list[int] = field(default_factory=list[int])
    finish: Finish | None = None
    sound: int = 0  # ids of what it says and of its complete calls
    rejected: DocumentError | None = None  # it ended in a document that fails its schema
    unfinished: bool = False  # its budget ended before it came to a call or an answer


LoopEvent = Event | PrefillProgress | ToolFinished | TurnFinished


class Loop(Generic[Out]):
    """Runs one task to its end.

    Args:
        job: what to run with.
        transcript: of the conversation; the loop appends to it.
        emit: receives every event as it happens.
    """

    def __init__(self, job: Job[Out], transcript: Transcript, emit: Callable[[LoopEvent], None]):
        self.job, self.transcript, self.emit = job, transcript, emit
        self.meter = Meter(job.limits, job.engine.sizes.context, transcript.ids, bool(job.tools))
        self.usage = Usage()
        self.records: list[CallRecord] = []
        self._pin: Pin | None = None  # of a turn with calls, until the next turn has found its pages

    async def run(self, messages: Sequence[Message]) -> RunResult[Out]:
        """Append the messages and take turns until the model answers."""
        try:
            return await self._run(messages)
        finally:
            self._unpin()

    async def _run(self, messages: Sequence[Message]) -> RunResult[Out]:
        self.transcript.append(*messages)
        retried = False
        while True:
            reached = self.meter.reached
            turn = await self._turn(reached)
            if reached is None and turn.unfinished:
                reached = self.meter.scarcest or "tokens"  # what is left holds no call, but it may hold an answer
                turn = await self._turn(reached)
            text = "".join(turn.text)
            if turn.calls:
                text = text.removesuffix("\n")  # the template writes it between the text and the first call
            self.transcript.emit(turn.ids, Assistant(text, tuple(turn.calls)))
            self.meter.step += 1
            if turn.calls:
                self.transcript.append(*self._results(turn))
            if turn.calls and turn.rejected is None:
                continue
            cut = turn.finish is not None and turn.finish.reason == "length"
            stop: Stop = reached or ("length" if cut else "answer")
            try:
                if turn.rejected is not None:
                    raise OutputError(str(turn.rejected)) from turn.rejected
                return self._result(text, stop)
            except OutputError as error:
                if retried or self.meter.reached or self.meter.room <= 2 * self.meter.reserve:
                    raise
                retried = True
                self.transcript.append(User(f"This answer is not accepted: {error}. Answer again."))

    # prepare

    async def _request(self, reached: LimitName | None) -> Request:
        if self.meter.room < 2:
            raise CapacityError(
                f"the conversation has {len(self.transcript.ids)} tokens and fills the context of "
                f"{self.meter.context}: begin a new session, or load the model with a larger `context`"
            )
        names = list(self.job.tools)
        allowed = self.meter.usable(names)
        step = self.meter.step
        choice: Choice = self.job.choices[step] if step < len(self.job.choices) else "auto"
        if reached or not allowed or (choice not in _CHOICES and choice not in allowed):
            choice = "none" if reached or not allowed else "auto"
        spec = await self._spec(choice, allowed)
        return Request(
            ids=self.transcript.ids,
            max_tokens=self.meter.turn_tokens(reached is not None),
            grammar=spec,
            sampling=self.job.sampling,
        )

    async def _spec(self, choice: Choice, allowed: frozenset[str]) -> GrammarSpec | None:
        """The grammar of a turn. Checking schemas takes milliseconds: off the event loop, and once."""
        job = self.job
        tags = self.transcript.template.tool_format.tags
        final = None if job.constraint is None else job.constraint.spec
        key = (tuple(job.tools.values()), final, choice, allowed)
        if key not in job.specs:
            build = partial(turn_spec, list(job.tools.values()), final, tags, choice=choice, allowed=allowed)
            job.specs[key] = await anyio.to_thread.run_sync(build)
        return job.specs[key]

    # decode

    async def _turn(self, reached: LimitName | None) -> _Turn:
        turn = _Turn()
        request = await self._request(reached)
        failure: AgentError | None = None
        async with anyio.create_task_group() as tools:
            try:
                async with self.job.engine.generate(request) as generation:
                    await self._read(
                        generation, turn, tools.start_soon, self.meter.seconds_left if not reached else None
                    )
                self._unpin()
                if turn.calls:  # tools may run for long, and other requests meanwhile
                    self._pin = self.job.engine.pin([*self.transcript.ids, *turn.ids])
            except DocumentError as error:  # complete calls have been made, and their tools run on
                self._reject(turn, error)
            except AgentError as error:  # raised below: inside, it would come out as a group of exceptions
                turn.unfinished = (
                    isinstance(error, CapacityError) and reached is None and self.meter.scarcest is not None
                )
                failure = None if turn.unfinished else error
                tools.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return turn

    async def _read(
        self, generation: Generation, turn: _Turn, start: Callable[..., object], seconds: float | None
    ) -> None:
        """Take in a turn; when its time is up, have the engine bring it to its end."""
        detokenizer = Detokenizer(self.job.engine.vocab)
        constraint = self.job.constraint
        final = None if constraint is None else constraint.spec
        parser = TurnParser(self.transcript.template.tool_format.tags, final)

        async def read() -> None:
            async for chunk in generation.watch():
                if isinstance(chunk, Progress):
                    self.emit(PrefillProgress(self.meter.step, chunk.done, chunk.total, chunk.recomputed))
                    continue
                if chunk.closing and final is not None and parser.in_text:
                    turn.unfinished = True  # the way out of text is a call that the model has not chosen
                    continue
                turn.ids.extend(chunk.ids)
                act = self._refuse if chunk.closing else self._act
                for piece in detokenizer.feed_many(chunk.ids):
                    self._take(turn, parser.feed(piece), partial(start, act))
                if parser.between:
                    turn.sound = len(turn.ids)

        with anyio.move_on_after(seconds) as scope:
            await read()
        if scope.cancelled_caught:
            self.job.engine.hasten(generation)
            await read()
        for piece in detokenizer.flush():
            self._take(turn, parser.feed(piece), partial(start, self._act))
        self._take(turn, parser.end(), partial(start, self._act))
        assert generation.finish is not None
        turn.finish = generation.finish
        turn.unfinished |= not turn.ids
        self._account(turn.finish.usage, len(generation.ids))

    def _account(self, usage: Usage, tokens: int) -> None:
        self.usage += usage
        self.meter.tokens += tokens
        self.emit(TurnFinished(self.meter.step, usage))

    def _reject(self, turn: _Turn, error: DocumentError) -> None:
        """A turn has ended in a document that was held back: as an answer the model may read it, as a call it is left
        out, since a call that nobody answers is none that a template could write."""
        self._account(error.usage, len(turn.ids) + len(error.ids))
        turn.rejected = error
        if error.whole:
            turn.ids += error.ids
            turn.text.append(
                self.job.engine.vocab.decode(t for t in error.ids if t not in self.job.engine.vocab.end_ids)
            )
        else:
            del turn.ids[turn.sound :]

    def _take(self, turn: _Turn, events: Sequence[Event], start: Callable[..., object]) -> None:
        for event in events:
            self.emit(event)
            if isinstance(event, TextDelta | OutputDelta):
                turn.text.append(event.text)
            elif isinstance(event, CallReady):
                turn.calls.append(Call(event.name, event.arguments))
                self.meter.calls[event.name] = self.meter.calls.get(event.name, 0) + 1
                start(turn, event)

    # act

    async def _act(self, turn: _Turn, call: CallReady) -> None:
        """Run one tool. Whatever goes wrong in it becomes a result the model can read."""
        tool = self.job.tools[call.name]
        began = time.monotonic()
        left = self.meter.seconds_left
        failed = True
        try:
            with anyio.fail_after(left):
                context = RunContext(self.job.deps, call.name, self.meter.step, call.index)
                text = await tool.call(tool.validate(call.arguments), context)
                failed = False
        except TimeoutError as error:
            text = f"Error: {str(error) or 'the time of the run is up'}"
        except Exception as error:
            text = f"Error: {type(error).__name__}: {error}"
        record = CallRecord(call.name, call.arguments, text, failed, time.monotonic() - began)
        turn.records[call.index] = record
        self.emit(ToolFinished(call.index, record))

    async def _refuse(self, turn: _Turn, call: CallReady) -> None:
        """A call whose arguments were cut short by the budget is not made: half a file name is another file."""
        text = "Error: this call was cut at the token limit and has not been made. Make it again with less in it."
        record = CallRecord(call.name, call.arguments, text, True, 0.0)
        turn.records[call.index] = record
        self.emit(ToolFinished(call.index, record))

    def _unpin(self) -> None:
        if self._pin is not None:
            self._pin.close()
            self._pin = None

    # append

    def _results(self, turn: _Turn) -> list[Message]:
        """The results of a turn in the order of its calls, each cut to what the context can take."""
        ordered = [turn.records[i] for i in range(len(turn.calls))]
        self.records += ordered
        room = self.meter.room - self.meter.reserve
        most = min(self.job.limits.result_tokens, max(0, room) // (2 * len(ordered)))
        results: list[Message] = [ToolResult(r.name, self._cut(r.result, most)) for r in ordered]
        # Tags, names and notes take room as well, which counts only where there is hardly any.
        encode = self.transcript.template.encode_next
        while most and room < _RESULT_TOKENS * len(ordered) and len(encode(results)) > room:
            most //= 2
            results = [ToolResult(r.name, self._cut(r.result, most)) for r in ordered]
        return results

    def _cut(self, text: str, most: int) -> str:
        """Keep head and tail of a text of more than ``most`` tokens, and say what is missing."""
        vocab = self.job.engine.vocab
        if len(text) <= most:  # a token is at least a byte, so this many characters need no counting
            return text
        # Tokens are at most a few characters; a megabyte need not be encoded whole to see that it is too long.
        window = 16 * max(most, 1)
        if len(text) > 2 * window:
            head, tail = vocab.encode(text[:window]), vocab.encode(text[-window:])
            count = f"about {len(text) * (len(head) + len(tail)) // (2 * window)}"
        else:
            head = tail = vocab.encode(text)
            count = str(len(head))
            if len(head) <= most:
                return text
        half = most // 2
        if half < _SHORTEST_PART:
            return f"[... cut: {count} tokens ...]"
        note = f"\n[... cut: {count} tokens, shown are the first and last {half}; ask for a smaller part ...]\n"
        return vocab.decode(head[:half]) + note + vocab.decode(tail[-half:])

    def _result(self, text: str, stop: Stop) -> RunResult[Any]:
        constraint = self.job.constraint
        return RunResult(
            output=text if constraint is None else constraint.parse(text),
            stop=stop,
            usage=self.usage,
            calls=tuple(self.records),
            seconds=time.monotonic() - self.meter.started,
            session=Session(self.transcript, self.job.engine),
        )
