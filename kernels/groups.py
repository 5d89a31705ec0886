"""Work lists of paged attention: which query rows read which pages.

A *group* is a set of query rows that read one list of pages. A sequence is a group of its own rows; a prefix that
several sequences share is a group of all their rows, beside one group for the rest of each; a sliding window and a
selection of pages are groups with shorter lists. The kernel is the same for all of them, and a row that is in
several groups gets its parts merged by their log-sum-exp.

Everything here runs on the host, once a step, in numpy: no Python object is made for a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int32]

#: Larger than any position, and small enough that sums with a tile's width stay in 32 bits.
FAR = 1 << 30


class Span(NamedTuple):  # one is made for each sequence in each step, like groups
    """One sequence's part of a step, as `agentkit.kernels.attention.Work` says it in runs of slots.

    Attributes:
        start: first query row in the batch.
        rows: how many query rows. They are the last ``rows`` tokens of the context.
        context: tokens in the context, own tokens included. 0 with one row is a row that reads nothing, which a
            batch padded to a captured size has; its output is zero.
        pages: ``[≥ ceil(context / page_size)]`` int32, the pages of the context in order. Keep one such array for a
            sequence and append to it: made anew from a list of ints, it costs more than the plan.
    """

    start: int
    rows: int
    context: int
    pages: Ints


class Group(NamedTuple):
    """Query rows that read one list of pages.

    A row sees a key when the key's context position is not behind the row's own: attention is always causal, and a
    range that lies before all of its rows is read without a mask.

    Attributes:
        rows: ``[r]`` int32, query rows of the batch, in ascending position where they are one sequence's.
        positions: ``[r]`` int32, the context position of each row.
        pages: ``[ceil(length / page_size)]`` int32. All but the last are full.
        length: tokens in the list.
        base: context position of the list's first token, when the pages follow each other in the context.
        starts: ``[len(pages)]`` int32, context position of each page's first token, when they do not; ascending.
    """

    rows: Ints
    positions: Ints
    pages: Ints
    length: int
    base: int = 0
    starts: Ints | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Which keys of its past a row sees. The default is all of them.

    Attributes:
        window: the last tokens, its own included.
        sinks: the first tokens of the context.
        every: every ``every``-th page of the context as a whole, the first being page ``every - 1``; 0 is none.
    """

    window: int = FAR
    sinks: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.window <= FAR:
            raise ValueError(f"window: {self.window} is not between 1 and 2**30")
        if self.sinks < 0 or self.every < 0:
            raise ValueError(f"sinks, every: {self.sinks}, {self.every} must not be negative")


