"""The shape of Qwen3-4B with random weights, and a scheduler and runner over it: an engine without grammars.

Decode steps are captured; in a rehearsal, which has no graphs, they are called again instead.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from agentkit.kernels import paged
from agentkit.kernels.attention import paged_attention
from agentkit.kernels.flash import Layout
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.kernels.sample import Filter, Rows, sample
from agentkit.runtime import model as runtime_model
from agentkit.runtime.config import ModelConfig
from agentkit.runtime.graphs import CudaCapture, Replay
from agentkit.runtime.model import Batch, Model
from agentkit.runtime.pages import PagePool
from agentkit.runtime.plan import Scheduler
from agentkit.runtime.radix import PrefixTree
from agentkit.runtime.runner import TorchRunner
from agentkit.runtime.sequence import Plan, Sequence
from agentkit.runtime.weights import required_tensors
from bench.gpu.card import Bench
from bench.gpu.timing import synchronize

if TYPE_CHECKING:
    from agentkit.runtime.vocab import Vocabulary

#: ``config.json`` of Qwen3-4B-Instruct-2507, as far as it gives the model its shape.
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "max_position_embeddings": 262_144,
    "rope_theta": 5e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
TOY: dict[str, Any] = QWEN3_4B | {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 4096,
}  # fmt: skip


class RandomCheckpoint:
    """A `Checkpoint` whose tensors are drawn on the device when they are asked for: normal, of deviation 0.02; norms 1.

    Args:
        config: the shape.
        device: where the tensors are made.
        dtype: of them.
    """

    digest = "random"

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self._device, self._dtype = config, device, dtype
        self._shapes = required_tensors(config)
        self._generator = torch.Generator(device).manual_seed(0)

    def vocabulary(self) -> Vocabulary:
        raise NotImplementedError("random weights have no words")

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        made = torch.empty(shape, dtype=self._dtype, device=self._device)
        return made.normal_(0, 0.02, generator=self._generator)


def config_of(bench: Bench) -> dict[str, Any]:
    return TOY if bench.rehearsal else QWEN3_4B


def random_model(bench: Bench) -> Model:
    """Weights in bf16 on a card; in fp32 on the CPU, which is quicker there."""
    dtype = torch.float32 if bench.rehearsal else torch.bfloat16
    config = ModelConfig.from_json(config_of(bench))
    return Model(RandomCheckpoint(config, bench.device, dtype), bench.device, dtype, packed=False)


@dataclass
class Split:
    """Seconds of the host in one step, by what it does.

    Attributes:
        planning: the scheduler's `plan`.
        batch: lists to tensors, transfers, the attention's work lists.
        launching: the rest of the runner's `step`; on a GPU it returns before the device is done.
        sampling: launching the sampler and waiting for the ids, and with them for the device.
        accounting: `complete` and `append`.
    """

    planning: float = 0.0
    batch: float = 0.0
    launching: float = 0.0
    sampling: float = 0.0
    accounting: float = 0.0


class ClockedRunner(TorchRunner):
    """A runner that notes how long it takes to build its batches."""

    seconds = 0.0

    def _batch(self, plan: Plan, size: int | None = None) -> Batch:
        begin = time.perf_counter()
        batch = super()._batch(plan, size)
        self.seconds = time.perf_counter() - begin
        return batch

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Without graphs for a while."""
        graphs, self._graphs = self._graphs, None
        try:
            yield
        finally:
            self._graphs = graphs


def again(launch: Callable[[], Tensor]) -> Replay:
    """In place of a capture where there are no graphs."""
    return launch


@contextmanager
def plans_on_any_device() -> Iterator[None]:
    """In a rehearsal the model takes attention plans on the CPU, where it otherwise refuses them."""
    if torch.cuda.is_available():
        yield
        return

    def attention(query: Tensor, keys: Tensor, values: Tensor, work: AttentionPlan | Layout, scale: float) -> Tensor:
        if not isinstance(work, AttentionPlan):
            return paged_attention(query, keys, values, work, scale)
        paged.check(query, keys, values, work, scale, 1.0)
        return paged.attend(query, keys, values, work, scale, 1.0, 1.0)

    with patch.object(runtime_model, "paged_attention", attention):
        yield


