"""`Options(invariant=True)`: the same ids give the same logits, bit for bit, however they came to be computed."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

from agentkit.kernels import paged
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.runtime import invariant, model
from agentkit.runtime.engine import Engine
from agentkit.runtime.generation import Generation
from agentkit.runtime.invariant import InvariantRunner
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Request, Sampling
from agentkit.runtime.runner import Output
from agentkit.runtime.sequence import Entry, Plan, Sequence
from agentkit.runtime.weights import open_checkpoint
from tests import smol, tiny

pytestmark = pytest.mark.anyio

SAMPLINGS = [Sampling(), Sampling(temperature=1.1, top_p=0.9, top_k=40, seed=7)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Recorder:
    """The logits of every row that was sampled, by the ids before it, of all engines that are watched.

    Attributes:
        again: how often the logits of the same ids were computed a second time.
        differ: how often they had other bits then.
        recomputed: tokens that were computed again after a preemption.
    """

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], Tensor] = {}
        self.again = self.differ = self.recomputed = 0

    def watch(self, engine: Engine) -> Engine:
        step = engine.runner.step

        def recorded(plan: Plan) -> Output:
            output = step(plan)
            rows = iter(output.logits)
            for entry in plan.entries:
                if entry.sample:
                    ids = entry.seq.ids[: entry.start + entry.n]
                    for drafted in range(len(entry.draft) + 1):
                        self.record((*ids, *entry.draft[:drafted]), next(rows))
            return output

        engine.runner.step = recorded  # type: ignore[method-assign]
        return engine

    def record(self, ids: tuple[int, ...], row: Tensor) -> None:
        if ids in self.rows:
            self.again += 1
            self.differ += not torch.equal(self.rows[ids], row)
        else:
            self.rows[ids] = row.clone()


async def run(engine: Engine, prompt: Ids[int], tokens: int, sampling: Sampling) -> Generation:
    async with engine.generate(Request(prompt, tokens, sampling=sampling, ignore_end=True)) as generation:
        async for _ in generation:
            pass
    return generation


async def together(engine: Engine, prompts: Ids[Ids[int]], tokens: int, sampling: Sampling) -> list[Generation]:
    found: dict[int, Generation] = {}

    async def one(index: int) -> None:
        found[index] = await run(engine, prompts[index], tokens, sampling)

    async with anyio.create_task_group() as group:
        for index in range(len(prompts)):
            group.start_soon(one, index)
    return [found[i] for i in range(len(prompts))]


async def interrupted(engine: Engine, prompt: Ids[int], tokens: int, sampling: Sampling) -> list[Generation]:
    """A request that is preempted twice and forked once, and its child."""
    async with engine.generate(Request(prompt, tokens, sampling=sampling, ignore_end=True)) as parent:
        child = None
        async for _ in parent:
            if len(parent.ids) in (3, 9):
                engine.preempt(parent.rid)
            if child is None and len(parent.ids) >= 5:
                child = engine.fork(parent)
    assert child is not None
    async with child:
        async for _ in child:
            pass
    return [parent, child]


async def everything(plain: Engine, cut: Engine, prompts: Ids[Ids[int]], tokens: int) -> Recorder:
    """All the ways to the same ids; what comes out of each must be the same ids.

    Args:
        plain: an engine that computes a prompt in one step, with drafts.
        cut: one that computes it in small chunks, without drafts.
        prompts: the first one repeats itself, so that what follows is drafted.
        tokens: how many follow.
    """
    recorder = Recorder()
    for engine in (plain, cut):
        recorder.watch(engine)
    for sampling in SAMPLINGS:
        first = [await run(plain, prompt, tokens, sampling) for prompt in prompts]
        alone = [generation.ids for generation in first]
        assert sum(g.finish.usage.drafted for g in first if g.finish) > 0
        assert [(await run(plain, prompt, tokens, sampling)).ids for prompt in prompts] == alone  # from the tree
        crowd = await together(cut, prompts, tokens, sampling)
        assert [generation.ids for generation in crowd] == alone
        recorder.recomputed += sum(g.finish.usage.recomputed for g in crowd if g.finish)
        longer = [[*prompt, 5] for prompt in prompts]
        goes_on = [generation.ids for generation in await together(plain, longer, 4, sampling)]
        assert [(await run(cut, prompt, 4, sampling)).ids for prompt in longer] == goes_on
        parent, child = await interrupted(plain, prompts[0], tokens, sampling)
        assert parent.ids == alone[0]
        assert [*child.request.ids, *child.ids] == [*prompts[0], *alone[0]]
    return recorder


@contextmanager
def tiny_pair(folder: Path, **fields: Any) -> Iterator[tuple[Engine, Engine]]:
    token_bytes = 3 * 2 * 2 * 32 * (2 if fields.get("dtype") == "bfloat16" else 4)
    with (
        tiny.engine(folder, **fields) as plain,
        tiny.engine(folder, step_tokens=11, running=4, drafts=False, kv_bytes=260 * token_bytes, **fields) as cut,
    ):
        yield plain, cut


def tiny_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 256, (4, 211), generator=generator).tolist()
    return [(words[0][:40] * 6)[:211], words[1], words[2][:97], words[3][:130]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny.write(path, "qwen3")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
async def test_tiny_qwen3(folder: Path, dtype: str, packed: bool) -> None:
    with tiny_pair(folder, dtype=dtype, packed=packed, invariant=True) as (plain, cut):
        recorder = await everything(plain, cut, tiny_prompts(), 24)
        assert (recorder.differ, recorder.again > 300, recorder.recomputed > 0) == (0, True, True)


async def test_without_the_mode_bits_differ(folder: Path) -> None:
    """The control: what is compared above does depend on how it was computed where nothing is done about it."""
    recorder = Recorder()
    with tiny_pair(folder) as pair:
        for engine in pair:
            await together(recorder.watch(engine), tiny_prompts(), 8, Sampling())
    assert recorder.differ > recorder.again // 2 > 4


async def test_drafts_are_verified_with_the_bits_they_would_have_had(folder: Path) -> None:
    recorder = Recorder()
    ids: list[list[int]] = []
    for drafts in (True, False):
        with tiny.engine(folder, invariant=True, drafts=drafts) as engine:
            recorder.watch(engine)
            request = Request(tiny_prompts()[0], max_tokens=120, ignore_end=True)
            async with engine.generate(request) as generation:
                async for _ in generation:
                    pass
            ids.append(generation.ids)
            assert generation.finish is not None
            assert (generation.finish.usage.drafted > 0) is drafts
    assert ids[0] == ids[1]
    assert (recorder.differ, recorder.again) == (0, 120)


async def test_scores_are_the_same_in_any_company(folder: Path) -> None:
    prompt, *others = tiny_prompts()
    with tiny_pair(folder, invariant=True) as (plain, cut):
        scored = await plain.score(prompt, 50)
        async with anyio.create_task_group() as group:
            for other in others:
                group.start_soon(cut.score, other)
            again = await cut.score(prompt, 50)
    assert scored.logprobs == again.logprobs


def test_heights_that_do_not_agree_are_not_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor is made up whose products give other bits for 8 rows, or at every third place of 64."""
    linear = model.Linear.__call__

    def probed(change: dict[int, slice]) -> tuple[int, ...]:
        def call(self: model.Linear, x: Tensor) -> Tensor:
            y = linear(self, x)
            y[change.get(len(x), slice(0))] *= 1 + 2**-20
            return y

        monkeypatch.setattr(model.Linear, "__call__", call)
        with tiny.engine(folder, invariant=True) as engine:
            assert isinstance(engine.runner, InvariantRunner)
            return engine.runner.heights

    assert probed({1: slice(None)}) == (8, 64)
    assert probed({1: slice(None), 64: slice(0, None, 3)}) == (8,)
    assert probed({8: slice(0, 1), 64: slice(0, 1)}) == (1,)
    assert set(probed({8: slice(0, 1), 1: slice(None)})) == {64}


