"""The engine as its caller sees it: streams, cancellation, budgets that close, failures that stay where they happen."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import torch

from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import AgentError, CapacityError, EngineError, SchemaError
from agentkit.runtime.generation import Generation
from agentkit.runtime.grammar import ChoiceSpec, Grammar, JsonSpec, LarkSpec, RegexSpec
from agentkit.runtime.request import Chunk, Progress, Request, Sampling, Usage
from agentkit.runtime.runner import Output
from agentkit.runtime.sequence import Plan
from tests import tiny

pytestmark = pytest.mark.anyio

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


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
    with tiny.engine(folder, step_tokens=16, running=8) as made:
        yield made
        made.check()
        assert made.stats().pages_private == 0


async def run(engine: Engine, prompt: str = "hello", **fields: Any) -> Generation:
    async with engine.generate(Request(engine.vocab.encode(prompt), **fields)) as generation:
        async for _ in generation:
            pass
    assert generation.finish is not None
    return generation


def text(engine: Engine, generation: Generation) -> str:
    return engine.vocab.decode(t for t in generation.ids if t not in engine.vocab.end_ids)


async def test_cancelled_in_prefill_and_in_decode_gives_its_pages_back(engine: Engine) -> None:
    async with engine.generate(Request(list(range(200)), max_tokens=100)):
        await anyio.sleep(0.005)  # some chunks of the prompt
    assert engine.stats().running == engine.stats().waiting == 0
    async with engine.generate(Request(list(range(60)), max_tokens=100, ignore_end=True)) as generation:
        async for _ in generation:
            if len(generation.ids) == 3:
                break
    assert engine.stats().pages_private == 0
    with anyio.move_on_after(0.05):
        async with engine.generate(Request(list(range(40)), max_tokens=400, ignore_end=True)) as generation:
            async for _ in generation:
                pass
    assert engine.stats().running == 0
    assert len((await run(engine, max_tokens=5, ignore_end=True)).ids) == 5


async def test_ends_at_every_end_token(engine: Engine) -> None:
    ends = sorted(engine.vocab.end_ids)
    assert len(ends) == 2
    seen: set[int] = set()
    for seed in range(24):
        generation = await run(engine, sampling=Sampling(temperature=3.0, seed=seed), max_tokens=200)
        assert generation.finish is not None
        if generation.finish.reason == "stop":
            assert generation.ids[-1] in ends
            seen.add(generation.ids[-1])
        assert not set(generation.ids[:-1]) & set(ends)
        assert not set(generation.ids) & (set(engine.vocab.control.values()) - set(ends))
        assert max(generation.ids) < engine.vocab.size  # never an id that only pads the table
    assert seen == set(ends)


async def test_stop_text_ends_the_output(engine: Engine) -> None:
    whole = text(engine, await run(engine, max_tokens=60, ignore_end=True))
    stop = whole[20:23]
    generation = await run(engine, max_tokens=60, ignore_end=True, stop=(stop, "never there"))
    assert generation.finish is not None
    assert generation.finish.reason == "stop"
    assert text(engine, generation) == whole[: whole.index(stop) + len(stop)]


async def test_log_probabilities_are_the_models_own(engine: Engine) -> None:
    scores: list[Any] = []
    ids = engine.vocab.encode("abc")
    request = Request(ids, max_tokens=6, sampling=Sampling(logprobs=3), ignore_end=True)
    async with engine.generate(request) as generation:
        async for chunk in generation:
            scores.append(chunk.score)
    assert [s.token for s in scores] == generation.ids
    for score in scores:
        assert len(score.top) == 3
        assert score.top[0][1] >= score.logprob <= 0
        assert sorted(score.top, key=lambda pair: -pair[1]) == list(score.top)


async def test_usage_counts_every_token_once(engine: Engine) -> None:
    ids = list(range(50))
    async with engine.generate(Request(ids, max_tokens=7, ignore_end=True)) as generation:
        async for _ in generation:
            pass
    assert generation.finish is not None
    assert generation.finish.usage == Usage(cached=0, prefilled=50, decoded=7, forced=0)
    computed = engine.stats().computed
    again = [*ids, *generation.ids, 1, 2, 3]
    async with engine.generate(Request(again, max_tokens=1)) as second:
        async for _ in second:
            pass
    assert second.finish is not None
    assert second.finish.usage == Usage(cached=56, prefilled=4, decoded=1, forced=0)
    assert engine.stats().computed == computed + 4


def unhurried(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each step begin when the readers have taken in all of the last one."""
    step, loop = engine.runner.step, anyio.lowlevel.current_token()

    def after_all_have_read(plan: Plan) -> Output:
        anyio.from_thread.run(anyio.wait_all_tasks_blocked, token=loop)
        return step(plan)

    monkeypatch.setattr(engine.runner, "step", after_all_have_read)


