"""Paged attention on the CPU by torch's tiled attention, over the pages where they lie.

A step is laid out once and then used by every layer. Long contexts are read in place, run by run. A call costs more
than the arithmetic on a few tokens, so decode rows over contexts that are short, or in short runs as they are in a pool
that has long been full, are gathered and answered by one call together.

A pool in float8_e4m3fn is widened where it is read, since torch's attention takes one dtype: each step copies the
contexts it attends to, in the query's dtype. That halves or quarters the memory of a context here, not its time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

#: Up to this many tokens of context a row is gathered (copying them costs less than the call).
_SHORT = 256
#: From this many such rows on.
_MANY = 4
#: From this many tokens on a run is fetched before it is attended to: see `_fetch`.
_FETCHED = 64
#: Tokens of a run that are fetched and attended to at once, few enough to stay in a cache between the two.
_STRETCH = 4096
#: Any other context is gathered if its runs have fewer tokens than this on average: each costs a call and a merge.
_SCATTERED = 128

Part = tuple[Tensor, Tensor]
Runs = Sequence[tuple[int, int]]


class Item(Protocol):
    """Query rows of one sequence and where its context lies: `agentkit.kernels.attention.Work`."""

    @property
    def start(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def runs(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def context(self) -> int: ...


class Layout:
    """A step's attention, ready for every layer.

    Args:
        work: items whose rows follow each other and cover the batch.
        dtype: of queries.
    """

    def __init__(self, work: Sequence[Item], dtype: torch.dtype) -> None:
        single = [item for item in work if item.rows == 1]
        short = [item for item in single if item.context <= _SHORT]
        if len(short) < _MANY:
            short = []
        scattered = [item for item in single if _scattered(item.runs) and not (short and item.context <= _SHORT)]
        self._gathers = [_Gather(group, dtype) for group in (short, scattered) if group]
        starts = {item.start for item in (*short, *scattered)}
        self._others = [item for item in work if item.rows > 1 or item.start not in starts]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """`agentkit.kernels.attention.paged_attention_reference` for the step.

        Args:
            query: ``[t, heads, d]``.
            keys: ``[slots, kv_heads, d]``, of the query's dtype or float8_e4m3fn.
            values: like ``keys``.
            scale: factor on the products.

        Returns:
            ``[t, heads, d]``.
        """
        if not self._gathers and len(self._others) == 1:
            return _attend(query, keys, values, self._others[0], scale)
        if not self._others and len(self._gathers) == 1:
            return self._gathers[0].attend(query, keys, values, scale)  # it has all rows, in order
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for item in self._others:
            rows = query.narrow(0, item.start, item.rows)
            out.narrow(0, item.start, item.rows).copy_(_attend(rows, keys, values, item, scale))
        for gather in self._gathers:
            out[gather.rows] = gather.attend(query[gather.rows], keys, values, scale)
        return out


def selected(pool: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of some tokens of a pool, ``[n, kv_heads, d]``, widened where the pool is in fp8."""
    words = torch.uint8 if pool.dtype is torch.float8_e4m3fn else pool.dtype  # torch does not select from fp8
    return pool.view(words).index_select(0, slots).view(pool.dtype).to(dtype)


def _scattered(runs: Runs) -> bool:
    return len(runs) > 1 and sum(length for _, length in runs) < _SCATTERED * len(runs)


