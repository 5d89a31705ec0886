"""Groups of a step packed into the tensors that an attention launch reads.

A `Plan` is made once and refilled every step, always in the same memory, so a captured CUDA graph reads the new step
when it is replayed. All of it crosses to the device in one copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentkit.kernels.course import Course
from agentkit.kernels.groups import FAR, Group, Ints, Window
from agentkit.kernels.staging import Staging

#: int32 words of a work item: first row entry, row entries, first page entry, context position of the list's first
#: token, tokens in the list, split, splits, 1 where the rows have this one part only and it is their result.
ITEM = 8
#: int32 words of a merge: query row, first part, parts, unused.
MERGE = 4
#: Programs of a tile that a Hopper multiprocessor holds at once, by rows of the tile: shared memory decides.
RESIDENT = {16: 3, 32: 3, 64: 2, 128: 1}
#: A split reads at least this many tokens: the parts it leaves to be merged cost 3 % of its loads then.
_SHORTEST = 256
#: What a program costs beside its tokens (work lists, first loads, writing its part), in tokens.
_OVERHEAD = 64

Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """What does not change between steps.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads; ``heads`` is a multiple.
        head_dim: size of a head.
        page_size: tokens in a page, a power of two.
        pages: pages in the pool; a page id outside it is refused.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads or self.heads < 1:
            raise ValueError(f"heads: {self.heads} are no multiple of {self.kv_heads} KV heads")
        if self.heads > 128 * self.kv_heads:
            raise ValueError(f"heads: {self.heads // self.kv_heads} for one KV head are more than a tile's 128 rows")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size: {self.page_size} is no power of two")

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much one step can hold.

    Attributes:
        rows: query rows, counted once for each group they are in.
        pages: entries of all page lists together.
        items: work items, one for each block of rows and split.
        parts: partial results of single rows; each takes ``heads * (head_dim + 1)`` fp32.
    """

    rows: int
    pages: int
    items: int = 4096
    parts: int = 4096


@dataclass(frozen=True, slots=True)
class Reserve:
    """Grid sizes to launch whatever a step needs of them, which a captured graph fixes.

    Attributes:
        items: work items by rows of the tile. Groups use the tiles named here and no others.
        merges: rows that can have several parts.
    """

    items: Mapping[int, int]
    merges: int

    def __post_init__(self) -> None:
        if not set(self.items) <= set(RESIDENT):
            raise ValueError(f"items: tiles of {sorted(self.items)} rows, there are {sorted(RESIDENT)}")


@dataclass(frozen=True, slots=True)
class Launch:
    """Work items of one tile shape: ``items[first : first + count]``."""

    tile: int
    first: int
    count: int


@dataclass(slots=True, eq=False)
class Plan:
    """A step's attention, ready to be launched: what `paged_attention` takes as ``work`` on a GPU.

    Make one plan for the engine's life (or one small one for decode and one for prefill: each update copies all of
    a plan's capacity but unused page entries). For each step build groups with `agentkit.kernels.groups`, call
    `update`, and pass the plan to every layer. To capture a decode step in a CUDA graph, update the plan with a
    `Reserve`, capture, and from then on update it with the same reserve before each replay; pad the batch with
    spans of no context.

    Attributes:
        shape: heads and pages.
        capacity: how much a step can hold.
        device: where the kernels run.
        processors: multiprocessors of the device, by which contexts are split.
        window: which keys a row sees. Other than the default, groups must list positions (`groups.windowed`).
        chunk: tokens of a split. None balances the step; a number makes a row's result independent of what else is
            in the batch, bit for bit.
    """

    shape: Shape
    capacity: Capacity
    device: torch.device
    processors: int
    window: Window = field(default_factory=Window)
    chunk: int | None = None
    arch: str = field(init=False)
    entry_head: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    turns: int = field(default=1, init=False)
    sparse: bool = field(default=False, init=False)
    launches: tuple[Launch, ...] = field(default=(), init=False)
    merge_count: int = field(default=0, init=False)
    items: Tensor = field(init=False)
    merges: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    positions: Tensor = field(init=False)
    targets: Tensor = field(init=False)
    entries: Tensor = field(init=False)
    partial: Tensor = field(init=False)
    lse: Tensor = field(init=False)
    _staging: Staging = field(init=False)
    _sent: int = field(default=0, init=False)  # words of page entries
    _course: Course | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        c, s = self.capacity, self.shape
        for name in ("rows", "pages", "items", "parts"):
            if getattr(c, name) < 1:
                raise ValueError(f"capacity: {name} must be positive")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk: {self.chunk} tokens must be positive")
        self.arch = architecture(self.device)
        sizes = (c.items * ITEM, c.rows * MERGE, c.rows, c.rows, c.rows, c.pages * 2)
        self._staging = Staging(sizes, self.device)
        self.items, self.merges, self.rows, self.positions, self.targets, self.entries = self._staging.device
        self.partial = torch.empty(c.parts, s.heads, s.head_dim, dtype=torch.float32, device=self.device)
        self.lse = torch.empty(c.parts, s.heads, dtype=torch.float32, device=self.device)
        self.device = self.lse.device  # with its index, as tensors have it

    def update(
        self, groups: Sequence[Group], tokens: int, reserve: Reserve | None = None, room: int = 0, turns: int = 1
    ) -> None:
        """Refill the plan.

        Args:
            groups: the step's work. Each query row must be in one or more; lists of one row must not overlap.
            tokens: query rows of the batch.
            reserve: grid sizes to keep, for a captured graph; None launches what there is.
            room: pages by which the list of a single row can grow in `advance`.
            turns: queries of each row, all rows' first ones before all rows' second ones. Groups then name queries, and
                the parts of all queries of a row make its result. A row in one group only is there by its first query.

        Raises:
            ValueError: rows or pages out of range, a row in no group, more than the capacity or reserve holds.
        """
        packed = _pack(groups, self, room, tokens if turns > 1 else None)
        _check(packed, tokens, turns, self)
        blocks = _blocks(packed, self.shape, sorted(reserve.items) if reserve else sorted(RESIDENT))
        alone = _alone(packed, blocks)
        splits = _splits(blocks, alone, self, reserve)
        targets, merges, parts = _parts(packed, blocks, alone, splits)
        order = np.lexsort((-blocks.lengths // splits, blocks.tile))  # longest first: a launch ends with its last
        counts = {tile: int(splits[blocks.tile == tile].sum()) for tile in np.unique(blocks.tile).tolist()}
        launches = _launches(counts, reserve, self.capacity.items)
        merge_count = reserve.merges if reserve else len(merges)
        if len(merges) > merge_count or merge_count > self.capacity.rows:
            raise ValueError(f"reserve: {len(merges)} rows to merge, {merge_count} reserved")
        assert parts <= self.capacity.parts
        self._staging.wait()
        items, merge, *rest = self._staging.host
        used = launches[-1].first + launches[-1].count if launches else 0
        items[: used * ITEM] = 0
        table = items.reshape(-1, ITEM)
        places = np.concatenate([np.arange(x.first, x.first + counts.get(x.tile, 0)) for x in launches] or [order])
        table[places] = _items(blocks, alone, splits, order)
        merge[: merge_count * MERGE] = 0
        merge.reshape(-1, MERGE)[: len(merges)] = merges
        for section, values in zip(rest, (packed.rows, packed.positions, targets, packed.entries), strict=True):
            section[: len(values)] = values
        self._sent = len(packed.entries)
        self._staging.send(self._sent)
        self.tokens, self.turns = tokens, turns
        self.launches, self.merge_count, self.sparse = launches, merge_count, packed.sparse
        self._course = _course(packed, blocks, places, np.repeat(order, splits[order]), self) if room else None

    def advance(self, rows: Longs, pages: Sequence[int]) -> None:
        """Refill the plan for the same sequences, each of which has decoded one more token.

        What `update` would make of it, but in a few microseconds, and with the splits that the last update chose:
        update again from time to time, as the contexts grow.

        Args:
            rows: query rows whose token is the first of a page, ascending.
            pages: these pages.

        Raises:
            ValueError: the last update was not for decoding or left no room, or the pages are not those that lack.
        """
        if self._course is None:
            raise ValueError("advance: the last update had rows that do not decode, or left no room")
        if len(pages) and not (min(pages) >= 0 and max(pages) < self.shape.pages):
            raise ValueError(f"pages: {min(pages)} to {max(pages)} in a pool of {self.shape.pages}")
        self._staging.wait()
        items, _, _, positions, _, entries = self._staging.host
        self._course.advance(
            items.reshape(-1, ITEM), positions, entries, rows, np.array(pages, dtype=np.int32), self.shape.page_size
        )
        self._staging.send(self._sent if len(rows) else 0)

    def with_entries(self, entries: Tensor) -> Plan:
        """This plan with page lists made on the device, for each KV head its own: see `groups.selected`.

        Args:
            entries: ``[kv_heads, n, 2]`` int32, (page id, position of its first token), in the order of the groups.
        """
        if not self.sparse:
            raise ValueError("entries: the plan's groups have no positions, so neither can other pages")
        if entries.dtype is not torch.int32 or entries.shape[::2] != (self.shape.kv_heads, 2):
            raise ValueError(f"entries: {entries.dtype} {tuple(entries.shape)}, not int32 [kv_heads, n, 2]")
        other = copy(self)
        other.entries = entries.contiguous()
        other.entry_head = other.entries.stride(0)
        return other


def architecture(device: torch.device) -> str:
    """``sm_90`` and the like, or AMD's ``gfx`` name; ``sm_90`` for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return str(_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for the CPU, where kernels are interpreted."""
    return 2 if device.type == "cpu" else int(_properties(device).multi_processor_count)