async def watched(engine: Engine, request: Request) -> list[Progress | Chunk]:
    async with engine.generate(request) as generation:
        return [item async for item in generation.watch()]


async def test_a_prompt_of_several_steps_is_reported_and_one_of_one_step_is_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    unhurried(engine, monkeypatch)
    request = Request(list(range(60)), max_tokens=2, ignore_end=True)
    *reports, first, second = await watched(engine, request)
    assert reports == [Progress(16, 60), Progress(32, 60), Progress(48, 60)]
    assert isinstance(first, Chunk)
    assert isinstance(second, Chunk)
    assert all(isinstance(item, Chunk) for item in await watched(engine, request))  # all but its last token is cached
    longer = Request([*range(60), *range(100, 130)], max_tokens=1, ignore_end=True)
    assert (await watched(engine, longer))[0] == Progress(76, 90)  # what is cached is done
    assert all(isinstance(item, Chunk) for item in await watched(engine, Request([7] * 16, max_tokens=2)))


async def test_progress_never_falls_and_says_what_is_computed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_bytes = 3 * 2 * 2 * 32 * 4
    items: dict[str, list[Progress | Chunk]] = {}
    with tiny.engine(folder, kv_bytes=96 * token_bytes, step_tokens=8, running=2) as engine:
        unhurried(engine, monkeypatch)

        async def one(name: str, request: Request) -> None:
            items[name] = await watched(engine, request)

        async with anyio.create_task_group() as group:  # the first takes the pages of the second as it grows
            group.start_soon(one, "first", Request(list(range(20)), max_tokens=60, ignore_end=True))
            group.start_soon(one, "second", Request(list(range(100, 170)), max_tokens=8, ignore_end=True))
    reports = [item for item in items["second"] if isinstance(item, Progress)]
    assert all(a.done <= b.done and a.recomputed <= b.recomputed and a != b for a, b in itertools.pairwise(reports))
    assert any(a.done == b.done for a, b in itertools.pairwise(reports))
    assert reports[-1].recomputed > 0
    assert {report.total for report in reports} == {70}
    assert sum(isinstance(item, Chunk) for item in items["second"]) == 8


async def test_branches_over_one_new_prefix_prefill_it_once(engine: Engine) -> None:
    prefix = list(range(40, 140))
    before = engine.stats().computed
    async with anyio.create_task_group() as group:
        for branch in range(4):
            request = Request([*prefix, branch], max_tokens=1)

            async def one(request: Request = request) -> None:
                async with engine.generate(request) as generation:
                    async for _ in generation:
                        pass

            group.start_soon(one)
    assert engine.stats().computed - before <= 101 + 3 * 5  # the others: their own token and a part of a page


async def test_namespaces_never_share(engine: Engine) -> None:
    ids = list(range(60))
    for namespace, cached in (("a", 0), ("b", 0), ("a", 59)):
        async with engine.generate(Request(ids, max_tokens=1, namespace=namespace)) as generation:
            async for _ in generation:
                pass
        assert generation.finish is not None
        assert generation.finish.usage.cached == cached


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_a_document_is_complete_whatever_the_budget(engine: Engine, temperature: float) -> None:
    spec = JsonSpec(json.dumps(PERSON))
    shortest = engine.compiler.submit(spec).result().minimum
    for budget in [*range(shortest, shortest + 40), 200]:
        sampling = Sampling(temperature=temperature, seed=budget)
        generation = await run(engine, grammar=spec, max_tokens=budget, sampling=sampling)
        assert len(generation.ids) <= budget
        document = json.loads(text(engine, generation))
        assert list(document) == ["name", "age", "tags"]
        assert 0 <= document["age"] <= 150


async def test_forced_tokens_cost_no_decision(engine: Engine) -> None:
    generation = await run(engine, grammar=JsonSpec('{"const": {"always": ["the", "same"]}}', "call"))
    usage = generation.finish.usage  # pyright: ignore
    assert json.loads(text(engine, generation)) == {"always": ["the", "same"]}
    assert usage.decoded == 1
    assert usage.forced == len(generation.ids) - 1


