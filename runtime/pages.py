"""The page pool: which KV pages are free, and who owns the others.
 A page has exactly one owner: nobody (free), one sequence (private) or the prefix tree (tree). Sharing
happens in the tree alone, whose locks stand in for reference counts, so ``free + private + tree == total`` is
the whole ledger.
"""

from __future__ import annotations

import heapq
from enum import IntEnum


class Corruption(RuntimeError):
    """The page accounting is broken: a bug in the runtime, not in its input. Please report the message."""


class Owner(IntEnum):
    """Who may write to a page, or read it."""

    FREE = 0
    PRIVATE = 1
    TREE = 2


class PagePool:
    """Hands out pages ``0 .. total - 1`` so that one sequence's pages tend to be consecutive.

    Attention on a CPU reads a run of consecutive pages as one view, without a gather; that is why placement
    matters. Free pages are kept as maximal extents with boundary tags (Knuth, TAOCP 1, §2.5): an extent is
    found by its first page and by its end, so taking the next page and merging a released one are O(1); the
    largest extent comes from a heap with lazy deletion, O(log n).
    """

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ValueError(f"a page pool needs at least one page, not {total}; give the KV cache more memory")
        self.total = total
        self.clear()

    def clear(self) -> None:
        """Free every page."""
        self._owner = bytearray(self.total)
        self._count = [self.total, 0, 0]
        self._end: dict[int, int] = {}  # first page of a free extent -> page after its last
        self._start: dict[int, int] = {}  # the same extents by their end
        self._largest: list[tuple[int, int]] = []  # heap of (-length, start); an entry may be out of date
        self._add_extent(0, self.total)

    @property
    def free(self) -> int:
        """Pages nobody owns."""
        return self._count[Owner.FREE]

    @property
    def private(self) -> int:
        """Pages owned by one sequence each."""
        return self._count[Owner.PRIVATE]

    @property
    def tree(self) -> int:
        """Pages owned by the prefix tree."""
        return self._count[Owner.TREE]

    def owner(self, page: int) -> Owner:
        """The owner of ``page``."""
        return Owner(self._owner[page])

    def allocate(self, after: int | None) -> int | None:
        """Take one page as private: the one that follows ``after`` if it is free, else the start of a new
        run.

        A new run starts in the largest free extent: at its first page where nothing lies before it, otherwise
        in its middle, so that the run that ends before the extent and the new one can both grow.

        Args:
            after: the last page of the sequence that asks, or None for its first page.

        Returns:
            The page, or None when no page is free.
        """
        if after is not None:
            if self._owner[after] == Owner.FREE:
                raise Corruption(f"page {after} is free, yet a sequence asks for the page that follows it")
            end = self._end.get(after + 1)
            if end is not None:
                return self._take(after + 1, end, after + 1)
        extent = self._find_largest()
        if extent is None:
            return None
        start, end = extent
        return self._take(start, end, start if start == 0 else start + (end - start) // 2)

    def release(self, page: int) -> None:
        """Give a private or tree page back; releasing a free page raises `Corruption`."""
        if self._owner[page] == Owner.FREE:
            raise Corruption(f"page {page} is released twice")
        self._move(page, Owner.FREE)
        start, end = page, page + 1
        if page in self._start:
            start = self._start.pop(page)
            del self._end[start]
        if end in self._end:
            end = self._end.pop(end)
            del self._start[end]
        self._add_extent(start, end)

    def adopt(self, page: int) -> None:
        """Move a page from its sequence to the prefix tree."""
        if self._owner[page] != Owner.PRIVATE:
            raise Corruption(f"page {page} enters the tree but is {self.owner(page).name}, not PRIVATE")
        self._move(page, Owner.TREE)

    def check(self) -> None:
        """Raise `Corruption` unless counts, owners and free extents agree. O(total), for tests."""
        counted = [self._owner.count(owner) for owner in Owner]
        if counted != self._count or sum(counted) != self.total:
            raise Corruption(f"owners {counted} differ from the counts {self._count} of {self.total} pages")
        covered: set[int] = set()
        for start, end in self._end.items():
            if self._start.get(end) != start or end in self._end:
                raise Corruption(f"free extent [{start}, {end}) is not maximal or not indexed by its end")
            covered.update(range(start, end))
        free = {page for page in range(self.total) if self._owner[page] == Owner.FREE}
        if covered != free or len(self._end) != len(self._start):
            raise Corruption(f"free extents cover {sorted(covered)}, free pages are {sorted(free)}")

    def _move(self, page: int, owner: Owner) -> None:
        self._count[self._owner[page]] -= 1
        self._owner[page] = owner
        self._count[owner] += 1

    def _take(self, start: int, end: int, page: int) -> int:
        """Cut ``page`` out of the free extent ``[start, end)``."""
        del self._end[start]
        del self._start[end]
        if start < page:
            self._add_extent(start, page)
        if page + 1 < end:
            self._add_extent(page + 1, end)
        self._move(page, Owner.PRIVATE)
        return page

    def _add_extent(self, start: int, end: int) -> None:
        self._end[start] = end
        self._start[end] = start
        heapq.heappush(self._largest, (start - end, start))
        if len(self._largest) > 4 * len(self._end) + 64:  # mostly out of date: rebuild, O(1) amortised
            self._largest = [(first - last, first) for first, last in self._end.items()]
            heapq.heapify(self._largest)

    def _find_largest(self) -> tuple[int, int] | None:
        while self._largest:
            negative, start = self._largest[0]
            if self._end.get(start) == start - negative:
                return start, start - negative
            heapq.heappop(self._largest)
        return None