def visible(window: Window, positions: Tensor, keys: Tensor, page_size: int) -> Tensor:
    """Definition of what a row sees: a key not behind it that is in its window, a sink, or in a global page.

    Args:
        window: what is kept of the past.
        positions: ``[r]`` context positions of rows.
        keys: ``[n]`` context positions of keys.
        page_size: tokens in a page.

    Returns:
        ``[r, n]`` bool.
    """
    row, key = positions[:, None], keys[None, :]
    seen = (key > row - window.window) | (key < window.sinks)
    if window.every:
        seen |= (key // page_size + 1) % window.every == 0
    return seen & (key <= row)


def flat(spans: Sequence[Span], page_size: int) -> list[Group]:
    """One group for each sequence: plain causal attention.

    Raises:
        ValueError: a span that has more rows than context, or fewer pages than its context needs.
    """
    return [_rest(span, 0, page_size) for span in _checked(spans, page_size)]


def fixed(spans: Sequence[Span], page_size: int, chunk: int) -> list[Group]:
    """Groups of ``chunk`` tokens each, counted from the first token of a context, whatever its length.

    A row's parts then are the same however many rows its sequence has in the step. With tiles of one height
    (`Reserve`) and the same ``chunk`` in the plan, so that nothing is split further, neither these nor the rest of the
    batch change a bit of its result.

    Args:
        spans: the step's sequences.
        page_size: tokens in a page.
        chunk: tokens of a group, a multiple of the page size.

    Raises:
        ValueError: as `flat`; a chunk that would cut a page.
    """
    if chunk < 1 or chunk % page_size:
        raise ValueError(f"chunk: {chunk} is no multiple of a page's {page_size} tokens")
    groups: list[Group] = []
    for span in _checked(spans, page_size):
        rows, positions = _own(span)
        past = max(0, span.context - span.rows)
        for base in range(0, max(span.context, 1), chunk):
            seeing = slice(max(0, base - past), None)
            length = min(chunk, span.context - base)
            pages = span.pages[base // page_size : -(-(base + length) // page_size)]
            groups.append(Group(rows[seeing], positions[seeing], pages, length, base))
    return groups


def shared(
    spans: Sequence[Span], page_size: int, least: int = 256, most_rows: int = 8, sequences: int = 2
) -> list[Group]:
    """Groups in which sequences read the leading pages they have in common once.

    Every branching point of the tree that the page lists form becomes a group, when at least ``sequences`` of them
    share at least ``least`` tokens since the last one: a shorter range costs more in parts to be merged than it
    saves in loads. Source: the tree form of Hydragen (Juravsky et al. 2024, arXiv:2402.05099) and DeFT
    (Yao et al. 2024, arXiv:2404.00242), on page lists instead of prompts.

    Args:
        spans: the step's sequences.
        page_size: tokens in a page.
        least: tokens that a shared range has at least.
        most_rows: a sequence with more rows than this fills a tile alone and stays flat.
        sequences: sequences that a shared group has at least.

    Raises:
        ValueError: as `flat`.
    """
    groups: list[Group] = []
    few: list[Span] = []
    for span in _checked(spans, page_size):
        if span.rows <= most_rows:
            few.append(span)
        else:
            groups.append(_rest(span, 0, page_size))
    # (sequences with equal pages up to `depth`, first page that no group of theirs covers yet, depth)
    waiting = [(few, 0, 0)]
    while waiting:
        members, first, depth = waiting.pop()
        if len(members) < sequences:
            groups.extend(_rest(span, first, page_size) for span in members)
            continue
        depth = _common(members, depth, page_size)
        if (depth - first) * page_size >= least:
            groups.append(_prefix(members, first, depth, page_size))
            first = depth
        for branch in _branches(members, depth, page_size):
            if branch[1]:
                waiting.append((branch[0], first, depth + 1))
            else:
                groups.extend(_rest(span, first, page_size) for span in branch[0])
    return groups


def windowed(spans: Sequence[Span], page_size: int, window: Window, rows: int = 32) -> list[Group]:
    """Groups that hold the pages in which a row can see something under ``window``, and no others.

    The kernel masks single tokens by the same rule, so the result is `visible` exactly.

    Args:
        spans: the step's sequences.
        page_size: tokens in a page.
        window: what is kept of the past. Give the same one to the plan.
        rows: rows of a sequence that share a list. Fewer make the lists shorter.

    Raises:
        ValueError: as `flat`.
    """
    groups: list[Group] = []
    sinks, every = np.arange(-(-window.sinks // page_size), dtype=np.int32), window.every or FAR
    for span in _checked(spans, page_size):
        past = span.context - span.rows
        for cut in range(0, span.rows, rows):
            count = min(rows, span.rows - cut)
            low, high = past + cut, past + cut + count - 1
            last = high // page_size
            near = np.arange(max(0, low - window.window + 1) // page_size, last + 1, dtype=np.int32)
            before = int(near[0]) if len(near) else 0
            whole = np.arange(every - 1, before, every, dtype=np.int32)
            chosen = np.unique(np.concatenate([sinks[:before], whole, near]))
            groups.append(
                Group(
                    rows=np.arange(span.start + cut, span.start + cut + count, dtype=np.int32),
                    positions=np.arange(low, high + 1, dtype=np.int32),
                    pages=span.pages[chosen],
                    length=max(0, (len(chosen) - 1) * page_size + high % page_size + 1),
                    starts=chosen * np.int32(page_size),
                )
            )
    return groups


def chunked(spans: Sequence[Span], page_size: int, length: int, tokens: int) -> list[Group]:
    """Groups of dual chunk attention: of each row's queries, one for its own chunk, one for the chunk before, and one
    for all earlier ones; see `agentkit.kernels.chunked`.

    Args:
        spans: the step's sequences.
        page_size: tokens in a page.
        length: tokens of a chunk, a multiple of the page size.
        tokens: query rows of the batch; row ``r`` has the queries ``r``, ``r + tokens`` and ``r + 2 * tokens``.

    Raises:
        ValueError: as `flat`; a chunk that would cut a page.
    """
    if length < 1 or length % page_size:
        raise ValueError(f"length: {length} is no multiple of a page's {page_size} tokens")
    groups: list[Group] = []
    for span in _checked(spans, page_size):
        rows, positions = _own(span)
        first = max(0, span.context - span.rows)
        for begin in range(first // length * length, max(span.context, 1), length):
            stop = min(begin + length, span.context)
            mine = slice(max(0, begin - first), stop + span.rows - span.context)
            for turn, (base, end) in enumerate(((begin, stop), (begin - length, begin), (0, begin - length))):
                if turn == 0 or end > max(base, 0):
                    pages = span.pages[base // page_size : -(-end // page_size)]
                    queries = rows[mine] + np.int32(turn * tokens)
                    groups.append(Group(queries, positions[mine], pages, end - base, base))
    return groups


def selected(spans: Sequence[Span], page_size: int, count: int) -> list[Group]:
    """Groups of at most ``count`` pages each, the last page among them, for decoding with chosen pages.

    The lists hold the last pages of each context; `agentkit.kernels.select.select_pages` writes the chosen ones in
    their place, for each layer. Every list takes up ``count`` entries, so group ``i`` begins at entry ``i * count``.

    Args:
        spans: the step's sequences, one row each.
        page_size: tokens in a page.
        count: pages that are read.

    Raises:
        ValueError: as `flat`; a span of several rows; no page to read.
    """
    if count < 1:
        raise ValueError(f"count: {count} pages leave nothing to read")
    groups: list[Group] = []
    for span in _checked(spans, page_size):
        if span.rows != 1:
            raise ValueError(f"spans: pages are selected for one row of a sequence, not for {span.rows}")
        pages = -(-span.context // page_size)
        kept = min(count, pages)
        chosen = np.arange(pages - kept, pages, dtype=np.int32)
        padding = np.zeros(count - kept, dtype=np.int32)
        groups.append(
            Group(
                rows=np.array([span.start], dtype=np.int32),
                positions=np.array([span.context - 1], dtype=np.int32),
                pages=np.concatenate([span.pages[chosen], padding]),
                length=span.context - (pages - kept) * page_size,
                starts=np.concatenate([chosen * np.int32(page_size), padding]),
            )
        )
    return groups


def _checked(spans: Sequence[Span], page_size: int) -> Sequence[Span]:
    for index, span in enumerate(spans):
        if span.rows < 1 or span.rows > max(span.context, 1) or span.context < 0:
            raise ValueError(f"spans: {index} has {span.rows} rows and a context of {span.context} tokens")
        if span.context > len(span.pages) * page_size:
            raise ValueError(f"spans: {index} has {span.context} tokens in {len(span.pages)} pages of {page_size}")
    return spans


def _own(span: Span) -> tuple[Ints, Ints]:
    """Rows of a sequence and their positions."""
    rows = np.arange(span.start, span.start + span.rows, dtype=np.int32)
    return rows, rows + np.int32(span.context - span.rows - span.start)


def _rest(span: Span, first: int, page_size: int) -> Group:
    """A sequence from page ``first`` on."""
    rows, positions = _own(span)
    pages = span.pages[first : -(-span.context // page_size)]
    return Group(rows, positions, pages, span.context - first * page_size, first * page_size)


def _prefix(members: Sequence[Span], first: int, stop: int, page_size: int) -> Group:
    """Pages ``first`` to ``stop`` for the rows of all members."""
    rows, positions = zip(*map(_own, members), strict=True)
    pages = members[0].pages[first:stop]
    return Group(np.concatenate(rows), np.concatenate(positions), pages, (stop - first) * page_size, first * page_size)


def _past(span: Span, page_size: int) -> int:
    """Full pages before the sequence's own rows: no other can be shared."""
    return max(0, span.context - span.rows) // page_size


def _common(members: Sequence[Span], depth: int, page_size: int) -> int:
    """Leading pages that all members have in common, ``depth`` being known to be."""
    first, stop = members[0].pages, min(_past(span, page_size) for span in members)
    for span in members[1:]:
        if stop <= depth:  # as where nothing is shared, which the first two tell
            break
        differ = np.flatnonzero(first[depth:stop] != span.pages[depth:stop])
        if len(differ):
            stop = depth + int(differ[0])
    return max(stop, depth)


def _branches(members: Sequence[Span], depth: int, page_size: int) -> Iterator[tuple[list[Span], bool]]:
    """Members by their page at ``depth``; those whose past ends there come first, as one, marked False."""
    ended: list[Span] = []
    by_page: dict[int, list[Span]] = {}
    for span in members:
        if _past(span, page_size) > depth:
            by_page.setdefault(int(span.pages[depth]), []).append(span)
        else:
            ended.append(span)
    yield ended, False
    yield from ((branch, True) for branch in by_page.values())
