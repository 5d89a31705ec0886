"""Runs one planned step on a model: page copies, the forward pass, logits of the sequences that reached their end.

Of rows that are asked about, as in scoring a text, only the log-probabilities of their targets come out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels.aligned import Aligned
from agentkit.kernels.attention import Work
from agentkit.kernels.flash import Layout
from agentkit.kernels.groups import Span, shared
from agentkit.kernels.pages import Copy as PageCopy
from agentkit.kernels.pages import copy_pages
from agentkit.kernels.plan import Capacity, Shape, processors
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.kernels.sample import target_log_probabilities
from agentkit.runtime.kv import PagedKV
from agentkit.runtime.model import Batch, Model
from agentkit.runtime.sequence import Entry, Plan

#: Rows that go through the head at once where their logits are not kept: 64 rows of Qwen3's table are 39 MB.
HEAD_ROWS = 64


@dataclass(frozen=True, slots=True)
class Output:
    """What a step gives.

    Attributes:
        logits: ``[r, vocab_size]`` fp32, for each entry that samples, in order, a row and one for each id of its draft.
        scores: ``[k]`` fp32, natural log-probabilities of the targets of all entries, in order.
    """

    logits: Tensor
    scores: Tensor


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

    @property
    def digest(self) -> str:
        """Identity of the weights."""
        ...

    @property
    def memory(self) -> PagedKV | None:
        """The KV, to be moved elsewhere; None where there is none."""
        ...

    def step(self, plan: Plan) -> Output:
        """Execute a plan."""
        ...


class TorchRunner:
    """A model and its paged KV cache.

    Args:
        model: the weights.
        pages: pages in the pool.
        page_size: tokens in a page; a power of two on a GPU.
        step_tokens: most tokens in one step.
        running: most sequences in one step.
        tokens: ids below this are tokens, the others pad the model's table; all by default.
        host_pages: pages in the host's memory for those that the pool has no room for.
        kv_dtype: of keys and values, the model's dtype by default. In float8_e4m3fn they are stored as they are, with
            scales of 1: a format with an exponent needs none as long as nothing exceeds 448.

    Attributes:
        kv: ``[layers, slots, 2, kv_heads, head_dim]``, the pool; its dtype is that of the KV.
    """

    def __init__(
        self,
        model: Model,
        pages: int,
        page_size: int,
        step_tokens: int,
        running: int,
        *,
        tokens: int | None = None,
        host_pages: int = 0,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.page_size, self.tokens = model, page_size, tokens
        # Zeroed once: a row that no sequence wrote may be read by a masked lane, and 0 × NaN is NaN.
        self.kv = torch.zeros(
            (model.config.layers, pages * page_size, *model.kv_shape),
            dtype=kv_dtype or model.dtype,
            device=model.device,
        )
        self._memory = PagedKV(model, self.kv, page_size, host_pages)
        self._attention: AttentionPlan | None = None
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

    @property
    def digest(self) -> str:
        return self.model.digest

    @property
    def memory(self) -> PagedKV:
        return self._memory

    def step(self, plan: Plan) -> Output:
        self._move(plan)
        batch = self._batch(plan)
        hidden = self.model.hidden(batch, self.kv)
        return Output(self._logits(hidden[batch.sampled]), self._scores(plan, hidden))

    def _move(self, plan: Plan) -> None:
        """Copy pages, to the host first: what follows may overwrite them."""
        self._memory.spill(plan.spills)
        self._memory.restore(plan.restores)
        for copy in plan.copies:  # one by one: the target of one may be the source of the next
            copy_pages(self.kv, [PageCopy(copy.src_page, copy.dst_page, copy.n_tokens)], self.page_size)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def _scores(self, plan: Plan, hidden: Tensor) -> Tensor:
        """Log-probabilities of the targets. Their logits, far larger than all else of a step, exist piece by piece."""
        rows: list[int] = []
        targets: list[tuple[int, ...]] = []
        end = 0
        for entry in plan.entries:
            end += entry.rows
            rows += range(end - entry.scored, end)
            targets += entry.targets
        scores = [torch.empty(0, device=hidden.device)]
        for start in range(0, len(rows), HEAD_ROWS):
            piece = slice(start, start + HEAD_ROWS)
            logits = self._logits(hidden[self._tensor(rows[piece])])[:, : self.tokens]
            places = [place for place, tokens in enumerate(targets[piece]) for _ in tokens]
            tokens = self._tensor(chain.from_iterable(targets[piece]))
            scores.append(target_log_probabilities(logits, self._tensor(places), tokens))
        return torch.cat(scores)

    def _batch(self, plan: Plan) -> Batch:
        starts: list[int] = []
        row = 0
        for entry in plan.entries:
            starts.append(row)
            row += entry.rows
        spans = [(e.start, e.start + e.rows, e.seq) for e in plan.entries]
        tensor = self._tensor
        return Batch(
            ids=tensor(chain.from_iterable(entry.ids for entry in plan.entries)),
            positions=tensor(chain.from_iterable(range(a, b) for a, b, _ in spans)),
            slots=tensor(chain.from_iterable(self._slots(seq.pages, a, b) for a, b, seq in spans)),
            work=self._work(plan.entries, starts, row),
            sampled=tensor(sampled_rows(plan.entries)),
        )

    def _tensor(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.model.device)

    def _work(self, entries: list[Entry], starts: list[int], rows: int) -> Layout | Aligned | AttentionPlan:
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


def sampled_rows(entries: Iterable[Entry]) -> list[int]:
    """Rows of a step whose logits are wanted: of each entry that samples its last one, and those of its draft."""
    sampled: list[int] = []
    row = 0
    for entry in entries:
        row += entry.rows
        if entry.sample:
            sampled.extend(range(row - 1 - len(entry.draft), row))
    return sampled
