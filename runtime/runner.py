"""Runs one planned step on a model: page copies, the forward pass, logits of the sequences that reached their end.

Of rows that are asked about, as in scoring a text, only the log-probabilities of their targets come out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels.aligned import Aligned
from agentkit.kernels.attention import Work
from agentkit.kernels.chunked import Chunked
from agentkit.kernels.flash import Layout
from agentkit.kernels.groups import Span, flat, shared
from agentkit.kernels.pages import Copy as PageCopy
from agentkit.kernels.pages import copy_pages
from agentkit.kernels.plan import Capacity, Shape, processors
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.kernels.sample import target_log_probabilities
from agentkit.runtime.graphs import ENTRIES, Capture, Graphs, reserve
from agentkit.runtime.inputs import Begun, Inputs
from agentkit.runtime.kv import PagedKV, zeros
from agentkit.runtime.model import Batch, Model
from agentkit.runtime.sequence import Entry, Plan

#: Rows that go through the head at once where their logits are not kept: 64 rows of Qwen3's table are 39 MB.
HEAD_ROWS = 64
#: Steps of a decoding batch after which its attention is planned anew, as its contexts have grown by so many tokens.
_STEPS = 64
_NO_PAGES = np.empty(0, np.int32)
_NONE = torch.empty(0)


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
    def asynchronous(self) -> bool:
        """Whether `step` returns while a device still computes what it gives."""
        ...

    @property
    def memory(self) -> PagedKV | None:
        """The KV, to be moved elsewhere; None where there is none."""
        ...

    def step(self, plan: Plan) -> Output:
        """Execute a plan."""
        ...


class Kept(TypedDict, total=False):
    """What a kind of `TorchRunner` hands on to it: its keyword arguments, but for those of its own."""

    tokens: int | None
    host_pages: int
    kv_dtype: torch.dtype | None
    capture: Capture | None


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
        capture: how decode steps are captured as graphs; None leaves them as they are.

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
        capture: Capture | None = None,
    ) -> None:
        self.model, self.page_size, self.tokens = model, page_size, tokens
        # Zeroed once: a row that no sequence wrote may be read by a masked lane, and 0 × NaN is NaN.
        shape = (model.config.layers, pages * page_size, *model.kv_shape)
        self.kv = zeros(shape, kv_dtype or model.dtype, model.device)
        self._memory = PagedKV(model, self.kv, page_size, host_pages)
        self._inputs = Inputs(max(step_tokens, running), page_size, model.device)
        self._room = -(-_STEPS // page_size)
        self._age = 0  # steps since the attention was planned anew
        self._attention: AttentionPlan | None = None
        self._graphs: Graphs | None = None
        if capture is not None:
            self._graphs = Graphs(lambda batch: model.hidden(batch, self.kv), running, capture)
        if model.device.type == "cuda" or capture is not None:
            self._attention = self._planned(pages, step_tokens, running)

    def _planned(self, pages: int, step_tokens: int, running: int) -> AttentionPlan:
        c, device = self.model.config, self.model.device
        shape, count = Shape(c.heads, c.kv_heads, c.head_dim, self.page_size, pages), processors(device)
        capacity = self._capacity(step_tokens, running)
        items = max(capacity.items, sum(reserve(running, shape, count).items.values()))
        return AttentionPlan(shape, replace(capacity, items=items), device, count)

    def _capacity(self, step_tokens: int, running: int) -> Capacity:
        """What the attention of any step fits in, but for the grids of captured ones."""
        pages = -(-self.model.config.max_positions // self.page_size) + 2 * self._room
        return Capacity(rows=ENTRIES * step_tokens, pages=running * pages)

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
    def asynchronous(self) -> bool:
        return self.model.device.type == "cuda"

    @property
    def memory(self) -> PagedKV:
        return self._memory

    def step(self, plan: Plan) -> Output:
        self._move(plan)
        size = self._size(plan.entries)
        batch = self._batch(plan, size)
        if self._graphs is None or size is None:
            hidden = self.model.hidden(batch, self.kv)
            return Output(self._logits(hidden[batch.sampled]), self._scores(plan, hidden))
        return Output(self._logits(self._graphs.run(batch)[: len(plan.entries)]), _NONE)

    def _size(self, entries: list[Entry]) -> int | None:
        """Rows that a captured step is padded to; None for one that is not captured."""
        return self._graphs.size(entries) if self._graphs is not None else None

    def _move(self, plan: Plan) -> None:
        """Copy pages, to the host first: what follows may overwrite them."""
        self._memory.spill(plan.spills)
        self._memory.restore(plan.restores)
        for copy in plan.copies:  # one by one: the target of one may be the source of the next
            copy_pages(self.kv, [PageCopy(copy.src_page, copy.dst_page, copy.n_tokens)], self.page_size)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture the decode steps of every size, the largest first: the others then find room in its memory.

        Raises:
            EngineError: they cannot be captured.
        """
        if self._graphs is not None:
            for size in reversed(self._graphs.sizes):
                self._graphs.run(self._batch(Plan([], [], []), size))

    def _scores(self, plan: Plan, hidden: Tensor) -> Tensor:
        """Log-probabilities of the targets. Their logits, far larger than all else of a step, exist piece by piece."""
        if not any(entry.scored for entry in plan.entries):
            return _NONE
        rows: list[int] = []
        targets: list[tuple[int, ...]] = []
        end = 0
        for entry in plan.entries:
            end += entry.rows
            rows += range(end - entry.scored, end)
            targets += entry.targets
        scores: list[Tensor] = []
        for start in range(0, len(rows), HEAD_ROWS):
            piece = slice(start, start + HEAD_ROWS)
            logits = self._logits(hidden[self._tensor(rows[piece])])[:, : self.tokens]
            places = [place for place, tokens in enumerate(targets[piece]) for _ in tokens]
            tokens = self._tensor(chain.from_iterable(targets[piece]))
            scores.append(target_log_probabilities(logits, self._tensor(places), tokens))
        return torch.cat(scores)

    def _batch(self, plan: Plan, size: int | None = None) -> Batch:
        """The batch of a plan, in the memory of the one before.

        Args:
            plan: the step.
            size: rows to pad it to, where it is captured.
        """
        numbers = self._inputs.fill(plan.entries, size)
        work = self._work(plan.entries, numbers.begun, size)
        return Batch(numbers.ids, numbers.positions, numbers.slots, work, numbers.sampled)

    def _tensor(self, values: Iterable[int]) -> Tensor:
        pinned = torch.tensor(list(values), dtype=torch.int64, pin_memory=self.model.device.type == "cuda")
        return pinned.to(self.model.device, non_blocking=True)

    def _work(
        self, entries: list[Entry], begun: Begun | None = None, size: int | None = None
    ) -> Work | Layout | Aligned | Chunked | AttentionPlan:
        """The attention of the step: pieces of the pool on the CPU, page lists with shared prefixes on a GPU.

        Args:
            entries: of the plan.
            begun: as in `Numbers`.
            size: as in `_batch`.
        """
        if self._attention is None:
            starts = accumulate((entry.rows for entry in entries), initial=0)
            works = [Work(start, e.rows, self._runs(e)) for start, e in zip(starts, entries, strict=False)]
            return works[0] if len(works) == 1 and works[0].rows == 1 else Layout(works, self.model.dtype)
        if begun is not None and self._age < _STEPS:
            self._age += 1
            self._attention.advance(begun.rows, begun.pages)
        else:
            self._age = 0
            self._attend(self._attention, entries, size)
        return self._attention

    def _attend(self, attention: AttentionPlan, entries: list[Entry], size: int | None) -> None:
        """Plan the attention of a step anew."""
        starts = accumulate((entry.rows for entry in entries), initial=0)
        spans = [Span(start, e.rows, e.start + e.rows, e.seq.table) for start, e in zip(starts, entries, strict=False)]
        rows, fixed = sum(entry.rows for entry in entries), None
        if size is not None:
            spans += [Span(row, 1, 0, _NO_PAGES) for row in range(rows, size)]
            rows, fixed = size, reserve(size, attention.shape, attention.processors)
        groups = shared(spans, self.page_size)
        entered = sum(len(group.rows) for group in groups)
        # Each row is in as many groups as there are branching points above it: rarely in more than four.
        if entered > ENTRIES * rows or 2 * (entered - rows) > attention.capacity.parts:
            groups = flat(spans, self.page_size)
        attention.update(groups, rows, fixed, self._room)

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
