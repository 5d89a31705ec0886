"""A conversation whose tools run keeps its pages, whatever else the engine does, and lets go of them afterwards."""

from __future__ import annotations

from contextlib import nullcontext

import anyio
import pytest

from agentkit import Agent, AgentError, CallReady, TurnFinished, call, final, scripted, tool
from agentkit.runtime.engine import Engine, Sizes
from agentkit.script import ScriptError

pytestmark = pytest.mark.anyio

PAGES = 96


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentkit.script.Sizes", lambda **_: Sizes(context=PAGES * 16, pages=PAGES))


def pinned(engine: Engine) -> int:
    return engine._ask(lambda: sum(len(node.pins) for node in engine._tree.nodes()))


async def prefilled(others: int) -> list[int]:
    """Prompt tokens computed in each turn of a run whose tool waits for so many other requests."""

    @tool
    async def wait() -> str:
        """Let others have the engine."""
        for i in range(others):
            await Agent().run(f"{i} " + "x" * 16 * (PAGES // 4))
        return "done"

    turns: list[int] = []
    with scripted(call("wait"), *[final("ok")] * others, final("done")) as engine:
        async with Agent([wait], instructions="Be brief. " * 10).stream("Go on.") as run:
            async for event in run:
                if isinstance(event, TurnFinished):
                    turns.append(event.usage.prefilled)
        engine.check()
        assert pinned(engine) == 0
    return turns


async def test_a_session_whose_tools_run_finds_its_pages_after_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = await prefilled(0)
    assert alone[1] < 150 < alone[0]
    assert await prefilled(12) == alone  # three times the pool
    monkeypatch.setattr(Engine, "pin", lambda *_: nullcontext(), raising=True)
    monkeypatch.setattr("agentkit.loop.Loop._unpin", lambda _: None)
    flooded = await prefilled(12)
    assert flooded[1] > alone[0]  # without the pin all is computed again


@pytest.mark.parametrize("how", ["left", "cancelled"])
async def test_a_run_that_does_not_end_lets_go_of_its_pages(how: str) -> None:
    began = anyio.Event()

    @tool
    async def forever() -> str:
        """Never ends."""
        began.set()
        await anyio.sleep_forever()
        return ""

    with pytest.raises(ScriptError, match="not used"), scripted(call("forever"), final("never")) as engine:
        with anyio.CancelScope() as scope:
            async with Agent([forever]).stream("?") as run:
                async for event in run:
                    if isinstance(event, CallReady):
                        await began.wait()
                    if isinstance(event, TurnFinished):
                        assert pinned(engine)
                        if how == "left":
                            break
                        scope.cancel()
        assert pinned(engine) == 0


async def test_a_run_that_fails_lets_go_of_its_pages() -> None:
    @tool
    def nothing() -> str:
        """Does nothing."""
        return ""

    with scripted(call("nothing")) as engine:
        with pytest.raises(AgentError, match="one more turn"):
            await Agent([nothing]).run("?")
        assert pinned(engine) == 0
