"""Runs one planned step on a model: page copies, the forward pass, logits of the sequences that reached their end."""

from __future__ import annotations

from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels.attention import Work
from agentkit.kernels.flash import Layout
from agentkit.kernels.groups import Span, shared
from agentkit.kernels.pages import Copy as PageCopy
from agentkit.kernels.pages import copy_pages
from agentkit.kernels.plan import Capacity, Shape, processors
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.runtime.model import Batch, Model
from agentkit.runtime.sequence import Entry, Plan


class Runner(Protocol):
    """What the engine needs of a model."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights one decode step reads; 0 where there is no model."""
        ...

    def step(self, plan: Plan) -> Tensor:
        """Execute a plan.

        Returns:
            ``[r, vocab_size]`` fp32, for each entry that samples, in order, one row and one for each id of its draft.
        """
        ...


class TorchRunner:
    """A model and its paged KV cache.

    Args:
        model: the weights.
        pages: pages in the pool.
        page_size: tokens in a page; a power of two on a GPU.
        step_tokens: most tokens in one step.
        running: most sequences in one step.
    """

    def __init__(self, model: Model, pages: int, page_size: int, step_tokens: int, running: int) -> None:
        self.model, self.page_size = model, page_size
        # Zeroed once: a row that no sequence wrote may be read by a masked lane, and 0 × NaN is NaN.
        self.kv = torch.zeros(
            (model.config.layers, pages * page_size, *model.kv_shape), dtype=model.dtype, device=model.device
        )
        self._attention = None
        if model.device.type == "cuda":
            c = model.config
            shape = Shape(c.heads, c.kv_heads, c.head_dim, page_size, pages)
            # A row is in one group for each branching point above it, rarely in more than four.
            capacity = Capacity(rows=4 * (step_tokens + running), pages=running * -(-c.max_positions // page_size))
            self._attention = AttentionPlan(shape, capacity, model.device, processors(model.device))

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes

    def step(self, plan: Plan) -> Tensor:
        for copy in plan.copies:  # one by one: the target of one may be the source of the next
            copy_pages(self.kv, [PageCopy(copy.src_page, copy.dst_page, copy.n_tokens)], self.page_size)
        return self.model.forward(self._batch(plan), self.kv)

    def _batch(self, plan: Plan) -> Batch:
        sampled: list[int] = []
        starts: list[int] = []
        row = 0
        for entry in plan.entries:
            starts.append(row)
            row += entry.rows
            if entry.sample:
                sampled.extend(range(row - 1 - len(entry.draft), row))
        spans = [(e.start, e.start + e.rows, e.seq) for e in plan.entries]
        tensor = self._tensor
        return Batch(
            ids=tensor(chain.from_iterable(entry.ids for entry in plan.entries)),
            positions=tensor(chain.from_iterable(range(a, b) for a, b, _ in spans)),
            slots=tensor(chain.from_iterable(self._slots(seq.pages, a, b) for a, b, seq in spans)),
            work=self._work(plan.entries, starts, row),
            sampled=tensor(sampled),
        )

    def _tensor(self, values: chain[int] | list[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.model.device)

    def _work(self, entries: list[Entry], starts: list[int], rows: int) -> Layout | AttentionPlan:
        """The attention of the step: pieces of the pool on the CPU, page lists with shared prefixes on a GPU."""
        if self._attention is None:
            works = [Work(start, e.rows, self._runs(e)) for start, e in zip(starts, entries, strict=True)]
            return Layout(works, self.model.dtype)
        spans = [
            Span(start, e.rows, e.start + e.rows, np.array(e.seq.pages, dtype=np.int32))
            for start, e in zip(starts, entries, strict=True)
        ]
        self._attention.update(shared(spans, self.page_size), rows)
        return self._attention

    def _runs(self, entry: Entry) -> tuple[tuple[int, int], ...]:
        """Slots of the entry's context: runs of consecutive pages, the last one cut at the last token."""
        size, left = self.page_size, entry.start + entry.rows
        runs: list[tuple[int, int]] = []
        for first, pages in entry.seq.runs:
            runs.append((first * size, min(pages * size, left)))
            left -= pages * size
            if left <= 0:
                break
        return tuple(runs)

    def _slots(self, pages: list[int], start: int, stop: int) -> list[int]:
        size = self.page_size
        return [pages[i // size] * size + i % size for i in range(start, stop)]
