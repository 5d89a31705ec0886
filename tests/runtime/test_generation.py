"""How what the engine's thread writes reaches the event loops that read it."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint, current_token

from agentkit.runtime.generation import Bell, Generation
from agentkit.runtime.request import Chunk, Finish, Request, Usage
from tests import tiny


class Engine:
    """As much of one as a generation needs."""

    def __init__(self) -> None:
        self.bells: list[Bell] = []
        self.aborted: list[int] = []

    def bell(self, loop: object) -> Bell:
        self.bells.append(self.bells[0] if self.bells else Bell(loop))
        return self.bells[-1]

    def start(self, generation: Generation) -> None: ...

    def abort(self, rid: int) -> None:
        self.aborted.append(rid)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_every_reader_of_a_loop_gets_everything(backend: str) -> None:
    """A thread writes as fast as it can to many readers of one bell: no wake-up may be lost between two of them."""
    readers, chunks = 20, 200

    async def main() -> list[list[int]]:
        engine = Engine()
        generations = [Generation(engine, i, Request([1])) for i in range(readers)]  # type: ignore[arg-type]
        entered = threading.Barrier(2)

        def write() -> None:
            entered.wait()
            for number in range(chunks):
                for generation in generations:
                    generation.push(Chunk((number,)))
            for generation in generations:
                generation.push(Finish("stop", Usage()))

        async def read(generation: Generation) -> None:
            async with generation:
                async for _ in generation:
                    pass

        thread = threading.Thread(target=write)
        thread.start()
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for generation in generations:
                    group.start_soon(read, generation)
                await anyio.wait_all_tasks_blocked()
                entered.wait()
        thread.join()
        return [generation.ids for generation in generations]

    assert anyio.run(main, backend=backend) == [list(range(chunks))] * readers


def test_one_call_wakes_all_who_have_news() -> None:
    calls: list[int] = []

    class Counted(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            calls.append(1)
            return super().call_soon_threadsafe(*args, **kwargs)

    async def main() -> None:
        engine = Engine()
        generations = [Generation(engine, i, Request([1])) for i in range(8)]  # type: ignore[arg-type]
        for generation in generations:
            await generation.__aenter__()
        calls.clear()
        for generation in generations:  # as from the engine's thread: the loop does not run meanwhile
            generation.push(Chunk((7,)))
        assert len(calls) == 1
        for generation in generations:
            assert (await generation.__anext__()).ids == (7,)
        await checkpoint()  # the loop answers
        generations[0].push(Chunk((8,)))
        assert len(calls) == 2

    with asyncio.Runner(loop_factory=Counted) as runner:
        runner.run(main())


def test_a_reader_whose_loop_has_closed_is_ended() -> None:
    engine = Engine()
    generation = Generation(engine, 5, Request([1]))  # type: ignore[arg-type]

    async def main() -> None:
        await generation.__aenter__()
        generation.push(Chunk((1,)))  # the loop closes before it gets to answer

    anyio.run(main)
    generation.push(Chunk((2,)))
    assert engine.aborted == [5]


def test_the_engine_keeps_no_event_loop_alive(tmp_path: Path) -> None:
    tiny.write(tmp_path, "qwen3")

    with tiny.engine(tmp_path) as engine:

        async def main() -> None:
            async with engine.generate(Request([1, 2, 3], max_tokens=3, ignore_end=True)) as generation:
                assert engine.bell(current_token().native_token) is engine.bell(current_token().native_token)
                async for _ in generation:
                    pass

        for _ in range(3):
            anyio.run(main)
        engine.stats()  # the step that ended the last one is over
        gc.collect()
        assert len(engine._bells) == 0
