"""The attention of a decode step of one row on the CPU: rotation, store and softmax over the context, layer by layer.

One row is so little work that what surrounds the arithmetic decides: each call of an operator costs a microsecond or
several, thirty layers make it thirty times, and torch's attention in bf16 spends 30 µs on its two products for a dozen
tokens. So all that is the same in every layer, views and buffers, is made once a step, and the context is widened into
one buffer of fp32, which stays in a cache, and attended to there. `bench/decode.py --profile` prints what each costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agentkit.kernels.cache import FP8_LIMIT, HeadNorms
from agentkit.kernels.norm import rms_norm
from agentkit.kernels.rope import rotate_

#: Tokens of a context that are widened and attended to at once, few enough to stay in a cache between the two.
_STRETCH = 1024
#: A stretch is divided among threads where they would have different numbers of KV heads, if parts have so many tokens.
_PART = 128


class Decode:
    """A step of one row, ready for every layer.

    Args:
        kv: ``[layers, slots, 2, kv_heads, d]``, the pool, of the dtype of ``qkv`` or float8_e4m3fn.
        runs: ``(first slot, length)`` pieces of the row's context in order. In the last slot its own token is written.
        cos: ``[1, 1, d]`` as `agentkit.kernels.rope.whole` returns it.
        sin: like ``cos``.
        scale: factor on the products.
    """

    def __init__(self, kv: Tensor, runs: Sequence[tuple[int, int]], cos: Tensor, sin: Tensor, scale: float) -> None:
        self._cos, self._sin, self._scale = cos, sin, scale
        self._kv_heads, self._d = kv.shape[3:]
        self._small = kv.dtype is torch.float8_e4m3fn
        self._rows = kv[:, sum(runs[-1]) - 1].unbind(0)
        self._stretches = [_Stretch(kv, pieces) for pieces in _stretches(runs)]

    def __call__(self, layer: int, qkv: Tensor, norms: HeadNorms | None) -> Tensor:
        """`rotate_and_write` and `paged_attention` of a layer.

        Args:
            layer: its number.
            qkv: ``[1, heads + 2 * kv_heads, d]``; do not use it afterwards, it may be overwritten.
            norms: of queries and keys.

        Returns:
            ``[1, heads * d]`` fp32.
        """
        kv_heads, d = self._kv_heads, self._d
        heads = qkv.shape[1] - 2 * kv_heads
        turned = qkv[:, :-kv_heads]
        if norms is not None:
            turned[:, :heads] = rms_norm(turned[:, :heads], norms.query, norms.eps)
            turned[:, heads:] = rms_norm(turned[:, heads:], norms.key, norms.eps)
        rotate_(turned, self._cos, self._sin)
        row = qkv[0, heads:].view(2, kv_heads, d)
        self._rows[layer].copy_(row.clamp(-FP8_LIMIT, FP8_LIMIT) if self._small else row)
        q = qkv[:, :heads].view(1, kv_heads, -1, d).float()
        parts = [stretch.attend(layer, q, self._scale) for stretch in self._stretches]
        return _merged(parts).view(1, -1)


class _Stretch:
    """A piece of the context, in equal parts that torch's attention takes as a batch."""

    def __init__(self, kv: Tensor, runs: Sequence[tuple[int, int]]) -> None:
        kv_heads, d = kv.shape[3:]
        length = sum(n for _, n in runs)
        count = _parts(length, kv_heads)
        size = -(-length // count)
        self._wide = torch.empty(count * size, 2, kv_heads, d)
        self._wide[length:] = 0  # whatever lies there is multiplied by zero
        self._sources = [kv[:, first : first + n].unbind(0) for first, n in runs]
        self._targets = self._wide[:length].split([n for _, n in runs])
        self._keys, self._values = self._wide.view(count, size, 2, kv_heads, d).permute(2, 0, 3, 1, 4)
        self._mask: Tensor | None = None
        if count * size > length:
            self._mask = torch.zeros(count, 1, 1, size)
            self._mask.view(-1)[length:] = -math.inf

    def attend(self, layer: int, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Results ``[parts, kv_heads, group, d]`` for a query ``[1, kv_heads, group, d]``, and their log-sum-exp."""
        for target, source in zip(self._targets, self._sources, strict=True):
            target.copy_(source[layer])
        q = q.expand(len(self._keys), -1, -1, -1)
        flash = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return flash(q, self._keys, self._values, 0.0, False, attn_mask=self._mask, scale=scale)


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
    """``[kv_heads, group, d]`` of all parts together; the weights are those of `agentkit.kernels.flash.merge`."""
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    if len(out) == 1:
        return out
    return out.mul_(torch.softmax(lse, 0).unsqueeze(-1)).sum(0)
