"""A runner whose logits depend, bit for bit, on a sequence's ids and on nothing else.

What a row computes to depends on the shapes it is computed in: for one row and for many there are other kernels, and
one kernel adds in another order where it splits its work otherwise. So here a step is computed in pieces of a fixed
number of rows, padded, whoever's rows they are, and attention has fixed tiles and splits, counted from the first token
of a context (`agentkit.kernels.aligned` on the CPU, `agentkit.kernels.groups.fixed` on a GPU). By induction over
its tokens a sequence then has the same KV and the same logits alone, beside others, in chunks of any size, from the
prefix tree, forked, preempted, and verified as a draft. The idea is that of "Defeating nondeterminism in LLM inference"
(He et al. 2025, https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference).

That a row's place within a piece does not matter either is probed for every height when the runner is made: kernels
order their additions by shape and never by value, so that one row repeated over a whole piece shows whether they do.
Heights that give the same bits may then be mixed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit.kernels.aligned import Aligned
from agentkit.kernels.attention import Work
from agentkit.kernels.groups import Span, fixed
from agentkit.kernels.plan import RESIDENT, Capacity, Reserve, Shape, processors
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.runtime.inputs import Begun, Inputs, sampled_rows
from agentkit.runtime.model import Model
from agentkit.runtime.runner import Kept, Output, TorchRunner
from agentkit.runtime.sequence import Entry, Plan
from agentkit.runtime.sequence import Sequence as Probe

#: Rows of a piece, the most useful number first.
_HEIGHTS = (8, 64, 1)
#: Tokens of a split of the attention on a GPU.
_CHUNK = 2048
#: Context of the rows that probe the heights; within it positions are turned by angles of all sizes.
_PROBED = 100


class InvariantRunner(TorchRunner):
    """A `TorchRunner` for replay and for tests: it takes longer, and its logits have the same bits every time.

    That holds for one checkpoint on one machine with the same versions and the same number of threads. It is tested on
    the CPU end to end (`tests/e2e/test_invariant.py`). Of a GPU, that attention is invariant is tested under Triton's
    interpreter (`tests/kernels/test_attention_triton.py`), which cannot show what the compiler makes of the masked and
    the unmasked loop; that matrix products are rests on the probe. The whole has not run on one.

    Args:
        as of `TorchRunner`.

    Attributes:
        heights: rows of the pieces that steps are cut into, ascending; all give the same bits.
    """

    def __init__(
        self, model: Model, pages: int, page_size: int, step_tokens: int, running: int, **kept: Unpack[Kept]
    ) -> None:
        super().__init__(model, pages, page_size, step_tokens, running, **kept)
        self.heights: tuple[int, ...] = _HEIGHTS
        self._inputs = Inputs(max(step_tokens, running, *_HEIGHTS), page_size, model.device)
        if self._attention is not None:
            self._attention = _attention(model, pages, page_size, running)
        with torch.inference_mode():
            self.heights = self._probe()

    def step(self, plan: Plan) -> Output:
        self._move(plan)
        pieces = [self._piece(entries) for entries in self._pieces(plan.entries)]
        hidden = torch.cat(pieces)
        rows = self._tensor(sampled_rows(plan.entries))
        return Output(self._logits(hidden[rows]), self._scores(plan, hidden))

    def _height(self, rows: int) -> int:
        """The tallest piece of which so many rows fill a quarter."""
        return max((h for h in self.heights if h <= 4 * rows), default=self.heights[0])

    def _pieces(self, entries: Sequence[Entry]) -> Iterator[list[Entry]]:
        """Entries cut so that each list has as many rows as a piece, but for the last, which may have fewer."""
        left = sum(entry.rows for entry in entries)
        piece: list[Entry] = []
        room = self._height(left)
        for entry in entries:
            at = 0
            while at < entry.rows:
                n = min(room, entry.rows - at)
                piece.append(entry.cut(at, at + n))
                at, room, left = at + n, room - n, left - n
                if not room and left:
                    yield piece
                    piece, room = [], self._height(left)
        yield piece

    def _piece(self, entries: list[Entry]) -> Tensor:
        """What the last layer gives for these rows, ``[rows, hidden]``."""
        batch = self._batch(Plan(entries, [], []))
        rows = len(batch.ids)
        padding = (0, self._height(rows) - rows)
        padded = replace(
            batch,
            ids=F.pad(batch.ids, padding),
            positions=F.pad(batch.positions, padding),
            slots=F.pad(batch.slots, padding, value=-1),  # nothing is written
        )
        return self.model.hidden(padded, self.kv)[:rows]

    def _logits(self, hidden: Tensor) -> Tensor:
        pieces: list[Tensor] = []
        while len(hidden) or not pieces:
            height = self._height(len(hidden))
            piece, hidden = hidden[:height], hidden[height:]
            logits = self.model.logits(F.pad(piece, (0, 0, 0, height - len(piece))))
            pieces.append(logits[: len(piece)])
        return torch.cat(pieces)

    def _work(
        self, entries: list[Entry], begun: Begun | None = None, size: int | None = None
    ) -> Aligned | AttentionPlan:
        c, rows = self.model.config, sum(entry.rows for entry in entries)
        starts = list(accumulate((entry.rows for entry in entries), initial=0))[:-1]
        if self._attention is None:
            works = [Work(start, e.rows, self._runs(e)) for start, e in zip(starts, entries, strict=True)]
            return Aligned(works, c.heads // c.kv_heads, self.model.dtype)
        spans = [Span(start, e.rows, e.start + e.rows, e.seq.table) for start, e in zip(starts, entries, strict=True)]
        height = self._height(rows)
        spans += [Span(row, 1, 0, np.empty(0, dtype=np.int32)) for row in range(rows, height)]
        groups = fixed(spans, self.page_size, _CHUNK)
        tile = min(tile for tile in RESIDENT if tile >= c.heads // c.kv_heads)
        blocks = sum(-(-len(group.rows) // (tile // (c.heads // c.kv_heads))) for group in groups)
        self._attention.update(groups, height, Reserve({tile: blocks}, merges=height))
        return self._attention

    def _probe(self) -> tuple[int, ...]:
        """Heights that give one row the same bits at every place of a piece, and the same as the first of them does.

        The row is one token behind an empty context, in as many sequences as a piece has rows. Of one row alone there
        is only one place, so there always is such a height.
        """
        found: dict[int, Tensor] = {}
        for height in _HEIGHTS:
            if height <= self.kv.shape[1] // self.page_size:
                self.heights = (height,)
                rows = self._piece([_probing(page, self) for page in range(height)])
                both = torch.cat([rows.float(), self._logits(rows)], 1)
                if torch.equal(both, both[:1].expand_as(both)):
                    found[height] = both[0].clone()
                self.kv[:, : height * self.page_size].zero_()
        first = next(iter(found.values()))
        return tuple(sorted(height for height, row in found.items() if torch.equal(row, first)))


def _attention(model: Model, pages: int, page_size: int, running: int) -> AttentionPlan:
    """The plan of a GPU, with splits of fixed size."""
    c, tallest = model.config, max(_HEIGHTS)
    splits = -(-c.max_positions // _CHUNK)
    capacity = Capacity(
        rows=tallest * splits,
        pages=max(running * -(-c.max_positions // page_size), tallest * (_PROBED // page_size + 1)),
        items=tallest * splits,
        parts=tallest * splits,
    )
    shape = Shape(c.heads, c.kv_heads, c.head_dim, page_size, pages)
    return AttentionPlan(shape, capacity, model.device, processors(model.device), chunk=_CHUNK)


def _probing(page: int, runner: TorchRunner) -> Entry:
    """One row at position `_PROBED`, all of whose context lies in one page."""
    size, token = runner.page_size, runner.vocab_size // 2
    count = _PROBED // size + 1
    probe = Probe(page, [token] * (_PROBED + 1), "", page, 1)
    probe.pages, probe.runs = array("i", [page] * count), [(page, 1)] * count
    return Entry(probe, _PROBED, 1, False)
