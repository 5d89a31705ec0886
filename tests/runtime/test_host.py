"""Evicted pages on the host: what goes there, what comes back, and that it is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import CapacityError, EngineError
from agentkit.runtime.generation import Generation
from agentkit.runtime.host import HostPool
from agentkit.runtime.pages import Corruption, Owner, PagePool
from agentkit.runtime.plan import Scheduler
from agentkit.runtime.radix import PrefixTree, Spill
from agentkit.runtime.request import Request, Sampling
from agentkit.runtime.sequence import Plan, Restore
from agentkit.runtime.store import Stored, save
from tests import tiny

pytestmark = pytest.mark.anyio

SIZE = 4
#: Bytes of the KV of a page of the tiny Qwen3: 3 layers, keys and values, 2 heads of 32 values in fp32.
PAGE = SIZE * 3 * 2 * 2 * 32 * 4


def build(total: int, host: int) -> Scheduler:
    pool = PagePool(total)
    return Scheduler(pool, PrefixTree(pool, SIZE, HostPool(host)), SIZE, 64, 8, 400)


def step(scheduler: Scheduler) -> Plan:
    plan = scheduler.plan()
    scheduler.check()
    scheduler.complete(plan)
    scheduler.check()
    return plan


def turn(scheduler: Scheduler, rid: int, ids: list[int]) -> Plan:
    """A request whose prompt is computed, and that is over."""
    scheduler.submit(rid, ids)
    plan = step(scheduler)
    scheduler.finish(rid)
    scheduler.check()
    return plan


OLD, NEW = list(range(10)), list(range(50, 62))


def test_what_is_evicted_comes_back_by_a_copy() -> None:
    scheduler = build(total=4, host=8)
    turn(scheduler, 1, OLD)  # two pages and a half
    plan = turn(scheduler, 2, NEW)
    assert [spill.page for spill in plan.spills] == [2, 1]  # the deepest first
    scheduler.submit(3, [*OLD, 10, 11])
    plan = scheduler.plan()
    (entry,) = plan.entries
    assert (entry.start, entry.n, entry.seq.cached) == (10, 2, 10)
    assert [restore.page for restore in plan.restores] == list(entry.seq.pages[1:])
    assert {restore.slot for restore in plan.restores} == {0, 1}
    assert plan.copies == []
    scheduler.check()
    assert all(scheduler.pool.owner(restore.page) == Owner.PRIVATE for restore in plan.restores)
    scheduler.complete(plan)
    scheduler.check()
    assert scheduler.tree.match("", OLD, 8).pages == list(entry.seq.pages[:2])


def test_the_host_forgets_what_was_least_recently_used() -> None:
    scheduler = build(total=4, host=3)
    for rid, first in enumerate((0, 100, 200), 1):
        turn(scheduler, rid, [*range(first, first + 8)])
    # The pool holds the third and the second, whose pages would fit; the first is on the host.
    scheduler.tree.evict(4)
    scheduler.tree.check({})
    assert scheduler.tree.host.used == 3
    assert [scheduler.tree.look("", range(first, first + 8)).reach for first in (0, 100, 200)] == [0, 4, 8]


def test_without_room_on_the_host_pages_are_forgotten() -> None:
    scheduler = build(total=4, host=0)
    turn(scheduler, 1, OLD)
    assert turn(scheduler, 2, NEW).spills == []
    assert scheduler.tree.look("", OLD).reach == 4


def test_what_is_brought_back_is_not_forgotten_to_make_room_for_it() -> None:
    """The eviction that gives a restored page its place on the device needs a slot of the full host itself."""
    scheduler = build(total=4, host=2)
    turn(scheduler, 1, OLD[:8])
    turn(scheduler, 2, NEW)
    turn(scheduler, 3, [*range(90, 94)])
    assert (scheduler.tree.host.used, scheduler.pool.free) == (2, 0)
    back = scheduler.tree.match("", OLD, 8)
    assert (back.pages, len(back.host)) == ([], 2)
    scheduler.submit(4, OLD)
    plan = scheduler.plan()
    assert [restore.page for restore in plan.restores] == list(plan.entries[0].seq.pages[:2])
    assert plan.spills == []
    scheduler.check()
    scheduler.complete(plan)
    scheduler.check()


def test_a_failed_step_forgets_what_it_may_have_half_copied() -> None:
    scheduler = build(total=4, host=8)
    turn(scheduler, 1, OLD)
    turn(scheduler, 2, NEW)  # OLD is on the host but for its first page
    scheduler.submit(3, [*OLD, 10, 11])
    plan = scheduler.plan()
    assert plan.spills
    assert plan.restores
    scheduler.cancel(plan)
    scheduler.check()
    assert scheduler.tree.look("", OLD).reach == 10  # it is on the host as before
    assert scheduler.tree.host.used == 2
    assert scheduler.tree.look("", NEW).reach == 12 - 4 * len(plan.spills)


def test_a_page_that_is_computed_anew_takes_its_place_back() -> None:
    scheduler = build(total=4, host=8)
    turn(scheduler, 1, OLD[:8])
    scheduler.tree.evict(2)
    assert scheduler.tree.host.used == 2
    scheduler.submit(2, OLD[:8])  # its last token is wanted, so its last page is copied and completed
    plan = step(scheduler)
    assert scheduler.tree.host.used == 0
    assert len(plan.spills) == len(plan.restores) == 2
    assert scheduler.tree.take_spills() == []


def test_spills_that_nobody_has_run_are_dropped_with_their_slots() -> None:
    pool = PagePool(2)
    tree = PrefixTree(pool, SIZE, HostPool(1))
    for first in (0, 10):
        page = pool.allocate(None)
        assert page is not None
        tree.insert("", None, range(first, first + SIZE), page)
    tree.evict(1)
    tree.evict(1)  # there is one slot, and the page that was to be copied to it is forgotten
    (spill,) = tree.take_spills()
    assert spill == Spill(1, 0)
    assert tree.look("", range(4)).reach == 0
    page = pool.allocate(None)
    assert page is not None
    tree.evict(0)
    tree.insert("", None, range(10, 14), page)
    tree.evict(1)
    page = pool.allocate(None)
    assert page is not None
    tree.insert("", None, range(10, 14), page)
    assert tree.take_spills() == []
    tree.check({})


def test_a_slot_is_released_once() -> None:
    host = HostPool(1)
    assert (host.allocate(), host.allocate()) == (0, None)
    host.release(0)
    with pytest.raises(Corruption, match="twice"):
        host.release(0)


# --- with a model


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny.write(path, "qwen3")
    return path


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with tiny.engine(folder, kv_bytes=40 * PAGE, host_kv_bytes=200 * PAGE) as made:
        assert (made.sizes.pages, made.sizes.host_pages) == (40, 200)
        yield made
        made.check()
        assert made.stats().pages_private == 0


MINE = [1 + (7 * i) % 90 for i in range(102)]


async def run(engine: Engine, ids: list[int], tokens: int = 8) -> Any:
    async with engine.generate(Request(ids, max_tokens=tokens, ignore_end=True)) as generation:
        async for _ in generation:
            pass
    return generation


async def flood(engine: Engine, count: int = 4) -> None:
    for i in range(count):
        await run(engine, [200 + i, *[7] * 100], 1)


async def test_a_conversation_that_was_evicted_goes_on_without_a_prefill(folder: Path, engine: Engine) -> None:
    first = await run(engine, MINE)
    ids = [*MINE, *first.ids]
    before = engine.exporter(ids).read(0, 100)
    await flood(engine)
    match = engine._ask(lambda: engine._tree.look(engine._space(""), ids))
    assert (match.pages, match.reach) == ([], 109)
    assert torch.equal(engine.exporter(ids).read(0, 100), before)  # read where it lies now
    again = await run(engine, [*ids, 3, 4])
    usage = again.finish.usage
    assert (usage.cached, usage.prefilled) == (109, 3)
    assert torch.equal(engine.exporter(ids[:109]).read(0, 100), before)
    with tiny.engine(folder) as other:
        assert again.ids == (await run(other, [*ids, 3, 4])).ids


async def test_with_a_small_host_what_is_left_of_the_prefix_comes_back(folder: Path) -> None:
    with tiny.engine(folder, kv_bytes=40 * PAGE, host_kv_bytes=30 * PAGE) as engine:
        first = await run(engine, MINE)
        await flood(engine, 1)
        usage = (await run(engine, [*MINE, *first.ids, 3])).finish.usage
        assert usage.cached == 109
        await flood(engine, 4)
        again = await run(engine, [*MINE, *first.ids, 3])
        assert again.finish.usage.cached < 50
        engine.check()
        with tiny.engine(folder) as other:
            assert again.ids == (await run(other, [*MINE, *first.ids, 3])).ids


async def test_a_step_that_fails_does_not_leave_half_a_page(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await run(engine, MINE)
    await flood(engine)
    ids = [*MINE, *first.ids, 3, 4]
    memory = engine.runner.memory
    assert memory is not None

    def fail(restores: list[Restore]) -> None:
        memory.write([restore.page for restore in restores], torch.full((len(restores), *memory.block_shape), 9.0))
        raise RuntimeError("the copy failed")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "restore", fail)
        with pytest.raises(EngineError, match="the copy failed"):
            await run(engine, ids)
    engine.check()
    again = await run(engine, ids)
    with tiny.engine(folder) as other:
        assert again.ids == (await run(other, ids)).ids
    assert again.finish.usage.cached == 109  # the host still had it


async def test_a_file_makes_room_on_the_device_and_loses_nothing(folder: Path, engine: Engine, tmp_path: Path) -> None:
    mine = await run(engine, MINE)
    with tiny.engine(folder) as other:
        ids = [*range(100, 200), *(await run(other, [*range(100, 200)])).ids]
        save(other, tmp_path / "a", ids, {})
    with Stored(tmp_path / "a") as stored:
        assert stored.restore(engine) == (107, "")
    engine.check()
    for before, generation in ((MINE, mine), (ids, None)):
        prompt = [*before, *(generation.ids if generation is not None else []), 5]
        again = await run(engine, prompt)
        assert again.finish.usage.prefilled <= 2
        with tiny.engine(folder) as other:
            assert again.ids == (await run(other, prompt)).ids
    save(engine, tmp_path / "b", [*MINE, *mine.ids], {})  # from wherever it is
    with tiny.engine(folder) as other, Stored(tmp_path / "b") as stored:
        assert stored.restore(other) == (110, "")
        assert (await run(other, [*MINE, *mine.ids, 5])).finish.usage.prefilled == 1


@pytest.mark.parametrize("size", [PAGE - 1, -PAGE])
def test_room_for_less_than_a_page_is_refused(folder: Path, size: int) -> None:
    with pytest.raises(CapacityError, match="raise it, or leave it at 0"), tiny.engine(folder, host_kv_bytes=size):
        pass


async def test_eight_forks_of_a_prefix_cost_their_tails_and_nothing_more(folder: Path) -> None:
    prompt = [1 + (7 * i) % 90 for i in range(20 * 16 + 5)]
    request = Request(prompt, max_tokens=60, ignore_end=True, sampling=Sampling(temperature=2.0))
    with tiny.engine(folder, page_size=16) as engine:
        children: list[Generation] = []
        async with engine.generate(request) as parent:
            async for _ in parent:
                if len(parent.ids) == 1:
                    children = [engine.fork(parent, seed=i) for i in range(1, 9)]
        for child in children:
            async with child:
                async for _ in child:
                    pass
            assert child.finish is not None
            assert child.finish.usage.prefilled <= 1
        engine.check()
        # Each has 385 ids, of which the last is never computed: four pages behind the twenty that all share.
        assert engine.stats().pages_cached == 20 + 9 * 4
