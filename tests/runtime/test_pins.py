"""`Engine.pin`: from any thread, counted, and harmless when the engine has gone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import EngineError
from agentkit.runtime.request import Request, Usage
from tests import tiny

pytestmark = pytest.mark.anyio

MINE = list(range(1, 103))  # 25 pages and a half


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny.write(path, "qwen3")
    return path


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with tiny.engine(folder, kv_bytes=60 * 4 * 3 * 2 * 2 * 32 * 4) as made:
        assert made.sizes.pages == 60
        yield made
        made.check()


async def run(engine: Engine, ids: list[int]) -> Usage:
    async with engine.generate(Request(ids, max_tokens=1, ignore_end=True)) as generation:
        async for _ in generation:
            pass
    assert generation.finish is not None
    return generation.finish.usage


async def flood(engine: Engine) -> None:
    for i in range(8):
        await run(engine, [200 + i, *[7] * 79])


async def test_pages_stay_while_any_pin_of_them_is_open(engine: Engine) -> None:
    await run(engine, MINE)
    with ThreadPoolExecutor(1) as thread:
        first, second = thread.submit(engine.pin, MINE).result(), engine.pin(MINE)
    for pin in (first, second):
        await flood(engine)
        assert await run(engine, [*MINE, 150]) == Usage(cached=102, prefilled=1, decoded=1)
        pin.close()
        pin.close()
    await flood(engine)
    assert (await run(engine, [*MINE, 150])).cached == 0


async def test_a_pool_full_of_pins_still_serves(engine: Engine) -> None:
    await run(engine, MINE)
    with engine.pin(MINE), engine.pin([1, 2, 3], namespace="of nobody"):
        usage = await run(engine, [9] * 236)  # 59 of 60 pages
    assert (usage.prefilled, usage.recomputed) == (236, 0)


async def test_pins_of_a_closed_engine_do_nothing(folder: Path) -> None:
    with tiny.engine(folder) as engine:
        await run(engine, MINE)
        pin = engine.pin(MINE)
    with pytest.raises(EngineError, match="closed"):
        engine.cached(MINE)
    pin.close()
    engine.pin(MINE).close()
