"""Contexts longer than a model has been trained for: dual chunk attention over the same pages.

Rows of a context that is short enough are computed as ever, from captured graphs, too. From the first row on that is
not, queries and keys are rotated by their places in chunks (`agentkit.kernels.chunked`), which for the rows before it
are their positions: whatever is in the prefix tree is of use to either.

With more keys than in training a softmax gets flatter. So scores are multiplied by ``(0.1 ln s + 1)²`` as in YaRN
(Peng et al. 2023, arXiv:2309.00071, section 3.4), ``s`` being how many times the trained length a row's context has.
Qwen's own implementation takes the length of the whole prompt and multiplies half of the factor into the keys. Here
all of it is the row's, so that no key and no row depends on what comes after it, and pages can be shared.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor

from agentkit.kernels.aligned import Aligned
from agentkit.kernels.attention import Work
from agentkit.kernels.chunked import TURNS, Chunked, turned
from agentkit.kernels.flash import Layout
from agentkit.kernels.groups import Span, chunked
from agentkit.kernels.plan import Capacity
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.runtime.config import DualChunk
from agentkit.runtime.inputs import Begun
from agentkit.runtime.model import Batch, Model
from agentkit.runtime.runner import Kept, TorchRunner
from agentkit.runtime.sequence import Entry, Plan


class ChunkedRunner(TorchRunner):
    """A `TorchRunner` whose contexts may be longer than ``chunks.reach``.

    Args:
        chunks: how contexts are cut; the page size divides their length. The others as of `TorchRunner`.
    """

    def __init__(
        self,
        model: Model,
        pages: int,
        page_size: int,
        step_tokens: int,
        running: int,
        *,
        chunks: DualChunk,
        **kept: Unpack[Kept],
    ) -> None:
        self.chunks = chunks
        super().__init__(model, pages, page_size, step_tokens, running, **kept)

    def _capacity(self, step_tokens: int, running: int) -> Capacity:
        capacity = super()._capacity(step_tokens, running)
        return replace(capacity, parts=max(capacity.parts, (TURNS + 1) * step_tokens))

    def _size(self, entries: list[Entry]) -> int | None:
        return None if self._far(entries) else super()._size(entries)

    def _far(self, entries: list[Entry]) -> bool:
        """Whether some row of a step has a longer context than plain attention is for."""
        reach = self.chunks.reach
        return any(entry.start + entry.rows > reach for entry in entries)

    def _batch(self, plan: Plan, size: int | None = None) -> Batch:
        batch = super()._batch(plan, size)
        if not self._far(plan.entries):
            return batch
        return replace(
            batch,
            positions=turned(batch.positions, self.chunks.length, self.chunks.chunk_size),
            slots=F.pad(batch.slots, (0, (TURNS - 1) * len(batch.slots)), value=-1),  # a key is written once
            sharpness=self._sharpness(batch.positions),
        )

    def _sharpness(self, positions: Tensor) -> Tensor | None:
        """What queries are multiplied by, ``[3 * t, 1, 1]`` fp32."""
        trained = self.chunks.original_positions
        if not trained:
            return None
        factor = 0.1 * ((positions + 1) / trained).clamp(min=1).log() + 1
        return factor.square().repeat(TURNS)[:, None, None]

    def _work(
        self, entries: list[Entry], begun: Begun | None = None, size: int | None = None
    ) -> Work | Layout | Aligned | Chunked | AttentionPlan:
        if not self._far(entries):
            return super()._work(entries, begun, size)
        starts = accumulate((entry.rows for entry in entries), initial=0)
        if self._attention is None:
            works = [Work(start, e.rows, self._runs(e)) for start, e in zip(starts, entries, strict=False)]
            return Chunked(works, self.chunks.length)
        spans = [Span(start, e.rows, e.start + e.rows, e.seq.table) for start, e in zip(starts, entries, strict=False)]
        rows = sum(entry.rows for entry in entries)
        groups = chunked(spans, self.page_size, self.chunks.length, rows)
        self._attention.update(groups, rows, turns=TURNS)
        return self._attention
