"""A decode step made of the one before it: every list grows by a token, and nothing is packed anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agentkit.kernels.groups import Ints

Longs = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Course:
    """Where the numbers lie that change from one decode step to the next.

    Attributes:
        items: work items whose list ends with its row's own token.
        rows: row entries whose position grows: all but those of rows that pad the batch.
        owners: query rows of these lists, ascending.
        first: first page entry of each list.
        length: tokens in it.
        room: pages it can have.
    """

    items: Longs
    rows: Longs
    owners: Longs
    first: Longs
    length: Longs
    room: Longs

    def advance(self, items: Ints, positions: Ints, entries: Ints, rows: Longs, pages: Ints, page_size: int) -> None:
        """Add a token to each list, written into the sections of a plan that `agentkit.kernels.plan.Plan` describes.

        Args:
            items: ``[n, 8]``, the work items.
            positions: of row entries.
            entries: page ids.
            rows: query rows whose token begins a page, ascending.
            pages: these pages.
            page_size: tokens in a page.

        Raises:
            ValueError: a page too few, too many, or more than there is room for.
        """
        full = np.flatnonzero(self.length % page_size == 0)
        if len(rows) != len(full) or (self.owners[full] != rows).any():
            raise ValueError(f"rows: {rows} begin a page, the lists of {self.owners[full]} are full")
        place = self.length[full] // page_size
        if (place >= self.room[full]).any():
            raise ValueError(f"pages: the lists of {rows} have room for {self.room[full]} pages; update the plan")
        entries[self.first[full] + place] = pages
        self.length += 1
        positions[self.rows] += 1
        items[self.items, 4] += 1