def _properties(device: torch.device) -> Any:
    return cast("Any", torch.cuda.get_device_properties(device))  # pyright: ignore[reportUnknownMemberType]


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """Groups laid end to end. ``entries`` are page ids, or (page id, position) pairs where ``sparse``."""

    rows: Ints  # of the query
    results: Ints  # the same, of the result
    positions: Ints
    entries: Ints
    counts: Longs  # rows of each group
    first_row: Longs
    first_page: Longs
    pages: Longs  # room included
    lengths: Longs
    bases: Longs
    sparse: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """Groups cut into blocks of rows that fit a tile, one entry each."""

    tile: Longs
    first_row: Longs
    rows: Longs
    first_page: Longs
    bases: Longs
    lengths: Longs  # tokens that at least one of the block's rows can see


def _pack(groups: Sequence[Group], plan: Plan, room: int, tokens: int | None) -> _Packed:
    size, full = plan.shape.page_size, plan.window == Window()
    groups = [group for group in groups if len(group.rows)]
    sparse = any(group.starts is not None for group in groups)
    if not (full or sparse):
        raise ValueError("groups: a plan with a window needs the context positions of pages")
    empty = np.empty(0, np.int32)
    counts, pages, lengths, bases = (
        np.array(column, dtype=np.int64)
        for column in (
            [len(group.rows) for group in groups],
            [len(group.pages) for group in groups],
            [group.length for group in groups],
            [group.base for group in groups],
        )
    )
    if any(len(group.positions) != len(group.rows) for group in groups):
        raise ValueError("groups: each row needs one position")
    if (bad := np.flatnonzero((lengths < 0) | (lengths > pages * size))).size:
        raise ValueError(f"groups: {bad[0]} has {lengths[bad[0]]} tokens in {pages[bad[0]]} pages of {size}")
    if room and sparse:
        raise ValueError("room: lists of chosen pages do not grow")
    spare = np.zeros(room, np.int32)
    lists = [x for group in groups for x in (group.pages, spare)] if room else [group.pages for group in groups]
    entries = np.concatenate([empty, *lists])
    pages += room
    if len(entries) and not (entries.min() >= 0 and entries.max() < plan.shape.pages):
        raise ValueError(f"groups: pages {entries.min()} to {entries.max()} in a pool of {plan.shape.pages}")
    if sparse:
        starts = [_starts(group, size) for group in groups]
        entries = np.stack([entries, np.concatenate([empty, *starts])], 1).reshape(-1)
    rows = np.concatenate([empty, *(group.rows for group in groups)])
    return _Packed(
        rows=rows,
        results=rows if tokens is None else rows % np.int32(tokens),
        positions=np.concatenate([empty, *(group.positions for group in groups)]),
        entries=entries,
        counts=counts,
        first_row=counts.cumsum() - counts,
        first_page=np.where(lengths > 0, pages.cumsum() - pages, 0),  # an empty list may lie behind the last entry
        pages=pages,
        lengths=lengths,
        bases=bases,
        sparse=sparse,
    )


