"""From logits to the next ids of a step: masks, filled while the forward pass runs, and one draw for all rows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels.sample import Rows, sample
from agentkit.runtime.errors import AgentError
from agentkit.runtime.live import Live
from agentkit.runtime.vocab import Vocabulary


class Sampler:
    """Draws for the sequences of a step; used by the engine's thread.

    What does not change from step to step is kept: a batch that decodes free text has the same masks, filters and
    seeds in each.

    Args:
        vocab: the tokens.
        vocab_size: columns of the logits.
    """

    def __init__(self, vocab: Vocabulary, vocab_size: int) -> None:
        self._text = _text_mask(vocab, vocab_size)
        self._thread = ThreadPoolExecutor(1, "agentkit-masks")
        self._pinned = False  # where the logits are on a GPU
        self._free = self._text  # its row again and again, where the logits are
        self._batch: list[tuple[int, int]] = []  # requests and their rows
        self._rows = Rows.of([], [], [])

    def begin(self, lives: Sequence[Live]) -> Future[Tensor] | None:
        """Have `fill` done on another thread; None where free text is all there is, whose masks do not change."""
        if all(live.grammar is None for live in lives):
            return None
        return self._thread.submit(self.fill, lives)

    def fill(self, lives: Sequence[Live]) -> Tensor:
        """The masks of sequences, ``[r, words]`` int32: a row of each, and one for each id of its draft."""
        shape = (sum(live.rows for live in lives), self._text.shape[1])
        masks = torch.empty(shape, dtype=torch.int32, pin_memory=self._pinned).copy_(self._text)
        at = 0
        for live in lives:
            rows = masks[at : at + live.rows]
            at += live.rows
            try:
                live.fill(rows)
            except AgentError as error:  # one request's grammar must not end the step of the others
                live.refused = error
        return masks

    def choose(self, lives: list[Live], logits: Tensor, masks: Tensor | None) -> list[int]:
        """Ids for the rows of some sequences, negative where nothing can be drawn.

        Args:
            lives: in the order of the rows.
            logits: ``[r, vocab_size]`` fp32, penalised.
            masks: of `fill`; None for free text.
        """
        device, count = logits.device, len(logits)
        if masks is None:
            if len(self._free) < count or self._free.device != device:
                self._free = self._text.repeat(count, 1).to(device)
            masks = self._free[:count]
        self._pinned = device.type == "cuda"
        sampled = sample(logits, masks.to(device, non_blocking=True), self._how(lives, device))
        return cast("list[int]", sampled.ids.tolist())  # pyright: ignore[reportUnknownMemberType]

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown()

    def _how(self, lives: list[Live], device: torch.device) -> Rows:
        batch = [(live.generation.rid, live.rows) for live in lives]
        if batch != self._batch:
            samplings = [live.generation.request.sampling for live in lives for _ in range(live.rows)]
            filters, seeds = [s.filter for s in samplings], [s.seed for s in samplings]
            self._rows = Rows.of(filters, seeds, _places(lives), device)
            self._batch = batch
        elif not self._rows.greedy:
            self._rows = self._rows.at(_places(lives))
        return self._rows


def _places(lives: Sequence[Live]) -> list[int]:
    """Positions of the tokens to be drawn."""
    return [len(live.sequence.ids) + i for live in lives for i in range(live.rows)]


def _text_mask(vocab: Vocabulary, vocab_size: int) -> Tensor:
    """``[1, words]``: ids that free text may use: no padded id, no control token but those that end the text."""
    allowed = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
    allowed[: vocab.size] = True
    allowed[list(vocab.control.values())] = False
    allowed[list(vocab.end_ids)] = True
    words = np.packbits(allowed, bitorder="little").view(np.int32)
    return torch.from_numpy(words).unsqueeze(0)  # pyright: ignore[reportUnknownMemberType]
