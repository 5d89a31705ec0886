"""The attention of a decode step of one row on the CPU: rotation, store and softmax over the context, layer by layer.

One row is so little work that what surrounds the arithmetic decides: each call of an operator costs a microsecond or
several, a view no less than a sum, and every layer makes it again. So all that layers share, views and buffers, is made
once a step. The arithmetic is in fp32: torch's attention in bf16 takes 30 µs for its products over a dozen tokens, in
fp32 a third of that, and over a long context it is faster to widen keys and values into a buffer that stays in a cache.
`bench/decode.py --profile` prints what each costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from agentkit.kernels.cache import FP8_LIMIT, HeadNorms
from agentkit.kernels.flash import selected
from agentkit.kernels.norm import rms_norm

#: Tokens of a context that are widened and attended to at once, few enough to stay in a cache between the two.
_STRETCH = 2048
#: A stretch is divided among threads where they would have different numbers of KV heads, if parts have so many tokens.
_PART = 128
#: Runs are gathered together if they have fewer tokens than this on average: each costs a call.
_SCATTERED = 64


class Decode:
    """A step of one row, ready for every layer.

    Args:
        kv: ``[layers, slots, 2, kv_heads, d]``, the pool, of any dtype.
        runs: ``(first slot, length)`` pieces of the row's context in order. In the last slot its own token is written.
        cos: ``[1, 1, d]`` fp32 as `agentkit.kernels.rope.whole` returns it.
        sin: like ``cos``.
        heads: of queries.
        dtype: of what `__call__` returns.
    """

    def __init__(
        self, kv: Tensor, runs: Sequence[tuple[int, int]], cos: Tensor, sin: Tensor, heads: int, dtype: torch.dtype
    ) -> None:
        kv_heads, d = kv.shape[3:]
        total, turned, half = heads + 2 * kv_heads, heads + kv_heads, d // 2
        self._small = kv.dtype is torch.float8_e4m3fn
        self._rows = kv[:, sum(runs[-1]) - 1].flatten(1, 2).unbind(0)
        # Zeroed, because whatever lies behind the context is multiplied by zero.
        wide = torch.zeros(min(_STRETCH, sum(n for _, n in runs)) + torch.get_num_threads(), 2, kv_heads, d)
        self._stretches = [_Stretch(kv, pieces, wide) for pieces in _stretches(runs)]
        self._given = torch.empty(total, d)
        self._flat = self._given.view(1, -1)
        self._queries, self._keys = self._given[:heads], self._given[heads:turned]
        self._first, self._second = self._given[:turned, :half], self._given[:turned, half:]
        self._cos = cos[0].repeat(total, 1)
        self._cos[turned:] = 1  # values do not turn
        self._sin_first, self._sin_second = sin[0, :, :half], sin[0, :, half:]
        self._turned = torch.empty(total, d)
        self._turned_first, self._turned_second = self._turned[:turned, :half], self._turned[:turned, half:]
        self._written = self._turned[heads:]
        self._query = self._turned[:heads].view(1, kv_heads, -1, d)
        self._result = torch.empty(1, heads * d, dtype=dtype)
        self._grouped = self._result.view(1, kv_heads, -1, d)

    def __call__(self, layer: int, qkv: Tensor, norms: HeadNorms | None) -> Tensor:
        """`agentkit.kernels.cache.rotate_and_write_reference` and attention of a layer, computed in fp32.

        Args:
            layer: its number.
            qkv: ``[1, (heads + 2 * kv_heads) * d]`` of any float dtype: queries, keys, values.
            norms: of queries and keys.

        Returns:
            ``[1, heads * d]``, the same memory in each layer.
        """
        self._flat.copy_(qkv)
        if norms is not None:
            self._queries.copy_(rms_norm(self._queries, norms.query, norms.eps))
            self._keys.copy_(rms_norm(self._keys, norms.key, norms.eps))
        torch.mul(self._given, self._cos, out=self._turned)
        self._turned_first.addcmul_(self._second, self._sin_first)
        self._turned_second.addcmul_(self._first, self._sin_second)
        written = self._written.clamp(-FP8_LIMIT, FP8_LIMIT) if self._small else self._written
        self._rows[layer].copy_(written)
        parts = [stretch.attend(layer, self._query) for stretch in self._stretches]
        self._grouped.copy_(_merged(parts))
        return self._result


class _Stretch:
    """A piece of the context, in equal parts that torch's attention takes as a batch. Pieces share memory."""

    def __init__(self, kv: Tensor, runs: Sequence[tuple[int, int]], wide: Tensor) -> None:
        kv_heads, d = kv.shape[3:]
        length = sum(n for _, n in runs)
        count = _parts(length, kv_heads)
        size = -(-length // count)
        self._count, self._scale = count, d**-0.5
        self._wide = wide[:length]
        self._layers = kv.unbind(0)
        self._slots: Tensor | None = None
        if len(runs) > 1 and length < _SCATTERED * len(runs):
            self._slots = torch.cat([torch.arange(first, first + n) for first, n in runs])
        else:
            sources = [kv[:, first : first + n].unbind(0) for first, n in runs]
            ends = accumulate(n for _, n in runs)
            targets = [self._wide[end - n : end] for (_, n), end in zip(runs, ends, strict=True)]
            self._copies = [list(zip(targets, layer, strict=True)) for layer in zip(*sources, strict=True)]
        self._keys, self._values = wide[: count * size].view(count, size, 2, kv_heads, d).permute(2, 0, 3, 1, 4)
        self._mask: Tensor | None = None
        if count * size > length:
            self._mask = torch.zeros(count, 1, 1, size)
            self._mask.view(-1)[length:] = -math.inf

    def attend(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Results ``[parts, kv_heads, group, d]`` for a query ``[1, kv_heads, group, d]``, and their log-sum-exp."""
        if self._slots is not None:
            self._wide.copy_(selected(self._layers[layer], self._slots, self._wide.dtype))
        else:
            for target, source in self._copies[layer]:
                target.copy_(source)
        if self._count > 1:
            query = query.expand(self._count, -1, -1, -1)
        flash = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return flash(query, self._keys, self._values, 0.0, False, attn_mask=self._mask, scale=self._scale)


def _stretches(runs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Runs cut into stretches."""
    stretches: list[list[tuple[int, int]]] = []
    room = 0
    for first, length in runs:
        while length:
            if not room:
                stretches.append([])
                room = _STRETCH
            n = min(length, room)
            stretches[-1].append((first, n))
            first, length, room = first + n, length - n, room - n
    return stretches


def _parts(length: int, kv_heads: int) -> int:
    """In how many parts a stretch gives all threads the same work; one where that is not worth their merging."""
    threads = torch.get_num_threads()
    return max(1, min(threads // math.gcd(threads, kv_heads), length // _PART))


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``[1, kv_heads, group, d]`` of all parts together; the weights are those of `agentkit.kernels.flash.merge`."""
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    if len(out) == 1:
        return out
    return out.mul_(torch.softmax(lse, 0).unsqueeze(-1)).sum(0, keepdim=True)
