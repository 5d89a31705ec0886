"""Sparse prefill: in the upper layers most rows of a long prompt see a part of their past only.

The cost of a prompt's attention grows with the square of its length, and what most of its rows find far behind them
changes the answer little. So from one layer on they see their last tokens, the first tokens of the context, which take
up the attention that goes nowhere (Xiao et al. 2023, arXiv:2309.17453), and, if wanted, whole pages at equal distances.
The lower layers, the last tokens of the prompt and everything that is decoded see all: which layers are sparse matters
more than what they see (TriangleMix, in https://github.com/microsoft/MInference).

Results differ from those of dense attention, and so does the KV: a sequence's namespace says which it has, and the two
never share a page. Within the sparse one a token's KV also depends on whether it was part of a prompt or decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Unpack

from torch import Tensor

from agentkit.kernels.attention import Parts, Work
from agentkit.kernels.flash import Layout
from agentkit.kernels.groups import Span, Window, shared, windowed
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.kernels.windowed import Windowed
from agentkit.runtime.model import Batch, Model
from agentkit.runtime.runner import Kept, TorchRunner
from agentkit.runtime.sequence import Entry, Plan


@dataclass(frozen=True, slots=True)
class Sparse:
    """What rows of a prompt see in the sparse layers.

    Attributes:
        window: the last tokens, a row's own included.
        sinks: the first tokens of the context.
        every: every so many pages a whole page is seen by all; 0 for none.
        layer: the first sparse layer, from 0; None for the upper half.
        tail: last tokens of a prompt that see all.
    """

    window: int = 1024
    sinks: int = 64
    every: int = 0
    layer: int | None = None
    tail: int = 128

    def __post_init__(self) -> None:
        _ = self.seen  # refuses what makes no window
        if self.tail < 1:
            raise ValueError(f"tail: {self.tail}, but the last token of a prompt must see all of it")

    @property
    def seen(self) -> Window:
        """The window, as kernels take it."""
        return Window(self.window, self.sinks, self.every)


class SparseRunner(TorchRunner):
    """A `TorchRunner` with sparse prefill for the sequences whose namespace says so.

    Args:
        sparse: what they see. The others as of `TorchRunner`.

    Raises:
        ValueError: ``sparse.layer`` is no layer of the model.
    """

    def __init__(
        self,
        model: Model,
        pages: int,
        page_size: int,
        step_tokens: int,
        running: int,
        *,
        sparse: Sparse,
        **kept: Unpack[Kept],
    ) -> None:
        super().__init__(model, pages, page_size, step_tokens, running, **kept)
        layers = model.config.layers
        self.sparse, self.layer = sparse, layers // 2 if sparse.layer is None else sparse.layer
        if not 0 <= self.layer < layers:
            raise ValueError(f"layer: {self.layer}, the model has layers 0 to {layers - 1}")
        self.memory.format = replace(self.memory.format, attention=f"{sparse!r} from layer {self.layer} on")
        self._plans: tuple[AttentionPlan, AttentionPlan] | None = None
        if self._attention is not None:
            a = self._attention
            some, none = (
                AttentionPlan(a.shape, a.capacity, a.device, a.processors, window) for window in (sparse.seen, Window())
            )
            self._plans = some, none

    def _batch(self, plan: Plan, size: int | None = None) -> Batch:
        batch = super()._batch(plan, size)
        some: list[tuple[int, Entry]] = []
        rest: list[tuple[int, Entry]] = []
        row = 0
        for entry in plan.entries:
            n = self._windowed_rows(entry)
            if n:
                some.append((row, entry.cut(0, n)))
            if n < entry.rows:
                rest.append((row + n, entry.cut(n, entry.rows)))
            row += entry.rows
        if not some:
            return batch
        parts = [(some, True), (rest, False)] if rest else [(some, True)]
        upper = Parts(tuple((self._rows(part), self._part(part, sparse)) for part, sparse in parts))
        return replace(batch, upper=(self.layer, upper))

    def _windowed_rows(self, entry: Entry) -> int:
        """How many of an entry's rows do not see all of their past in the sparse layers: the first ones."""
        seq = entry.seq
        if not seq.sparse:
            return 0
        dense = seq.prompt - self.sparse.tail  # what is asked about counts as following the prompt
        dense = dense if seq.targets is None else min(dense, seq.targets.first)
        n = max(0, min(entry.rows, dense - entry.start))
        return n if entry.start + n > self.sparse.window else 0

    def _rows(self, part: list[tuple[int, Entry]]) -> Tensor:
        return self._tensor(row for start, entry in part for row in range(start, start + entry.rows))

    def _part(self, part: list[tuple[int, Entry]], sparse: bool) -> Layout | Windowed | AttentionPlan:
        """The work of some rows, which are counted from 0."""
        works: list[Work] = []
        spans: list[Span] = []
        at = 0
        for _, e in part:
            if self._plans is None:
                works.append(Work(at, e.rows, self._runs(e)))
            else:
                spans.append(Span(at, e.rows, e.start + e.rows, e.seq.table))
            at += e.rows
        if self._plans is None:
            dtype = self.model.dtype
            return Windowed(works, self.sparse.seen, self.page_size, dtype) if sparse else Layout(works, dtype)
        some, none = self._plans
        if sparse:
            some.update(windowed(spans, self.page_size, self.sparse.seen), at)
            return some
        none.update(shared(spans, self.page_size), at)
        return none