def _joined(pool: Tensor, runs: Runs, dtype: torch.dtype) -> Tensor:
    """The tokens of some runs, ``[n, kv_heads, d]``; a single run where it lies, if it need not be widened."""
    pieces = [pool[first : first + length].to(dtype) for first, length in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _Gather:
    """Decode rows whose contexts are copied side by side."""

    def __init__(self, items: Sequence[Item], dtype: torch.dtype) -> None:
        self.rows = torch.tensor([item.start for item in items])
        self._slots, self._mask = _padded(items, dtype)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """``[n, heads, d]`` of these rows."""
        n, (kv_heads, d) = len(query), keys.shape[1:]

        def gather(pool: Tensor) -> Tensor:
            return selected(pool, self._slots, query.dtype).view(n, -1, kv_heads, d).transpose(1, 2)

        q = query.view(n, kv_heads, -1, d)
        mask = self._mask.expand(-1, -1, q.shape[2], -1)
        return _flash(q, gather(keys), gather(values), scale, mask=mask)[0].reshape(query.shape)


def _padded(items: Sequence[Item], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slots ``[n * longest]`` of contexts padded with their own first slot, and what is added to scores."""
    longest = max(item.context for item in items)
    slots = torch.empty(len(items), longest, dtype=torch.int64)
    mask = torch.zeros(len(items), 1, 1, longest, dtype=dtype)
    for row, item in enumerate(items):
        at = 0
        for first, length in item.runs:
            torch.arange(first, first + length, out=slots[row, at : at + length])
            at += length
        slots[row, at:] = item.runs[0][0]
        mask[row, ..., at:] = -math.inf
    return slots.flatten(), mask


def _attend(query: Tensor, keys: Tensor, values: Tensor, item: Item, scale: float) -> Tensor:
    """``[rows, heads, d]`` of one item."""
    return joined(parts(query, keys, values, item.runs, item.rows, scale), query.shape)


def parts(query: Tensor, keys: Tensor, values: Tensor, runs: Runs, own: int, scale: float) -> list[Part]:
    """Attention of some rows over pieces of a context, to be `joined`, with other pieces perhaps.

    Args:
        query: ``[rows, heads, d]``.
        keys: ``[slots, kv_heads, d]``, of the query's dtype or float8_e4m3fn.
        values: like ``keys``.
        runs: ``(first slot, length)`` of the pieces in order, not empty.
        own: ``rows`` where the runs end with the rows' own tokens, of which each sees none behind itself; 0 where all
            rows see all of the runs.
        scale: factor on the products.
    """
    if len(query) > 1:
        return _prefill(query, keys, values, runs, own, scale)
    q = query.view(1, keys.shape[1], -1, query.shape[2])
    kind = query.dtype
    found: list[Part] = []
    for run in _stretches(runs):
        if run[1] >= _FETCHED and keys.dtype is kind:  # widening reads it in order as well
            _fetch(keys, run)
        found.append(_flash(q, _run(keys, run).to(kind), _run(values, run).to(kind), scale))
    return found


def joined(found: Sequence[Part], shape: torch.Size) -> Tensor:
    """What rows make of all pieces of their context: `parts`, merged, in the shape ``[rows, heads, d]``."""
    out = merge(found)
    return out.view(shape) if shape[0] == 1 else out.permute(2, 0, 1, 3).reshape(shape)


def _stretches(runs: Runs) -> list[tuple[int, int]]:
    """The runs, none longer than a stretch."""
    return [
        (at, min(_STRETCH, first + length - at))
        for first, length in runs
        for at in range(first, first + length, _STRETCH)
    ]


def _fetch(pool: Tensor, run: tuple[int, int]) -> None:
    """Bring a run of slots, keys and values alike where they lie side by side, into the caches.

    The tiled kernel takes one head after another, a piece out of each slot, and waits for memory at nearly every one.
    Memory read once in its own order is there when the kernel comes: from 64 tokens on both take half the time.
    """
    first, length = run
    slot, _, _ = pool.stride()
    pool.as_strided(((length - 1) * slot + 1,), (1,), pool.storage_offset() + first * slot).sum()


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None) -> Part:
    """Torch's tiled attention, ``[b, h, rows, d]`` against ``[b, h, n, d]``, and its log-sum-exp."""
    # Not by way of `torch.ops`, which takes some microseconds longer to call.
    flash = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def _run(pool: Tensor, run: tuple[int, int]) -> Tensor:
    """``[1, kv_heads, n, d]``, a run of slots where they lie. One call: a decode step makes 60 of these per token."""
    first, length = run
    slot, head, _ = pool.stride()
    return pool.as_strided(
        (1, pool.shape[1], length, pool.shape[2]), (0, head, slot, 1), pool.storage_offset() + first * slot
    )


def _prefill(query: Tensor, keys: Tensor, values: Tensor, runs: Runs, own: int, scale: float) -> list[Part]:
    """A block of rows: everything before it unmasked, its own tokens causal."""
    kv_heads, d = keys.shape[1:]
    past, last = split(runs, sum(length for _, length in runs) - own)
    grouped = query.view(len(query), kv_heads, -1, d).permute(1, 2, 0, 3)  # [kv_heads, group, rows, d]

    def heads(pool: Tensor, runs: Runs) -> Tensor:
        x = _joined(pool, runs, query.dtype)
        # One kv head serves its group through a stride of zero.
        return x.transpose(0, 1).unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)

    stretches = [past] if past and _scattered(runs) else [[run] for run in past]
    found = [_flash(grouped, heads(keys, x), heads(values, x), scale) for x in stretches]
    if last:  # a chunk may straddle runs: its own tokens are put together, being few
        found.append(_flash(grouped, heads(keys, last), heads(values, last), scale, causal=True))
    return found


def split(runs: Runs, at: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Cut a list of runs after ``at`` tokens."""
    before: list[tuple[int, int]] = []
    after: list[tuple[int, int]] = []
    for first, length in runs:
        head = min(length, max(at, 0))
        if head:
            before.append((first, head))
        if length > head:
            after.append((first + head, length - head))
        at -= head
    return before, after


def merge(parts: Sequence[Part]) -> Tensor:
    """Combine attention over disjoint pieces of a context by their log-sum-exp.

    Source: the online softmax of Milakov and Gimelshein 2018, arXiv:1805.02867.

    Args:
        parts: ``(output [..., rows, d], log-sum-exp [..., rows])`` of each piece.

    Returns:
        ``[..., rows, d]``, what one pass over all pieces would give.
    """
    if len(parts) == 1:
        return parts[0][0]
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    out = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for part, lse in parts:
        out += part * (lse - total).exp().unsqueeze(-1)
    return out.to(parts[0][0].dtype)