async def test_regex_choice_and_lark(engine: Engine) -> None:
    import re

    for seed in range(5):
        sampling = Sampling(temperature=2.0, seed=seed)
        got = text(engine, await run(engine, grammar=RegexSpec(r"[0-9]{4}(-[0-9]{2})?"), sampling=sampling))
        assert re.fullmatch(r"[0-9]{4}(-[0-9]{2})?", got)
        options = ("yes", "yes please", "no")
        assert text(engine, await run(engine, grammar=ChoiceSpec(options), sampling=sampling)) in options
        lark = LarkSpec('start: "a"+ "b"')
        assert re.fullmatch("a+b", text(engine, await run(engine, grammar=lark, sampling=sampling, max_tokens=30)))


async def test_hastened_output_is_complete(engine: Engine) -> None:
    request = Request(engine.vocab.encode("x"), grammar=JsonSpec(json.dumps(PERSON)), max_tokens=400)
    async with engine.generate(request) as generation:
        async for _ in generation:
            if len(generation.ids) == 12:
                engine.hasten(generation)
    assert generation.finish is not None
    assert generation.finish.reason == "length"
    json.loads(text(engine, generation))
    assert len(generation.ids) < 60


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ("{not json", "not JSON"),
        ('{"type": "strin"}', "not valid"),
        ('{"enum": []}', "(?i)enum|satisf|valid"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "(?i)minimum|satisf|unsat|range|enforced"),
        ('{"$ref": "http://example.com/x.json"}', "another document"),
        ('{"not": {"type": "string"}}', "(?i)not"),
        ("false", "nothing satisfies"),
    ],
)
async def test_a_schema_that_cannot_be_is_refused_and_the_next_request_works(
    engine: Engine, schema: str, named: str
) -> None:
    with pytest.raises(SchemaError, match=named):
        await run(engine, grammar=JsonSpec(schema))
    assert len((await run(engine, max_tokens=3, ignore_end=True)).ids) == 3


async def test_what_can_never_fit_is_refused_at_the_door(engine: Engine) -> None:
    with pytest.raises(CapacityError, match="600 tokens"):
        engine.generate(Request([1] * 600))
    with pytest.raises(CapacityError, match="shortest output"):
        await run(engine, grammar=JsonSpec(json.dumps(PERSON)), max_tokens=5)
    with pytest.raises(CapacityError, match="max_tokens"):
        Request([1], max_tokens=0)
    with pytest.raises(ValueError, match="empty"):
        Request([])
    with pytest.raises(ValueError, match="no token of"):
        engine.generate(Request([1, 9999]))
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"temperature": float("nan")}, {"min_p": 2.0}):
        with pytest.raises(ValueError, match="must lie between"):
            Sampling(**bad)
    assert len((await run(engine, max_tokens=3, ignore_end=True)).ids) == 3


@pytest.mark.parametrize(
    ("ids", "options", "kind", "named"),
    [
        ([], [[1]], ValueError, "ids is empty"),
        ([1], [], ValueError, "at least one"),
        ([1], [[1], []], ValueError, "at least one token"),
        ([1], [[1], [259]], ValueError, "259 is to be scored"),  # a row that pads the table
        ([1], [[-1]], ValueError, "-1 is to be scored"),
        ([9999], [[1]], ValueError, "no token of"),
        ([1] * 500, [[1], [1] * 13], CapacityError, "513 tokens .* holds 512. Shorten"),
    ],
)
async def test_continuations_that_cannot_be_scored_are_refused_and_the_next_ones_work(
    engine: Engine, ids: list[int], options: list[list[int]], kind: type[Exception], named: str
) -> None:
    with pytest.raises(kind, match=named):
        await engine.continuations(ids, options)
    assert len((await engine.continuations([1] * 500, [[1] * 12])).logprobs[0]) == 12