@pytest.mark.skipif(find_spec("triton") is None, reason="the plan of a GPU runs under Triton's interpreter")
def test_the_plan_of_a_gpu_gives_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's way on a GPU, on a CPU: its groups and tiles, with the kernels interpreted."""

    def interpreted(query: Tensor, keys: Tensor, values: Tensor, work: AttentionPlan, scale: float) -> Tensor:
        paged.check(query, keys, values, work, scale, 1.0)
        return paged.attend(query.contiguous(), keys, values, work, scale, 1.0, 1.0)

    monkeypatch.setattr(model, "paged_attention", interpreted)
    monkeypatch.setattr(invariant, "processors", lambda device: 4)
    monkeypatch.setattr(invariant, "_CHUNK", 32)
    monkeypatch.setattr(InvariantRunner, "_probe", lambda self: (8,))
    weights = model.Model(open_checkpoint(folder), torch.device("cpu"), torch.float32, packed=False)
    runner = InvariantRunner(weights, pages=40, page_size=16, step_tokens=64, running=8)
    runner._attention = invariant._attention(weights, 40, 16, 8)

    def sequence(length: int, first: int) -> Sequence:
        made = Sequence(first, [7 * i % 250 for i in range(length)], "", first, length)
        for page in range(first, first + -(-length // 16)):
            made.add_page(page)
        return made

    def step(*entries: Entry) -> Tensor:
        with torch.inference_mode():
            return runner.step(Plan(list(entries), [], [])).logits

    (whole,) = step(Entry(sequence(50, 0), 0, 50, True))
    cut = sequence(46, 10)
    cut.add_page(13)  # for the draft
    step(Entry(cut, 0, 31, False))
    draft = tuple(sequence(50, 0).ids[46:])
    beside = step(Entry(sequence(5, 30), 0, 5, True), Entry(cut, 31, 15, True, draft=draft))
    assert torch.equal(beside[-1], whole)


async def test_smollm2() -> None:
    path = smol.smol_path()
    options = Options(device="cpu", invariant=True, context=512)
    with load_engine(path, options) as plain:
        texts = ("Harbour: open at 7. Ferry: leaves at 9. " * 3, "The capital of France is")
        prompts = [plain.vocab.encode(text) for text in texts]
        with load_engine(path, replace(options, step_tokens=21, running=3, drafts=False)) as cut:
            recorder = await everything(plain, cut, prompts, 12)
    assert (recorder.differ, recorder.again > 60) == (0, True)
