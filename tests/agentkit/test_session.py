"""A session in a file: what an agent saves, another program goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentkit import Agent, AgentError, Limits, Restored, StoreError, call, final, load, reply, scripted, tool
from agentkit.result import Session
from agentkit.runtime.load import Options
from agentkit.runtime.store import save
from tests import smol

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@tool
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool
def note(text: str) -> str:
    """Keep a text."""
    return f"kept: {text}"


AGENT = Agent([add, note], instructions="Be brief.")


async def saved(path: Path) -> Session:
    script = (reply("Hm.", call("add", a=1, b=2), call("note", text='é "\n\ud83d\ude00')), final("3"))
    with scripted(*script):
        session = (await AGENT.run("1 + 2?")).session
        await session.save(path)
    return session


async def test_a_restored_session_is_the_same_conversation(tmp_path: Path) -> None:
    session = await saved(tmp_path / "chat")
    with scripted(final("again")):
        restored = await AGENT.restore(tmp_path / "chat")
        assert restored.tokens == len(session.transcript.ids)
        assert (restored.cached, restored.missing) == (0, "the file holds no KV")  # a script has none
        found = restored.session.transcript
        assert list(found.ids) == list(session.transcript.ids)
        assert found.spans == session.transcript.spans
        assert found.messages() == session.transcript.messages()
        result = await AGENT.run("And now?", session=restored.session)
    assert result.output == "again"
    assert list(result.transcript.ids[: restored.tokens]) == list(session.transcript.ids)


async def test_an_empty_session_and_one_that_waits_for_the_model(tmp_path: Path) -> None:
    with scripted(final("hello")) as engine:
        loaded = await AGENT.load()
        transcript = (await AGENT.run("?")).transcript.fork()
        transcript.append(transcript.messages()[1])
        await Session(transcript, engine).save(tmp_path / "a")
        assert (await AGENT.restore(tmp_path / "a")).session.transcript.awaits_model
        empty = type(transcript)(loaded.template, AGENT.tools)  # pyright: ignore
        await Session(empty, engine).save(tmp_path / "b")
        assert (await AGENT.restore(tmp_path / "b")).tokens == 0


async def test_an_agent_of_other_tools_is_told_so(tmp_path: Path) -> None:
    await saved(tmp_path / "chat")
    with scripted():
        for tools in ([add], [note, add], []):
            with pytest.raises(StoreError, match="begun with the tools add, note, this agent has"):
                await Agent(tools).restore(tmp_path / "chat")


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"tools": ["add", "note"], "spans": []},
        {"tools": "add", "spans": []},
        {"tools": [], "spans": [{"kind": "prompt", "end": 3, "messages": []}]},
        {"tools": [], "spans": [{"kind": "nothing", "end": 4, "messages": []}]},
        {"tools": [], "spans": [{"kind": "user", "end": 4, "messages": []}]},
        {
            "tools": [],
            "spans": [{"kind": "prompt", "end": 9, "messages": []}, {"kind": "tool", "end": 4, "messages": []}],
        },
        {"tools": [], "spans": [{"kind": "prompt", "end": 4, "messages": [{"role": "root", "text": "obey"}]}]},
        {"tools": [], "spans": [{"kind": "prompt", "end": 4, "messages": [{"role": "user", "text": 5}]}]},
        {"tools": [], "spans": [{"kind": "prompt", "end": "four", "messages": []}]},
    ],
)
async def test_a_note_that_does_not_fit_the_ids_is_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with scripted(final("fine")) as engine:
        save(engine, tmp_path / "a", [1, 2, 3, 4], bad)
        with pytest.raises(StoreError, match="does not hold the session"):
            await Agent().restore(tmp_path / "a")
        assert (await Agent().run("?")).output == "fine"


async def test_what_is_no_session_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(json.dumps({"messages": []}))
    with scripted():
        with pytest.raises(StoreError, match="no saved session"):
            await Agent().restore(tmp_path / "a")
        with pytest.raises(StoreError, match="cannot be read"):
            await Agent().restore(tmp_path)


async def test_smollm2_goes_on_from_a_file_and_computes_only_the_new_words(tmp_path: Path) -> None:
    """Greedy, against the same conversation without an interruption."""
    path, options = tmp_path / "chat", Options(device="cpu")
    limits = Limits(turn_tokens=24)

    def agent(engine: Any) -> Agent[str]:
        return Agent(instructions="You answer briefly.", model=engine, limits=limits)

    with load(smol.smol_path(), options) as engine:
        first = await agent(engine).run("Name a river in Europe.")
        told = await first.session.save(path)
        following = await agent(engine).run("And a mountain?", session=first.session)
    assert told.tokens - 2 <= told.kv_tokens <= told.tokens
    with load(smol.smol_path(), options) as engine:
        restored = await agent(engine).restore(path)
        assert restored == Restored(restored.session, told.tokens, told.kv_tokens, "")
        again = await agent(engine).run("And a mountain?", session=restored.session)
        engine.check()
        assert again.output == following.output
        assert list(again.transcript.ids) == list(following.transcript.ids)
        new = again.transcript.spans[2]
        assert again.usage.prefilled == new.end - told.kv_tokens  # the words, and what of the answer was not computed
        with pytest.raises(StoreError, match="other weights"), scripted():
            await AGENT.restore(path)
    with pytest.raises(AgentError, match="token ids of one model"), scripted():
        await Agent(instructions="You answer briefly.").run("?", session=restored.session)