@pytest.mark.parametrize(
    ("ids", "start", "kind", "named"),
    [
        ([], 1, ValueError, "ids has 0 tokens"),
        ([1], 1, ValueError, "at least two"),
        ([1, 2, 3], 0, ValueError, "between 1 and 2 .* not at 0"),
        ([1, 2, 3], 3, ValueError, "not at 3"),
        ([1, 2, 3], -1, ValueError, "not at -1"),
        ([1, 270], 1, ValueError, "270 is to be scored"),
        ([1] * 513, 1, CapacityError, "513 tokens .* holds 512"),
    ],
)
async def test_a_text_that_cannot_be_scored_is_refused_and_the_next_one_works(
    engine: Engine, ids: list[int], start: int, kind: type[Exception], named: str
) -> None:
    with pytest.raises(kind, match=named):
        await engine.score(ids, start)
    assert len((await engine.score([1] * 512)).logprobs) == 511


async def test_scores_of_namespaces_share_nothing(engine: Engine) -> None:
    ids = list(range(40))
    for namespace, cached in (("a", 0), ("b", 0), ("a", 29)):
        assert (await engine.score(ids, 30, namespace=namespace)).usage.cached == cached


async def test_scoring_that_is_left_or_fails_takes_nobody_along(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy, seen = engine.runner.step, anyio.Event()
    loop = anyio.lowlevel.current_token()

    def slowly(plan: Plan) -> Output:
        anyio.from_thread.run_sync(seen.set, token=loop)
        return healthy(plan)

    monkeypatch.setattr(engine.runner, "step", slowly)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.score, [3] * 400)
        await seen.wait()
        group.cancel_scope.cancel()
    assert engine.stats().running == engine.stats().waiting == 0

    def failing(plan: Plan) -> Output:
        output = healthy(plan)
        if any(entry.seq.ids[0] == 4 for entry in plan.entries):
            raise RuntimeError("out of memory")
        return replace(output, scores=output.scores * float("nan"))

    monkeypatch.setattr(engine.runner, "step", failing)
    with pytest.raises(EngineError, match="out of memory"):
        await engine.continuations([4], [[1], [2, 3]])
    with pytest.raises(EngineError, match="the logits are not numbers"):
        await engine.score([5] * 40)
    monkeypatch.setattr(engine.runner, "step", healthy)
    engine.check()
    assert len((await run(engine, max_tokens=3, ignore_end=True)).ids) == 3


async def test_a_closed_engine_scores_nothing(folder: Path) -> None:
    with tiny.engine(folder) as engine:
        pass
    with pytest.raises(EngineError, match="closed"):
        await engine.score([1, 2])


async def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers(folder: Path) -> None:
    with tiny.engine(folder, kv_bytes=3 * 2 * 2 * 32 * 4 * 64) as engine:
        with pytest.raises(CapacityError, match="100 tokens; .* holds 64"):
            engine.generate(Request([1] * 100))
        with pytest.raises(CapacityError, match="65 tokens .* holds 64"):
            await engine.score([1] * 65)
        assert len((await engine.score([1] * 64)).logprobs) == 63
        assert (await run(engine, max_tokens=3, ignore_end=True)).finish is not None