def _starts(group: Group, page_size: int) -> Ints:
    if group.starts is not None:
        return group.starts
    return np.arange(group.base, group.base + len(group.pages) * page_size, page_size, dtype=np.int32)


def _blocks(packed: _Packed, shape: Shape, tiles: Sequence[int]) -> _Blocks:
    """Cut groups for the smallest tile that holds their rows, or else the largest."""
    fitting = np.array([tile for tile in tiles if tile >= shape.group], dtype=np.int64)
    if not len(fitting):
        raise ValueError(f"reserve: no tile of {list(tiles)} rows holds the {shape.group} heads of a KV head")
    place = np.minimum(np.searchsorted(fitting, packed.counts * shape.group), len(fitting) - 1)
    tile = fitting[place]
    height = tile // shape.group
    cuts = -(-packed.counts // height)
    of = np.repeat(np.arange(len(cuts)), cuts)
    skip = (np.arange(len(of)) - np.repeat(cuts.cumsum() - cuts, cuts)) * height[of]
    first_row = packed.first_row[of] + skip
    lengths = packed.lengths[of]
    if not packed.sparse and len(of):
        farthest = np.maximum.reduceat(packed.positions, first_row).astype(np.int64)
        lengths = np.clip(farthest + 1 - packed.bases[of], 0, lengths)
    return _Blocks(
        tile=tile[of],
        first_row=first_row,
        rows=np.minimum(height[of], packed.counts[of] - skip),
        first_page=packed.first_page[of],
        bases=packed.bases[of],
        lengths=lengths,
    )


def _check(packed: _Packed, tokens: int, turns: int, plan: Plan) -> None:
    words = 2 if packed.sparse else 1
    for name, have, room in (
        ("rows", len(packed.rows), plan.capacity.rows),
        ("page entries", len(packed.entries) // words, plan.capacity.pages),
    ):
        if have > room:
            raise ValueError(f"groups: {have} {name}, the plan holds {room}")
    if len(packed.rows) and not (packed.rows.min() >= 0 and packed.rows.max() < tokens * turns):
        raise ValueError(f"groups: rows {packed.rows.min()} to {packed.rows.max()} in a batch of {tokens * turns}")
    times = np.bincount(packed.results, minlength=tokens)
    missing = np.flatnonzero(times == 0)
    if len(missing):
        raise ValueError(f"groups: query row {missing[0]} is in none")
    if turns > 1 and len(bad := packed.rows[(packed.rows >= tokens) & (times[packed.results] == 1)]):
        raise ValueError(f"groups: row {bad[0] % tokens} is in one only, and not by its first query")
    if len(packed.positions) and packed.positions.max() >= FAR:
        raise ValueError(f"groups: position {packed.positions.max()} is not below 2**30")


def _alone(packed: _Packed, blocks: _Blocks) -> NDArray[np.bool_]:
    """Blocks whose rows are in no other group: unsplit, they write results instead of parts."""
    if not len(blocks.tile):
        return np.empty(0, np.bool_)
    times = np.bincount(packed.results)[packed.results]
    return np.maximum.reduceat(times, blocks.first_row) == 1


def _splits(blocks: _Blocks, alone: NDArray[np.bool_], plan: Plan, reserve: Reserve | None) -> Longs:
    """How many programs share each block's list.

    The chunk of each tile shape is the one with the smallest bound on the launch's time, within what reserve and
    parts allow; where nothing is left to allow it, lists stay whole.
    """
    splits = np.ones(len(blocks.tile), dtype=np.int64)
    spare = plan.capacity.parts - int(blocks.rows[~alone].sum())
    if spare < 0:
        raise ValueError(f"groups: {plan.capacity.parts - spare} parts, the plan holds {plan.capacity.parts}")
    free = plan.capacity.items - len(splits)
    if free < 0:
        raise ValueError(f"groups: {len(splits)} work items, the plan holds {plan.capacity.items}")
    for tile in np.unique(blocks.tile).tolist():
        mine = np.flatnonzero(blocks.tile == tile)
        lengths, rows, single = blocks.lengths[mine], blocks.rows[mine], alone[mine]
        room = reserve.items[tile] - len(mine) if reserve else free
        allowed = spare - int(rows[single].sum())  # a list that is split costs a part of each row more than if whole
        if plan.chunk:
            cut = np.maximum(1, -(-lengths // plan.chunk))
        elif room <= 0 or allowed <= 0:
            continue
        else:
            least = max(-(-int(lengths.sum()) // room), -(-int((rows * lengths).sum()) // allowed), 1)
            chunk = max(least, _chunk(lengths, plan.shape.kv_heads, plan.processors * RESIDENT[tile]))
            cut = np.maximum(1, -(-lengths // chunk))
        more = int((cut - 1).sum())
        parts = int((rows * (cut - 1)).sum()) + int(rows[single & (cut > 1)].sum())
        if more > max(room, 0) or parts > spare:
            raise ValueError(f"chunk: {plan.chunk} tokens need {more} items and {parts} parts more than the plan holds")
        splits[mine] = cut
        free -= more
        spare -= parts
    return splits


def _chunk(lengths: Longs, kv_heads: int, programs: int) -> int:
    """Tokens of a split with the smallest bound on the time, of a few that fill the device 1, 2, … times.

    The time of programs that start as others end is bounded by their waves when all are as long as the longest, and
    by the mean load and the longest program (Graham 1969, https://doi.org/10.1137/0117039); the smaller counts.
    """
    total, longest = int(lengths.sum()), int(lengths.max(initial=0))
    best, chosen = math.inf, max(longest, 1)
    for waves in (1, 2, 3, 4, 6, 8):
        share = programs * waves // kv_heads * longest // max(total, 1)  # splits of the longest list
        chunk = max(_SHORTEST, -(-longest // max(share, 1)))
        cut = np.maximum(1, -(-lengths // chunk))
        count = int(cut.sum()) * kv_heads
        worst = int((-(-lengths // cut)).max(initial=0)) + _OVERHEAD
        time = min(-(-count // programs) * worst, (total * kv_heads + count * _OVERHEAD) / programs + worst)
        if time < best:
            best, chosen = time, chunk
    return chosen


def _parts(packed: _Packed, blocks: _Blocks, alone: NDArray[np.bool_], splits: Longs) -> tuple[Ints, Ints, int]:
    """First part of each row entry (−1 where it writes its result), what to merge, and how many parts there are."""
    needed = np.repeat(np.where(alone & (splits == 1), 0, splits), blocks.rows)
    entries = np.flatnonzero(needed)
    order = entries[np.argsort(packed.results[entries], kind="stable")]  # the parts of a row follow each other
    counts = needed[order]
    first = counts.cumsum() - counts
    targets = np.full(len(packed.rows), -1, dtype=np.int32)
    targets[order] = first
    rows, at = np.unique(packed.results[order], return_index=True)
    total = int(counts.sum())
    merges = np.zeros((len(rows), MERGE), dtype=np.int32)
    merges[:, 0], merges[:, 1] = rows, first[at]
    merges[:, 2] = np.diff(np.append(first[at], total))
    return targets, merges, total


def _items(blocks: _Blocks, alone: NDArray[np.bool_], splits: Longs, order: Longs) -> Ints:
    """Work items in the order of blocks given."""
    cut = splits[order]
    of = np.repeat(order, cut)
    lines = np.empty((len(of), ITEM), dtype=np.int32)
    columns = (blocks.first_row, blocks.rows, blocks.first_page, blocks.bases, blocks.lengths)
    for index, column in enumerate(columns):
        lines[:, index] = column[of]
    lines[:, 5] = np.arange(len(of)) - np.repeat(cut.cumsum() - cut, cut)
    lines[:, 6] = splits[of]
    lines[:, 7] = (alone & (splits == 1))[of]
    return lines


def _course(packed: _Packed, blocks: _Blocks, places: Longs, of: Longs, plan: Plan) -> Course | None:
    """Where a step that only decodes changes in the next one; None if some row does not decode.

    Args:
        packed: the groups.
        blocks: their blocks.
        places: where the work items are.
        of: the block of each.
        plan: whose chunk is to be balanced.
    """
    ends = packed.bases + packed.lengths  # a list that ends with its row's own token is a group of this row alone
    single = (packed.counts == 1) & (packed.lengths > 0)
    own = np.flatnonzero(single & (ends == packed.positions[packed.first_row] + 1))
    moving = np.flatnonzero(packed.positions >= 0)
    owners = packed.rows[packed.first_row[own]].astype(np.int64)
    if plan.chunk or len(own) != len(np.unique(packed.rows[moving])):
        return None
    own = own[np.argsort(owners)]
    first = packed.first_row[own]
    ours = np.isin(blocks.first_row[of], first)
    return Course(places[ours], moving, np.sort(owners), packed.first_page[own], packed.lengths[own], packed.pages[own])


def _launches(counts: Mapping[int, int], reserve: Reserve | None, capacity: int) -> tuple[Launch, ...]:
    sizes = dict(sorted((reserve.items if reserve else counts).items()))
    launches: list[Launch] = []
    first = 0
    for tile, size in sizes.items():
        if counts.get(tile, 0) > size:
            raise ValueError(f"reserve: {counts[tile]} items of {tile} rows, {size} reserved")
        launches.append(Launch(tile, first, size))
        first += size
    if first > capacity:
        raise ValueError(f"capacity: {first} work items, the plan holds {capacity}")
    return tuple(launches)
