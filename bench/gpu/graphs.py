"""An experiment: a decode step whose forward pass and sampler are one captured graph.

The runner does not capture yet. Everything a capture needs is there: the attention plan keeps its memory and takes a
reserve, and the model reads ids, positions and slots from tensors. Here those are kept and refilled, and the graph is
replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels import paged
from agentkit.kernels.attention import paged_attention
from agentkit.kernels.groups import Span, shared
from agentkit.kernels.plan import Capacity, Reserve, Shape, processors
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.kernels.sample import Filter, Rows, sample
from agentkit.runtime import model as runtime_model
from agentkit.runtime.model import Batch
from agentkit.runtime.sequence import Plan
from bench.gpu.qwen import Decoder
from bench.gpu.timing import capture


class GraphDecoder:
    """Decode steps of a fixed batch through one graph.

    Args:
        decoder: whose sequences go on; all of them must be decoding.
        batch: how many there are.

    Attributes:
        difference: largest difference of a logit between the captured step and the runner's own; None before.
        agreeing: how many of the ids are the same.
    """

    def __init__(self, decoder: Decoder, batch: int) -> None:
        self.decoder, self.batch = decoder, batch
        runner, c = decoder.runner, decoder.model.config
        device, size = decoder.model.device, decoder.page_size
        pages = runner.kv.shape[1] // size
        self.attention = AttentionPlan(
            Shape(c.heads, c.kv_heads, c.head_dim, size, pages),
            Capacity(rows=4 * batch, pages=4 * batch * -(-decoder.context // size), items=1024, parts=1024),
            device,
            processors(device) if device.type == "cuda" else 2,
        )
        self.reserve = Reserve({16: max(128, 2 * batch), 64: max(16, batch)}, merges=batch)
        # ids, positions and slots in one tensor: one transfer a step
        self._numbers = torch.zeros(3, batch, dtype=torch.int64, device=device)
        self._host = torch.zeros(3, batch, dtype=torch.int64, pin_memory=device.type == "cuda")
        ids, positions, slots = self._numbers.unbind()
        sampled = torch.arange(batch, device=device)
        self.work = Batch(ids, positions, slots, self.attention, sampled)
        self.rows = Rows.of([Filter()] * batch, [0] * batch, [0] * batch, device)
        self.logits = torch.zeros(batch, c.vocab_size, device=device)
        self.chosen = torch.zeros(batch, dtype=torch.int64, device=device)
        self.difference: float | None = None
        self.agreeing = 0

    def capture(self) -> None:
        """Plan a step, run it as the runner does, and capture it."""
        plan = self.decoder.scheduler.plan()
        try:
            self._fill(plan)
            logits = self.decoder.runner.step(plan).logits
            with plans_on_any_device():
                self._graph = capture(self._launch)
            self.replay()
        except Exception:
            self.decoder.scheduler.cancel(plan)  # and with it the sequences: others can be submitted
            raise
        self.difference = float((self.logits - logits).abs().max())
        self.agreeing = int((self.logits.argmax(-1) == logits.argmax(-1)).sum())
        self.decoder.take(plan, self.chosen.tolist())

    def step(self) -> None:
        """A decode step of all sequences."""
        plan = self.decoder.scheduler.plan()
        self._fill(plan)
        self.replay()
        self.decoder.take(plan, self.chosen.tolist())

    def replay(self) -> None:
        with plans_on_any_device():
            self._graph.replay()

    def _launch(self) -> None:
        logits = self.decoder.model.forward(self.work, self.decoder.runner.kv)
        self.logits.copy_(logits)
        self.chosen.copy_(sample(logits, None, self.rows).ids)

    def _fill(self, plan: Plan) -> None:
        """Refill what the graph reads."""
        entries, size = plan.entries, self.decoder.page_size
        if len(entries) != self.batch or any(entry.n != 1 for entry in entries):
            raise ValueError(f"entries: the graph is for {self.batch} sequences that decode, not for {entries}")
        rows = [(e.seq.ids[e.start], e.start, e.seq.pages[e.start // size] * size + e.start % size) for e in entries]
        self._host.copy_(torch.tensor(rows, dtype=torch.int64).T)
        self._numbers.copy_(self._host, non_blocking=True)
        spans = [Span(i, 1, e.start + 1, np.array(e.seq.pages, dtype=np.int32)) for i, e in enumerate(entries)]
        self.attention.update(shared(spans, size), self.batch, self.reserve)


@contextmanager
def plans_on_any_device() -> Iterator[None]:
    """In a rehearsal the model takes attention plans on the CPU, where it otherwise refuses them."""
    if torch.cuda.is_available():
        yield
        return

    def attention(query: Tensor, keys: Tensor, values: Tensor, work: AttentionPlan, scale: float) -> Tensor:
        if not isinstance(work, AttentionPlan):
            return paged_attention(query, keys, values, work, scale)
        paged.check(query, keys, values, work, scale, 1.0)
        return paged.attend(query, keys, values, work, scale, 1.0, 1.0)

    with patch.object(runtime_model, "paged_attention", attention):
        yield
