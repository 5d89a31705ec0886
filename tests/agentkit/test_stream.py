"""Watching a run and ending it: fields, partial outputs, a stop with a result; and what a turn may do, by masks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from pydantic import BaseModel

from agentkit import (
    Agent,
    ArgumentDelta,
    CallReady,
    CallStarted,
    FieldDelta,
    FieldReady,
    FieldStarted,
    Finished,
    Limits,
    OutputDelta,
    TextDelta,
    ToolFinished,
    TurnFinished,
    call,
    final,
    reply,
    scripted,
    tool,
)
from agentkit.agent import Run
from agentkit.runtime.engine import Engine
from agentkit.runtime.runner import Output
from agentkit.runtime.sequence import Plan
from agentkit.script import ScriptError
from agentkit.template import Assistant, ToolResult

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@tool
def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


@tool
def now() -> str:
    """The time of day."""
    return "12:00"


class Line(BaseModel):
    name: str
    price: float


class Bill(BaseModel):
    company: str
    lines: list[Line]
    total: float


BILL = Bill(company='Bäckerei "Lind"', lines=[Line(name="Bread", price=4.5)], total=4.5)


@asynccontextmanager
async def step_by_step(engine: Engine) -> AsyncIterator[None]:
    """Let no step of the engine begin before whoever watches has seen what came of the last one."""
    step, loop, free = engine.runner.step, anyio.lowlevel.current_token(), False

    def after_all_have_read(plan: Plan) -> Output:
        if not free:
            anyio.from_thread.run(anyio.wait_all_tasks_blocked, token=loop)
        return step(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "step", after_all_have_read)
        try:
            yield
        finally:
            free = True
            await anyio.wait_all_tasks_blocked()  # the engine's thread may still wait for this loop


async def watch(run: Run[Any], act: Callable[[Any], object] = lambda event: None) -> list[Any]:
    events: list[Any] = []
    async with run:
        async for event in run:
            events.append(event)
            act(event)
    return events


async def test_the_fields_of_an_output_are_events_in_its_order() -> None:
    with scripted(final(BILL)):
        events = await watch(Agent(output=Bill).stream("?"))
    fields = [event for event in events if isinstance(event, FieldStarted | FieldReady)]
    assert [(type(event).__name__[5:], event.path) for event in fields] == [
        ("Started", ()),
        ("Started", ("company",)),
        ("Ready", ("company",)),
        ("Started", ("lines",)),
        ("Started", ("lines", 0)),
        ("Started", ("lines", 0, "name")),
        ("Ready", ("lines", 0, "name")),
        ("Started", ("lines", 0, "price")),
        ("Ready", ("lines", 0, "price")),
        ("Ready", ("lines", 0)),
        ("Ready", ("lines",)),
        ("Started", ("total",)),
        ("Ready", ("total",)),
        ("Ready", ()),
    ]
    assert fields[-1] == FieldReady((), BILL.model_dump())
    grown = [event.text for event in events if isinstance(event, FieldDelta) and event.path == ("company",)]
    assert (len(grown) > 5, "".join(grown)) == (True, BILL.company)
    assert "".join(event.text for event in events if isinstance(event, OutputDelta)) == BILL.model_dump_json().replace(
        ",", ", "
    ).replace(":", ": ")


async def test_the_arguments_of_each_call_are_fields_too() -> None:
    with scripted(reply("", call("add", a=1, b=40), call("add", a=2)), final("so")):
        events = await watch(Agent([add]).stream("?"))
    ready = [(event.call, event.path, event.value) for event in events if isinstance(event, FieldReady)]
    assert ready == [
        (0, ("a",), 1),
        (0, ("b",), 40),
        (0, (), {"a": 1, "b": 40}),
        (1, ("a",), 2),
        (1, (), {"a": 2}),
    ]
    assert [type(event) for event in events].count(ArgumentDelta) > 2


async def test_an_output_that_is_no_document_has_no_fields() -> None:
    with scripted(final("yes"), final("Well.")):
        assert not [e for e in await watch(Agent(output=Literal["yes", "no"]).stream("?")) if isinstance(e, FieldReady)]
        assert not [e for e in await watch(Agent().stream("?")) if isinstance(e, FieldReady)]


async def test_the_partial_output_is_of_its_type_and_grows_to_the_result() -> None:
    seen: list[Any] = []
    with scripted(call("now"), final(BILL)) as engine:
        async with step_by_step(engine):
            run = Agent([now], Bill).stream("?")
            assert run.partial is None
            await watch(run, lambda event: seen.append(run.partial))
    assert run.partial == run.result.output == BILL
    assert seen[0] is None
    known = [one for one in seen if one is not None]
    assert all(type(one) is Bill for one in known)
    assert any(one.company == "Bäcker" and one.lines is None for one in known)
    assert any(one.lines and one.lines[0].name == "Bread" and one.lines[0].price is None for one in known)


async def test_the_partial_output_of_an_agent_that_talks_is_its_text() -> None:
    seen: list[Any] = []
    with scripted(final("It is noon.")) as engine:
        async with step_by_step(engine):
            run = Agent().stream("?")
            await watch(run, lambda event: seen.append(run.partial))
    assert [one for one in seen if one == "It is"]


async def test_a_stop_ends_a_document_with_what_has_arrived() -> None:
    with scripted(final(BILL), final("again")) as engine:
        async with step_by_step(engine):
            run = Agent(output=Bill).stream("?")
            events = await watch(run, lambda event: event == FieldReady(("company",), BILL.company) and run.stop())
        result = run.result
        assert (result.stop, type(result.output), result.output.company) == ("stopped", Bill, BILL.company)
        assert (result.output.total, result.output.model_fields_set <= {"company", "lines"}) == (None, True)
        assert isinstance(events[-1], Finished)
        assert isinstance(events[-2], TurnFinished)
        assert result.usage.decoded > 10
        said = result.transcript.messages()[-1]
        assert isinstance(said, Assistant)
        assert BILL.model_dump_json().replace(",", ", ").replace(":", ": ").startswith(said.text)
        assert engine.stats().pages_private == 0
        engine.check()
        before = len(result.transcript.ids)
        again = await Agent(instructions="").run("Go on.", session=result.session)
        assert again.output == "again"
        assert again.usage.cached >= before - 16


async def test_a_stop_ends_a_text_where_it_stands() -> None:
    with scripted(final("word " * 50)) as engine:
        async with step_by_step(engine):
            run = Agent([now]).stream("?")
            await watch(run, lambda event: len(run.partial or "") >= 20 and run.stop())
    assert run.result.stop == "stopped"
    assert 20 <= len(run.result.output) <= 23
    assert run.result.output == ("word " * 50)[: len(run.result.output)]


async def test_a_stop_within_a_call_leaves_it_unmade_and_the_log_whole() -> None:
    with scripted(reply("Hm.", call("add", a=123456, b=4)), final("more")) as engine:
        async with step_by_step(engine):
            run = Agent([add]).stream("?")
            await watch(run, lambda event: isinstance(event, FieldStarted) and event.path == ("a",) and run.stop())
        [record] = run.result.calls
        assert (record.failed, "has not been made" in record.result) == (True, True)
        assert (run.result.stop, run.result.output) == ("stopped", "Hm.\n")
        assert isinstance(run.result.transcript.messages()[-1], ToolResult)
        assert (await Agent([add]).run("Go on.", session=run.result.session)).output == "more"


async def test_a_stop_cancels_tools_and_tells_of_each() -> None:
    began, cancelled = anyio.Event(), anyio.Event()

    @tool
    async def forever() -> str:
        """Never ends."""
        began.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()
        return ""

    with scripted(reply("", call("now"), call("forever"))):
        async with Agent([forever, now]).stream("?") as run:
            events: list[Any] = []
            async for event in run:
                events.append(event)
                if isinstance(event, TurnFinished):
                    await began.wait()
                    await anyio.wait_all_tasks_blocked()
                    run.stop()
                    run.stop()
    assert cancelled.is_set()
    assert [(c.name, c.failed) for c in run.result.calls] == [("now", False), ("forever", True)]
    assert "stopped before this tool had ended" in run.result.calls[1].result
    assert len([event for event in events if isinstance(event, ToolFinished)]) == 2
    assert run.result.stop == "stopped"


async def test_a_stop_before_the_first_token_ends_at_once() -> None:
    with scripted(final("never")) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "hasten", lambda generation: pytest.fail("nothing has been decoded"))
        async with step_by_step(engine):
            run = Agent(output=Bill).stream("x" * 1400)
            await watch(run, lambda event: run.stop())
        assert (run.result.stop, run.result.output) == ("stopped", None)
        assert engine.stats().pages_private == 0
        engine.check()
    with scripted():
        run = Agent().stream("?")
        run.stop()
        await watch(run)
        assert (run.result.stop, run.result.output) == ("stopped", "")


async def test_a_stop_that_comes_too_late_changes_nothing() -> None:
    with scripted(final("done")):
        run = Agent().stream("?")
        await watch(run, lambda event: isinstance(event, Finished) and run.stop())
    assert (run.result.stop, run.result.output) == ("answer", "done")


async def test_without_parallel_calls_a_turn_ends_with_its_call() -> None:
    agent = Agent([add, now])
    with scripted(call("add", a=1, b=2), call("now"), final("3 at noon")):
        result = await agent.run("?", parallel_tool_calls=False)
    assert [record.name for record in result.calls] == ["add", "now"]
    with pytest.raises(ScriptError, match="does not allow"), scripted(reply("", call("now"), call("now"))):
        await agent.run("?", parallel_tool_calls=False)
    with scripted(reply("Both.", call("now"), call("now")), final("noon")):
        assert len((await agent.run("?")).calls) == 2


async def test_masks_leave_the_cached_prefix_as_it_is() -> None:
    """Each turn may do something else; a tool goes out of reach in the middle. Nothing is prefilled twice."""
    script = (
        call("add", a=1, b=2),
        call("now"),
        reply("Hm.", call("add", a=3)),
        final(Line(name="x", price=1)),
    )
    prompts: list[int] = []
    cached: list[int] = []
    with scripted(*script) as engine:
        choices = ["add", "required", "auto", "none"]
        run = Agent([add, now], Line, limits=Limits(calls=2)).stream(
            "?", tool_choice=choices, parallel_tool_calls=False
        )
        for event in await watch(run):
            if isinstance(event, TurnFinished):
                cached.append(event.usage.cached)
                prompts.append(event.usage.cached + event.usage.prefilled)
        ids = run.result.transcript.ids
        assert engine.stats().computed == len(ids) - 1  # nothing follows the document's last token
    assert cached[0] == 0
    assert all(now >= before for now, before in zip(cached[1:], prompts, strict=False))
    assert [c.name for c in run.result.calls] == ["add", "now", "add"]


async def test_a_tool_out_of_reach_is_no_choice_and_the_turn_is_free() -> None:
    with scripted(call("now"), reply("noon")):
        result = await Agent([now], limits=Limits(calls=1)).run("?", tool_choice=["now", "now"])
    assert (result.output, len(result.calls)) == ("noon", 1)
    with scripted(call("now"), call("add", a=1), final("x")):
        result = await Agent([now, add], limits=Limits(calls=1)).run("?", tool_choice=["now", "now"])
    assert [c.name for c in result.calls] == ["now", "add"]


async def test_arguments_may_be_absent_null_or_left_at_their_default() -> None:
    got: list[Any] = []

    @tool
    def look(path: str | None, depth: int = 3, only: list[str] | None = None) -> str:
        """Look."""
        got.append((path, depth, only))
        return "ok"

    calls = (call("look", path=None), call("look", path="a", only=None), call("look", path="b", depth=1, only=["x"]))
    with scripted(reply("", *calls, call("now")), final("done")):
        events = await watch(Agent([look, now]).stream("?"))
    assert sorted(got, key=str) == sorted([(None, 3, None), ("a", 3, None), ("b", 1, ["x"])], key=str)
    starts = [event.name for event in events if isinstance(event, CallStarted)]
    assert starts == ["look"] * 3 + ["now"]
    assert [event.arguments for event in events if isinstance(event, CallReady)][-1] == {}
    with pytest.raises(ScriptError, match="does not allow"), scripted(call("look")):
        await Agent([look]).run("?")
    assert not any(isinstance(event, TextDelta) for event in events[:-10])
