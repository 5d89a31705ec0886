"""Runs one planned step on a model: page copies, the forward pass, logits of the sequences that reached their end."""

from __future__ import annotations

from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from agentkit.kernels.attention import Work
from agentkit.runtime.model import Batch, Model
from agentkit.runtime.sequence import Copy, Entry, Plan


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
            ``[r, vocab_size]`` fp32, one row for each entry that samples, in order.
        """
        ...


class TorchRunner:
    """A model and its paged KV cache.

    Args:
        model: the weights.
        pages: pages in the pool.
        page_size: tokens in a page.
    """

    def __init__(self, model: Model, pages: int, page_size: int) -> None:
        self.model, self.page_size = model, page_size
        # Zeroed once: a row that no sequence wrote may be read by a masked lane, and 0 × NaN is NaN.
        self.kv = torch.zeros(
            (model.config.layers, pages * page_size, *model.kv_shape), dtype=model.dtype, device=model.device
        )

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes

    def step(self, plan: Plan) -> Tensor:
        for copy in plan.copies:
            self._copy(copy)
        return self.model.forward(self._batch(plan), self.kv)

    def _copy(self, copy: Copy) -> None:
        source, target = copy.src_page * self.page_size, copy.dst_page * self.page_size
        self.kv[:, target : target + copy.n_tokens] = self.kv[:, source : source + copy.n_tokens]

    def _batch(self, plan: Plan) -> Batch:
        work: list[Work] = []
        sampled: list[int] = []
        row = 0
        for entry in plan.entries:
            work.append(Work(row, entry.n, self._runs(entry)))
            row += entry.n
            if entry.sample:
                sampled.append(row - 1)
        spans = [(e.start, e.start + e.n, e.seq) for e in plan.entries]
        tensor = self._tensor
        return Batch(
            ids=tensor(chain.from_iterable(seq.ids[a:b] for a, b, seq in spans)),
            positions=tensor(chain.from_iterable(range(a, b) for a, b, _ in spans)),
            slots=tensor(chain.from_iterable(self._slots(seq.pages, a, b) for a, b, seq in spans)),
            work=work,
            sampled=tensor(sampled),
        )

    def _tensor(self, values: chain[int] | list[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.model.device)

    def _runs(self, entry: Entry) -> tuple[tuple[int, int], ...]:
        """Slots of the entry's context: runs of consecutive pages, the last one cut at the last token."""
        size, left = self.page_size, entry.start + entry.n
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