async def test_a_pool_takes_memory_as_it_is_written(folder: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with tiny.engine(folder, kv_bytes=1 << 30) as engine:
        assert engine.sizes.pages * engine.sizes.page_size > 100_000
        assert (await run(engine, max_tokens=3, ignore_end=True)).finish is not None
        assert resident() - before < 1 << 28


def test_a_pool_larger_than_the_memory_is_refused(folder: Path) -> None:
    free = pytest.raises(CapacityError, match="kv_bytes is .* bytes of memory are free: lower it")
    with free, tiny.engine(folder, kv_bytes=1 << 50):
        pass


async def test_a_step_that_fails_ends_its_requests_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = engine.runner.step
    failures = iter([True])

    def failing(plan: Plan) -> Output:
        if any(entry.seq.ids[0] == 66 for entry in plan.entries) and next(failures, False):
            raise RuntimeError("out of memory")
        return healthy(plan)

    monkeypatch.setattr(engine.runner, "step", failing)
    good = await run(engine, "abc", max_tokens=3, ignore_end=True)
    assert good.finish is not None
    with pytest.raises(EngineError, match="out of memory"):
        async with engine.generate(Request([66, *range(40)], max_tokens=4)) as generation:
            async for _ in generation:
                pass
    engine.check()
    assert engine.stats().pages_private == 0
    async with engine.generate(Request([66, *range(40)], max_tokens=4, ignore_end=True)) as again:
        async for _ in again:
            pass
    assert again.finish is not None
    assert again.finish.usage.cached == 0  # nothing of the failed step was kept


async def test_a_closed_engine_says_so(folder: Path) -> None:
    with tiny.engine(folder) as engine:
        generation = engine.generate(Request([1], max_tokens=400, ignore_end=True))
        await generation.__aenter__()
    with pytest.raises(EngineError, match="closed"):
        async for _ in generation:
            pass
    await generation.__aexit__(None, None, None)
    with pytest.raises(AgentError, match="closed"):
        async with engine.generate(Request([1])):
            pass


def test_a_program_may_end_while_its_engine_is_in_a_step() -> None:
    code = """
import threading, torch
from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.request import Request
from agentkit.runtime.runner import Output
from agentkit.script import byte_vocabulary

class Slow:
    vocab_size, weight_bytes, asynchronous = byte_vocabulary().size, 0, False

    def step(self, plan):
        begun.set()
        torch.ones(3000, 3000, dtype=torch.float64).matrix_power(4)  # in native code while the program ends
        return Output(torch.zeros(1, self.vocab_size), torch.empty(0))

begun = threading.Event()
engine = Engine(Slow(), byte_vocabulary(), Sizes(context=64, pages=8))
engine.start(engine.generate(Request([1], max_tokens=50, ignore_end=True)))
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


async def test_two_engines_live_in_one_process(folder: Path) -> None:
    with tiny.engine(folder) as one, tiny.engine(folder) as two:
        results: list[list[int]] = []

        async def ask(engine: Engine) -> None:
            results.append((await run(engine, max_tokens=20, ignore_end=True)).ids)

        async with anyio.create_task_group() as group:
            group.start_soon(ask, one)
            group.start_soon(ask, two)
    assert results[0] == results[1]


async def test_aborts_at_random_moments_leave_nothing_behind(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(5)
    delays = (torch.rand(60, generator=generator) * 0.05).tolist()

    async def one(index: int, delay: float) -> None:
        with anyio.move_on_after(delay):
            ids = [index % 7, *range(index % 50)]
            async with engine.generate(Request(ids, max_tokens=50, ignore_end=True)) as generation:
                async for _ in generation:
                    pass

    async with anyio.create_task_group() as group:
        for index, delay in enumerate(delays):
            group.start_soon(one, index, delay)
    engine.check()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_private) == (0, 0, 0)


async def test_a_storm_of_aborts_in_a_pool_a_tenth_of_the_demand(folder: Path) -> None:
    """A thousand requests, six in ten left at random moments, a few forked, the others read to their ends."""
    generator = torch.Generator().manual_seed(7)
    delays = (torch.rand(1000, generator=generator) * 2).tolist()
    lengths = torch.randint(1, 60, (1000,), generator=generator).tolist()
    with tiny.engine(folder, step_tokens=32, running=8, kv_bytes=1 << 17) as engine:
        demand = sum(length + 6 for length in lengths[:64])  # of those that are there at the same time
        assert engine.sizes.pages * engine.sizes.page_size * 10 < demand
        finished: list[int] = []
        branches: list[Generation] = []
        gate = anyio.Semaphore(64)

        async def one(index: int) -> None:
            async with gate:
                ids = [index % 5, *range(lengths[index])]
                with anyio.move_on_after(delays[index] if index % 5 < 3 else None):
                    async with engine.generate(Request(ids, max_tokens=6, ignore_end=True)) as generation:
                        async for _ in generation:
                            if index % 50 == 4 and len(generation.ids) == 1:
                                with contextlib.suppress(EngineError):  # it may have ended since that id
                                    branch = engine.fork(generation)
                                    branches.append(branch)
                                    async with branch:
                                        async for _ in branch:
                                            pass
                    assert len(generation.ids) == 6
                    finished.append(index)

        async with anyio.create_task_group() as group:
            for index in range(1000):
                group.start_soon(one, index)
        engine.check()
        stats = engine.stats()
        assert set(finished) >= {index for index in range(1000) if index % 5 >= 3}
        assert len(finished) < 1000
        assert (stats.running, stats.waiting, stats.pages_private) == (0, 0, 0)
        assert stats.requests == 1000 + len(branches) > 1000
        assert all(branch.finish is not None and 1 <= len(branch.ids) <= 5 for branch in branches)
        assert len((await run(engine, max_tokens=3, ignore_end=True)).ids) == 3


async def test_counters_are_the_sums_of_all_requests(engine: Engine) -> None:
    before = engine.stats()
    assert (before.requests, before.usage, before.steps, before.seconds) == (0, Usage(), 0, 0)
    usage = Usage()
    for prompt in ("hello", "hello world", "hello"):
        finish = (await run(engine, prompt, max_tokens=5, ignore_end=True)).finish
        assert finish is not None
        usage += finish.usage
    async with engine.generate(Request(list(range(40)), max_tokens=100, ignore_end=True)) as generation:
        async for _ in generation:
            if len(generation.ids) == 3:
                break
    stats = engine.stats()
    assert stats.requests == 4
    assert stats.usage.decoded >= usage.decoded + 3  # of the one that was left, too
    assert stats.usage.prefilled == usage.prefilled + 40
    assert stats.usage.cached == usage.cached > 0
    assert stats.steps > before.steps
    assert stats.seconds > 0


async def test_who_waits_for_pages_of_a_sequence_that_waits_for_its_grammar_sleeps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RegexSpec("[a-c]{3}")
    with tiny.engine(folder, step_tokens=64, running=8, kv_bytes=1 << 17) as engine:
        assert 12 <= engine.sizes.pages < 26  # one request fits, two do not
        grammar, late = engine.compiler.submit(spec), Future[Grammar]()
        grammar.result()
        monkeypatch.setattr(engine.compiler, "submit", lambda _: late)
        plans: list[Plan] = []
        plan = engine._scheduler.plan
        monkeypatch.setattr(engine._scheduler, "plan", lambda drafts: plans.append(made := plan(drafts)) or made)
        done: list[Generation] = []

        async def one(**fields: Any) -> None:
            done.append(await run(engine, "x" * 48, max_tokens=8, **fields))

        async with anyio.create_task_group() as group:
            group.start_soon(partial(one, grammar=spec))
            await anyio.sleep(0.1)  # its prompt is computed, and keeps its pages
            group.start_soon(partial(one, namespace="another", ignore_end=True))
            await anyio.sleep(0.2)
            assert len(plans) < 10
            assert not done
            late.set_result(grammar.result())
        assert [generation.finish is not None for generation in done] == [True, True]
        assert len(next(g for g in done if g.request.grammar is None).ids) == 8


async def test_an_engine_that_can_do_nothing_says_so_and_begins_anew(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._scheduler, "append", lambda rid, ids: None)  # a scheduler that loses ids
    with pytest.raises(EngineError, match=r"none of it can be done: .*1:RUNNING ids=5"):
        await run(engine, max_tokens=5, ignore_end=True)
    assert len((await run(engine, max_tokens=5, ignore_end=True)).ids) == 5


async def test_an_engine_that_works_in_circles_says_so_and_begins_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny.engine(folder, step_tokens=8, running=8, kv_bytes=1 << 17) as engine:
        scheduler = engine._scheduler
        complete = scheduler.complete

        def lose(plan: Plan) -> None:  # a scheduler that takes back what it gives
            complete(plan)
            scheduler.preempt(plan.entries[0].seq.rid)
            scheduler.tree.evict(scheduler.pool.total)

        monkeypatch.setattr(scheduler, "complete", lose)
        with pytest.raises(EngineError, match=r"steps in a row computed nothing new.*1:WAITING ids=20"):
            await run(engine, "x" * 20, max_tokens=5)
        assert len((await run(engine, "x" * 20, max_tokens=5, ignore_end=True)).ids) == 5


async def test_an_exception_in_the_middle_of_the_loop_loses_what_runs_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is thrown into the thread and wherever, callers hear of it, pages balance, the next request works."""
    expected = (await run(engine, max_tokens=6, ignore_end=True)).ids
    for name in ("_drafts", "_take", "_hand_out", "_emit_parked"):
        async with engine.generate(Request([1] * 40, max_tokens=400, ignore_end=True)) as other:
            await other.__anext__()
            thread = engine._thread.ident
            with monkeypatch.context() as patch:

                def die(*_: object, name: str = name) -> None:
                    raise SystemExit(f"killed in {name}")

                patch.setattr(engine, name, die)
                with pytest.raises(EngineError, match=f"has failed and lost what ran.*killed in {name}"):
                    async for _ in other:
                        pass
        assert engine._thread.ident == thread
        engine.check()
        assert engine.stats().pages_free == engine.sizes.pages
        assert (await run(engine, max_tokens=6, ignore_end=True)).ids == expected
