"""What the runner hands to the model: the page lists of a GPU step against the layout of the same step on the CPU."""

from __future__ import annotations

import itertools
from array import array

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from agentkit.kernels import paged
from agentkit.kernels.flash import Layout
from agentkit.kernels.plan import Capacity, Shape
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.runtime.inputs import Inputs, Numbers
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.runner import TorchRunner
from agentkit.runtime.sequence import Entry, Plan, Sequence
from tests import tiny

PAGE = 16


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    folder = tmp_path_factory.mktemp("model")
    tiny.write(folder, "qwen3")
    with load_engine(folder, Options(dtype="float32")) as engine:
        model = engine.runner.model  # pyright: ignore
    return TorchRunner(model, 64, PAGE, 128, 8)


def sequence(rid: int, pages: list[int], tokens: int, computed: int) -> Sequence:
    ids = [1 + (7 * i + rid) % 90 for i in range(tokens)]
    made = Sequence(rid, ids, "", rid, tokens, computed=computed)
    for page in pages:
        made.add_page(page)
    return made


def entry(seq: Sequence) -> Entry:
    return Entry(seq, seq.computed, len(seq.ids) - seq.computed, True)


SHARED = list(range(40, 57))  # 272 tokens: enough to be read once for all who have them
STEPS = {
    "a prompt": [sequence(1, [5, 3], 20, 0)],
    "a chunk behind a past": [sequence(1, [9, 8, 20, 21], 61, 25)],
    "decode and prefill": [sequence(1, [2], 16, 15), sequence(2, [7, 6, 30], 33, 32), sequence(3, [11, 10], 30, 3)],
    "branches of one prefix": [sequence(i, [*SHARED, 20 + i], 272 + 5 + i, 272 + 4 + i) for i in range(5)],
}


@pytest.mark.parametrize("name", STEPS)
def test_page_lists_give_the_attention_of_the_layout(runner: TorchRunner, name: str) -> None:
    torch.manual_seed(0)
    entries = [entry(seq) for seq in STEPS[name]]
    config, rows = runner.model.config, sum(e.n for e in entries)
    keys, values = torch.randn(2, 64 * PAGE, config.kv_heads, config.head_dim)
    query = torch.randn(rows, config.heads, config.head_dim)
    layout = runner._work(entries)
    assert isinstance(layout, Layout)
    want = layout.attend(query, keys, values, 0.2)
    shape = Shape(config.heads, config.kv_heads, config.head_dim, PAGE, 64)
    runner._attention = AttentionPlan(shape, Capacity(rows=512, pages=512), torch.device("cpu"), 4)
    try:
        plan = runner._work(entries)
        assert isinstance(plan, AttentionPlan)
        got = paged.attend(query, keys, values, plan, 0.2, 1.0, 1.0)  # interpreted: `paged_attention` wants a GPU
    finally:
        runner._attention = None
    assert (got - want).abs().max() < 1e-5


def test_a_step_writes_what_it_computes_and_nothing_else(runner: TorchRunner) -> None:
    runner.kv.zero_()
    with torch.inference_mode():
        logits = runner.step(Plan([entry(sequence(1, [5, 3], 20, 0))], [], [])).logits
    assert logits.shape == (1, runner.vocab_size)
    written = runner.kv.abs().sum((0, 2, 3, 4)).nonzero().squeeze(1).tolist()
    assert sorted(written) == [*range(3 * PAGE, 3 * PAGE + 4), *range(5 * PAGE, 6 * PAGE)]


def by_definition(entries: list[Entry], size: int | None) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, positions, slots and sampled rows, one token after the other."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampled: list[int] = []
    for e in entries:
        for place, token in enumerate(e.ids, e.start):
            if e.sample and place >= e.start + e.n - 1:
                sampled.append(len(ids))
            ids.append(token)
            positions.append(place)
            slots.append(e.seq.pages[place // PAGE] * PAGE + place % PAGE)
    if size is None:
        return ids, positions, slots, sampled
    idle = size - len(ids)
    return ids + [0] * idle, positions + [0] * idle, slots + [-1] * idle, list(range(size))


class Batches(RuleBasedStateMachine):
    """Sequences that are prefilled, decode, draft, come and go between steps of one `Inputs`."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = Inputs(64, PAGE, torch.device("cpu"))
        self.seqs: list[Sequence] = []
        self.rids, self.fresh = itertools.count(), itertools.count(3)

    def step(self, entries: list[Entry], size: int | None = None) -> Numbers:
        for e in entries:
            while len(e.seq.pages) * PAGE < e.start + e.rows:
                e.seq.add_page(next(self.fresh) * 7 % 1009)
        numbers = self.inputs.fill(entries, size)
        made = (numbers.ids, numbers.positions, numbers.slots, numbers.sampled)
        assert tuple(x.tolist() for x in made) == by_definition(entries, size)
        for e in entries:
            e.seq.computed = e.start + e.n
            if e.sample:
                e.seq.ids.append(e.seq.rid + len(e.seq.ids))
        return numbers

    @rule(tokens=st.integers(1, 40), chunk=st.integers(1, 12))
    def prefill(self, tokens: int, chunk: int) -> None:
        if len(self.seqs) < 6:
            seq = Sequence(rid := next(self.rids), [rid + i for i in range(tokens)], "", rid, tokens)
            self.seqs.append(seq)
            while seq.computed < tokens:
                n = min(chunk, tokens - seq.computed)
                self.step([*self.decoding(seq), Entry(seq, seq.computed, n, seq.computed + n == tokens)])

    def decoding(self, *without: Sequence) -> list[Entry]:
        return [Entry(s, s.computed, 1, True) for s in self.seqs if s not in without]

    @rule(steps=st.integers(1, 20), padding=st.sampled_from([None, 0, 1, 4]))
    def decode(self, steps: int, padding: int | None) -> None:
        if self.seqs:
            for at in range(steps):
                numbers = self.step(self.decoding(), None if padding is None else len(self.seqs) + padding)
                assert at == 0 or numbers.begun is not None  # nothing is gathered again
                begun = [i for i, s in enumerate(self.seqs) if (s.computed - 1) % PAGE == 0]
                assert numbers.begun is None or numbers.begun.rows.tolist() == begun

    @rule(draft=st.integers(1, 9))
    def verify(self, draft: int) -> None:
        if self.seqs:
            first, *others = self.decoding()
            self.step([first._replace(draft=tuple(range(draft))), *others])
            while len(first.seq.pages) > -(-first.seq.computed // PAGE):
                first.seq.pages.pop()

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.seqs:
            self.seqs.remove(data.draw(st.sampled_from(self.seqs)))

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """As by a preemption after which all is found in the cache."""
        if self.seqs:
            seq = data.draw(st.sampled_from(self.seqs))
            seq.pages = array("i", [next(self.fresh) * 7 % 1009 for _ in seq.pages])


TestBatches = Batches.TestCase
TestBatches.settings = settings(max_examples=60, deadline=None)
