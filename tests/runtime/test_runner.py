"""What the runner hands to the model: the page lists of a GPU step against the layout of the same step on the CPU."""

from __future__ import annotations

import pytest
import torch

from agentkit.kernels import paged
from agentkit.kernels.flash import Layout
from agentkit.kernels.plan import Capacity, Shape
from agentkit.kernels.plan import Plan as AttentionPlan
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
    starts = [sum(e.n for e in entries[:i]) for i in range(len(entries))]
    keys, values = torch.randn(2, 64 * PAGE, config.kv_heads, config.head_dim)
    query = torch.randn(rows, config.heads, config.head_dim)
    layout = runner._work(entries, starts, rows)
    assert isinstance(layout, Layout)
    want = layout.attend(query, keys, values, 0.2)
    shape = Shape(config.heads, config.kv_heads, config.head_dim, PAGE, 64)
    runner._attention = AttentionPlan(shape, Capacity(rows=512, pages=512), torch.device("cpu"), 4)
    try:
        plan = runner._work(entries, starts, rows)
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
