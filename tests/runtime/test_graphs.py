"""Captured decode steps: what a replay gives is what the step would have given, whatever the batch was before.

There is no device here. A capture keeps what was launched and a replay launches it again, by Triton's interpreter, into
the same memory, and insists that all a graph would not see of the new step has stayed as it was captured.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit.kernels.groups import Span, flat, shared
from agentkit.kernels.plan import Capacity, Shape
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.errors import EngineError
from agentkit.runtime.grammar import RegexSpec
from agentkit.runtime.graphs import ENTRIES, Replay, ladder, reserve
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.model import Model
from agentkit.runtime.pages import PagePool
from agentkit.runtime.plan import Scheduler
from agentkit.runtime.radix import PrefixTree
from agentkit.runtime.request import Request, Sampling
from agentkit.runtime.runner import TorchRunner
from agentkit.runtime.sequence import Entry, Plan, Sequence
from agentkit.runtime.vocab import Vocabulary
from bench.gpu.qwen import plans_on_any_device
from tests import tiny

PAGE, PAGES = 16, 128


class Frozen:
    """Stands for CUDA's graphs.

    Attributes:
        replays: how many of each size.
    """

    runner: TorchRunner

    def __init__(self) -> None:
        self.replays: Counter[int] = Counter()

    def __call__(self, launch: Callable[[], Tensor]) -> Replay:
        out, seen = launch().clone(), self.unseen()

        def replay() -> Tensor:
            assert self.unseen() == seen
            self.replays[len(out)] += 1
            return out.copy_(launch())

        return replay

    def unseen(self) -> list[object]:
        """What a launch reads on the host: a graph keeps it."""
        plan = self.runner._attention
        assert plan is not None
        names = ("items", "merges", "rows", "positions", "targets", "entries", "partial", "lse")
        places = [getattr(plan, name).data_ptr() for name in names]
        return [plan.launches, plan.merge_count, plan.sparse, plan.entry_head, plan.tokens, *places]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Vocabulary]:
    folder = tmp_path_factory.mktemp("model")
    tiny.write(folder, "qwen3")
    with load_engine(folder, Options(dtype="float32", packed=False)) as engine:
        return engine.runner.model, engine.vocab  # pyright: ignore


@pytest.fixture(autouse=True)
def plans() -> Iterator[None]:
    with plans_on_any_device(), torch.inference_mode():
        yield


def runner_of(model: Model, running: int = 12) -> tuple[TorchRunner, Frozen]:
    frozen = Frozen()
    frozen.runner = TorchRunner(model, PAGES, PAGE, 512, running, capture=frozen)
    return frozen.runner, frozen


def decoding(*contexts: int, first: int = 1) -> list[Sequence]:
    """Sequences whose last id is to be computed, each in pages of its own."""
    made: list[Sequence] = []
    pages = iter(range(first, PAGES))
    for rid, context in enumerate(contexts):
        seq = Sequence(rid, [1 + (7 * i + rid) % 90 for i in range(context)], "", rid, context, computed=context - 1)
        for _ in range(-(-context // PAGE)):
            seq.add_page(next(pages))
        made.append(seq)
    return made


def step(*seqs: Sequence) -> Plan:
    return Plan([Entry(seq, len(seq.ids) - 1, 1, True) for seq in seqs], [], [])


def test_replays_give_the_logits_of_steps_that_run(loaded: tuple[Model, Vocabulary]) -> None:
    """Requests come, share a prefix, grow over pages, are preempted, forked and finished; two runners run one plan."""
    model, numbers = loaded[0], random.Random(3)
    graphed, frozen = runner_of(model, running=8)
    plain = TorchRunner(model, PAGES, PAGE, 512, 8)
    pool = PagePool(PAGES)
    scheduler = Scheduler(pool, PrefixTree(pool, PAGE), PAGE, 512, 8, 512)
    trunk = [numbers.randrange(250) for _ in range(272)]  # enough to be read once for all who have it
    arrivals = {0: [trunk[:40]], 2: [[*trunk, 5], [*trunk, 6, 7]], 7: [trunk[:9]] * 2}
    live: list[int] = []
    worst, eager, rids = 0.0, 0, iter(range(99))
    for at in range(16):
        for ids in arrivals.get(at, []):
            scheduler.submit(rid := next(rids), ids)
            live.append(rid)
        if at == 4:
            scheduler.fork(live[1], rid := next(rids))
            live.append(rid)
        if at == 9:
            scheduler.preempt(live[2])
        if at in (11, 13):
            scheduler.finish(live.pop(0))
        plan = scheduler.plan()
        before = sum(frozen.replays.values())
        logits, wanted = graphed.step(plan).logits, plain.step(plan).logits
        eager += sum(frozen.replays.values()) == before
        assert logits.shape == wanted.shape
        worst = max(worst, float((logits - wanted).abs().max()))
        scheduler.complete(plan)
        for entry, row in zip((e for e in plan.entries if e.sample), wanted, strict=True):
            if entry.seq.rid in live:
                scheduler.append(entry.seq.rid, [int(row[:250].argmax())])
    assert worst < 1e-3
    assert set(frozen.replays) == {1, 4, 8}
    assert 3 <= eager <= 6


def test_a_replay_reads_no_row_of_a_larger_step_and_writes_none(loaded: tuple[Model, Vocabulary]) -> None:
    runner, frozen = runner_of(loaded[0])
    many = decoding(20, 33, 40, 17, 5, 64, 90)
    runner.step(step(*many))
    runner.kv.fill_(torch.nan)  # whoever reads what the others had reads this
    one = many[2]
    own = [page * PAGE + i for page in one.pages for i in range(PAGE)][: len(one.ids)]
    runner.kv[:, own] = 0.5
    before = runner.kv.clone()
    logits = runner.step(step(one, many[4])).logits[:1]
    assert frozen.replays == {8: 1, 2: 1}
    assert logits.isfinite().all()
    written = [
        slot
        for slot in range(PAGES * PAGE)
        if not torch.equal(runner.kv[:, slot].nan_to_num(7), before[:, slot].nan_to_num(7))
    ]
    assert written == sorted([own[-1], many[4].pages[0] * PAGE + 4])


def test_attention_follows_a_long_decode_and_is_planned_anew_from_time_to_time(
    loaded: tuple[Model, Vocabulary], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = runner_of(loaded[0])
    attention, updates = runner._attention, Counter[str]()
    assert attention is not None
    update = AttentionPlan.update

    def counted(self: AttentionPlan, *arguments: Any) -> None:
        updates["all"] += 1
        update(self, *arguments)

    monkeypatch.setattr(AttentionPlan, "update", counted)
    seqs, pages = decoding(1, 30), iter(range(10, PAGES))
    for _ in range(200):
        runner._batch(step(*seqs), 2)
        items = [item for item in attention.items.view(-1, 8).tolist() if item[1]]
        entries = attention.entries.tolist()
        assert {item[4] for item in items} == {len(seq.ids) for seq in seqs}
        for item in items:
            held = next(seq.pages for seq in seqs if len(seq.ids) == item[4])
            assert entries[item[2] : item[2] + len(held)] == list(held)
        for seq in seqs:
            seq.ids.append(7)
            if len(seq.ids) % PAGE == 1:
                seq.add_page(next(pages))
    assert updates["all"] == 4


def test_logits_outlive_the_next_replay(loaded: tuple[Model, Vocabulary]) -> None:
    runner, _ = runner_of(loaded[0])
    first, second = decoding(20, 33)
    kept = runner.step(step(first)).logits
    copy = kept.clone()
    assert not torch.equal(runner.step(step(second)).logits, copy)
    assert torch.equal(kept, copy)


def test_every_size_is_captured_before_the_first_step_and_touches_no_page(loaded: tuple[Model, Vocabulary]) -> None:
    runner, frozen = runner_of(loaded[0], running=9)
    runner.warm_up()
    assert list(frozen.replays) == [9, 8, 4, 2, 1]
    assert not runner.kv.any()


def test_what_is_no_decode_step_is_not_captured(loaded: tuple[Model, Vocabulary]) -> None:
    runner, frozen = runner_of(loaded[0], running=2)
    one, other, third = decoding(20, 33, 18)
    entry = step(one).entries[0]
    for entries in (
        [entry._replace(draft=(3, 4))],
        [entry._replace(start=entry.start - 2, n=3)],
        [entry, *step(other).entries, *step(third).entries],  # more than any size
    ):
        runner.step(Plan(entries, [], []))
    assert not frozen.replays


def test_a_capture_that_fails_says_what_to_do(loaded: tuple[Model, Vocabulary]) -> None:
    def fail(launch: Callable[[], Tensor]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    runner = TorchRunner(loaded[0], PAGES, PAGE, 64, 4, capture=fail)
    for run in (runner.warm_up, lambda: runner.step(step(*decoding(20)))):
        with pytest.raises(EngineError, match=r"not permitted when.*Options\(graphs=False\)") as raised:
            run()
        assert isinstance(raised.value.__cause__, RuntimeError)


def test_an_engine_with_graphs_says_what_one_without_says(loaded: tuple[Model, Vocabulary]) -> None:
    """Greedy, drawn, and under a grammar, whose first logits wait for it while others are replayed."""
    model, vocab = loaded
    graphed, frozen = runner_of(model)
    sizes = Sizes(context=256, pages=PAGES, page_size=PAGE, running=12)
    requests = [
        Request([5, 6, 7], max_tokens=20, ignore_end=True),
        Request([9] * 30, max_tokens=12, ignore_end=True, sampling=Sampling(temperature=1.0, seed=3)),
        Request([8] * 17, max_tokens=16, grammar=RegexSpec("[a-f]{12}")),
    ]

    async def outputs(engine: Engine) -> list[tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}

        async def one(index: int) -> None:
            async with engine.generate(requests[index]) as generation:
                async for _ in generation:
                    pass
                found[index] = tuple(generation.ids)

        async with anyio.create_task_group() as group:
            for index in range(len(requests)):
                group.start_soon(one, index)
        return [found[index] for index in range(len(requests))]

    said: list[list[tuple[int, ...]]] = []
    for runner in (TorchRunner(model, PAGES, PAGE, 512, 12), graphed):
        with Engine(runner, vocab, sizes) as engine:
            said.append(anyio.run(outputs, engine))
    assert said[0] == said[1]
    assert sum(frozen.replays.values()) > 15


@given(
    st.integers(1, 70), st.sampled_from([(4, 1), (32, 8), (12, 4), (64, 1), (8, 8), (128, 1)]), st.integers(0, 2**32)
)
@settings(max_examples=60, deadline=None)
def test_a_reserve_holds_every_tree_of_prefixes(count: int, heads: tuple[int, int], seed: int) -> None:
    numbers, size = np.random.default_rng(seed), next(s for s in ladder(70) if s >= count)
    shape = Shape(*heads, 32, 4, 1 << 16)
    fresh = iter(range(1 << 16))
    tables: list[list[int]] = []
    for _ in range(count):
        table = list(tables[numbers.integers(len(tables))]) if tables and numbers.random() < 0.9 else []
        table = table[: numbers.integers(len(table) + 1)] if numbers.random() < 0.5 else table
        tables.append([*table, *(next(fresh) for _ in range(numbers.integers(2, 4)))])
    spans = [Span(i, 1, 4 * len(t) - int(numbers.integers(4)), np.array(t, np.int32)) for i, t in enumerate(tables)]
    spans += [Span(i, 1, 0, np.empty(0, np.int32)) for i in range(count, size)]
    groups = shared(spans, 4, least=4)
    if sum(len(group.rows) for group in groups) > ENTRIES * size:
        groups = flat(spans, 4)
    plan = AttentionPlan(shape, Capacity(rows=ENTRIES * 70, pages=1 << 16), torch.device("cpu"), 20)
    fixed = reserve(size, shape, 20)
    plan.update(groups, size, fixed)
    assert [(launch.tile, launch.count) for launch in plan.launches] == sorted(fixed.items.items())
