"""What a step reads beside weights and KV: ids, positions, slots and sampled rows, sent from fixed memory at once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentkit.kernels.staging import Staging, even
from agentkit.runtime.sequence import Entry

Longs = NDArray[np.int64]


class Begun(NamedTuple):
    """Rows ``[n]`` whose token is the first of a page, ascending, and these pages."""

    rows: Longs
    pages: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """A step's numbers on the device, valid until the next step's are made. Rows are those of `runtime.model.Batch`.

    Attributes:
        ids: ``[t]`` int64.
        positions: ``[t]`` int64.
        slots: ``[t]`` int64, −1 in rows that pad the step.
        sampled: ``[r]`` int64; in a padded step all rows.
        begun: what has changed in the page tables, where the step is the one before it, one token further in each
            sequence. None where it is another.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    sampled: Tensor
    begun: Begun | None


class Inputs:
    """Makes the numbers of steps, always in the same memory.

    A step that only goes on with the decoding of the last one is made of it: nothing then is gathered from the
    sequences but one id of each.

    Args:
        rows: most rows of a step, padding included.
        page_size: tokens in a page.
        device: of the model.
    """

    def __init__(self, rows: int, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._staging = Staging([4 * even(rows, torch.int64)], device, torch.int64)
        self._tables: list[array[int]] = []  # page tables of the last step, where all of its sequences decoded
        self._starts: list[int] = []  # and their positions
        self._size = self._sampled = 0
        self._padded = False

    def fill(self, entries: Items[Entry], size: int | None = None) -> Numbers:
        """The numbers of a step.

        Args:
            entries: of the plan.
            size: rows to pad a step to whose sequences all decode; None for as many rows as there are.
        """
        rows = sum(entry.rows for entry in entries) if size is None else size
        self._staging.wait()
        padded = size is not None
        if (rows, padded) == (self._size, self._padded) and self._goes_on(entries):
            begun = self._advance(entries)
        else:
            begun = None
            self._size, self._padded = rows, padded
            self._sampled = self._gather(entries)
            decodes = all(entry.decodes for entry in entries)
            self._tables = [entry.seq.pages for entry in entries] if decodes else []
            self._starts = [entry.start for entry in entries] if decodes else []
        stride = even(rows, torch.int64)
        self._staging.send(3 * stride + self._sampled)
        device = self._staging.device[0]
        ids, positions, slots = (device[i * stride : i * stride + rows] for i in range(3))
        return Numbers(ids, positions, slots, device[3 * stride : 3 * stride + self._sampled], begun)

    def _goes_on(self, entries: Items[Entry]) -> bool:
        """Whether each sequence decodes one token, the one behind its last, in the pages it had then."""
        if not entries or len(entries) != len(self._tables):
            return False
        for entry, table, start in zip(entries, self._tables, self._starts, strict=True):
            if entry.start != start + 1 or entry.seq.pages is not table or not entry.decodes:
                return False
        return True

    def _sections(self) -> tuple[Longs, Longs, Longs, Longs]:
        host, stride = self._staging.host[0], even(self._size, torch.int64)
        ids, positions, slots = (host[i * stride : i * stride + self._size] for i in range(3))
        return ids, positions, slots, host[3 * stride :]

    def _advance(self, entries: Items[Entry]) -> Begun:
        ids, positions, slots, _ = self._sections()
        count = len(entries)
        self._starts = [entry.start for entry in entries]
        ids[:count] = [entry.seq.ids[entry.start] for entry in entries]
        positions[:count] += 1
        slots[:count] += 1
        rows = np.flatnonzero(positions[:count] % self._page_size == 0)
        pages = [entries[row].seq.pages[-1] for row in rows.tolist()]
        if pages:
            slots[rows] = [page * self._page_size for page in pages]
        return Begun(rows, pages)

    def _gather(self, entries: Items[Entry]) -> int:
        """Fill the sections from the sequences; how many rows are sampled."""
        ids, positions, slots, sampled = self._sections()
        size, found = self._page_size, list(chain.from_iterable(entry.ids for entry in entries))
        count = len(found)
        ids[:count] = found
        starts, rows = (np.array(x, dtype=np.int64) for x in ([e.start for e in entries], [e.rows for e in entries]))
        positions[:count] = np.arange(count) + np.repeat(starts - rows.cumsum() + rows, rows)
        first, stop = starts // size, (starts + rows - 1) // size + 1  # pages of each sequence that are written
        pieces = zip(entries, first.tolist(), stop.tolist(), strict=True)
        pages = np.array(list(chain.from_iterable(e.seq.pages[a:b] for e, a, b in pieces)), dtype=np.int64)
        place = (stop - first).cumsum() - stop
        slots[:count] = pages[positions[:count] // size + np.repeat(place, rows)] * size + positions[:count] % size
        if self._padded:
            ids[count:], positions[count:], slots[count:] = 0, 0, -1
            sampled[: self._size] = np.arange(self._size)
            return self._size
        chosen = sampled_rows(entries)
        sampled[: len(chosen)] = chosen
        return len(chosen)


def sampled_rows(entries: Items[Entry]) -> list[int]:
    """Rows of a step whose logits are wanted: the last of an entry that samples, and those of its draft."""
    chosen: list[int] = []
    end = 0
    for entry in entries:
        end += entry.rows
        if entry.sample:
            chosen.extend(range(end - 1 - len(entry.draft), end))
    return chosen