@dataclass
class Decoder:
    """What `agentkit.runtime.engine.Engine` does with requests that are greedy and unconstrained, on one thread.

    Attributes:
        model: the weights, which several decoders may share.
        running: sequences at once.
        context: most tokens of each.
        step_tokens: most tokens of a step.
    """

    model: Model
    running: int
    context: int
    page_size: int
    step_tokens: int
    runner: ClockedRunner = field(init=False)
    scheduler: Scheduler = field(init=False)
    splits: list[Split] = field(default_factory=list[Split])
    submitted: int = 0

    def __post_init__(self) -> None:
        pages = self.running * (-(-self.context // self.page_size) + 1)
        capture = CudaCapture(self.model.device) if self.model.device.type == "cuda" else again
        self.runner = ClockedRunner(self.model, pages, self.page_size, self.step_tokens, self.running, capture=capture)
        with plans_on_any_device():
            self.runner.warm_up()
        pool = PagePool(pages)
        tree = PrefixTree(pool, self.page_size)
        self.scheduler = Scheduler(pool, tree, self.page_size, self.step_tokens, self.running, self.context)

    def prefill(self, count: int, tokens: int) -> float:
        """Submit random prompts and run until each has its first token; seconds."""
        numbers, sequences = random.Random(self.submitted), list[Sequence]()
        for _ in range(count):
            ids = [numbers.randrange(self.model.config.vocab_size) for _ in range(tokens)]
            sequences.append(self.scheduler.submit(self.submitted, ids))
            self.submitted += 1
        synchronize()
        begin = time.perf_counter()
        while any(len(sequence.ids) == tokens for sequence in sequences):
            self.step()
        return time.perf_counter() - begin

    @property
    def decoding(self) -> int:
        """Sequences that go on."""
        return self.scheduler.stats().running

    def finish(self) -> None:
        """End all sequences."""
        for rid in range(self.submitted):
            self.scheduler.finish(rid)

    def step(self) -> None:
        """One step of whatever is planned."""
        split = Split()
        times = [time.perf_counter()]
        plan = self.scheduler.plan()
        times.append(time.perf_counter())
        with plans_on_any_device():
            logits = self.runner.step(plan).logits
        times.append(time.perf_counter())
        tokens = self.choose(logits, plan)
        times.append(time.perf_counter())
        self.take(plan, tokens)
        times.append(time.perf_counter())
        split.planning, stepped, split.sampling, split.accounting = (b - a for a, b in pairwise(times))
        split.batch, split.launching = self.runner.seconds, stepped - self.runner.seconds
        self.splits.append(split)

    def compare(self) -> tuple[float, int]:
        """One step with and without its graph: the largest difference of a logit, and how many ids are the same."""
        plan = self.scheduler.plan()
        with plans_on_any_device():
            with self.runner.eager():
                plain = self.runner.step(plan).logits
            logits = self.runner.step(plan).logits
        chosen = logits.argmax(-1)
        self.take(plan, chosen.tolist())
        return float((logits - plain).abs().max()), int((chosen == plain.argmax(-1)).sum())

    def choose(self, logits: Tensor, plan: Plan) -> list[int]:
        """Greedy ids, read by the host as the engine reads them."""
        places = [len(entry.seq.ids) for entry in plan.entries if entry.sample]
        rows = Rows.of([Filter()] * len(places), [0] * len(places), places, logits.device)
        return sample(logits, None, rows).ids.tolist() if places else []

    def take(self, plan: Plan, tokens: list[int]) -> None:
        """Account for a step and append what was chosen."""
        self.scheduler.complete(plan)
        for entry, token in zip((e for e in plan.entries if e.sample), tokens, strict=True):
            self.scheduler.append(entry.seq.rid, [token])
