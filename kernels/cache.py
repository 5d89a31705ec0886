"""Writing keys and values where attention finds them: norms of queries and keys, rotation and store in one pass.

The projection of a token is one row of heads, queries first, then keys, then values. A pass over it in pieces would
read and write it three times; here each head is read once and what attention needs is written once.

For attention over selected pages, the smallest and largest value of each key channel is kept for every page: their
products with a query bound every score in the page (Quest, Tang et al. 2024, arXiv:2406.10774).
"""

# pyright: basic
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agentkit.kernels.jit import jit, tl, triton
from agentkit.kernels.norm import rms_norm, rms_norm_reference
from agentkit.kernels.rope import rotate_, rotate_reference

#: Largest number of e4m3, which has no infinity: a larger one becomes this or NaN, depending on the device.
FP8_LIMIT = 448.0


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the norms that Qwen3 has on queries and keys.

    Attributes:
        query: ``[d]``.
        key: ``[d]``.
        eps: added to the mean square.
    """

    query: Tensor
    key: Tensor
    eps: float


def rotate_and_write_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor]:
    """Definition: what attention gets from a token's projection, before it is rounded to the pool's dtype.

    Args:
        qkv: ``[t, heads + 2 * kv_heads, d]``, queries, keys and values in this order.
        cos: ``[t, 1, d / 2]``.
        sin: ``[t, 1, d / 2]``.
        kv_heads: how many of the heads are keys, and how many values.
        norms: applied to each head of queries and keys before the rotation.

    Returns:
        ``(queries [t, heads, d], keys and values [t, 2, kv_heads, d])`` in the dtype of ``qkv``, new tensors.
    """
    query, key, value = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    if norms is not None:
        query = rms_norm_reference(query, norms.query, norms.eps)
        key = rms_norm_reference(key, norms.key, norms.eps)
    cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)
    return rotate_reference(query, cos, sin), torch.stack([rotate_reference(key, cos, sin), value], 1)


def rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    kv: Tensor,
    norms: HeadNorms | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    bounds: Tensor | None = None,
) -> Tensor:
    """`rotate_and_write_reference`, keys and values written to one layer of the pool.

    Args:
        qkv: ``[t, heads + 2 * kv_heads, d]``; do not use it afterwards, it may be overwritten.
        cos: on a GPU ``[t, 1, d / 2]`` fp32, as `agentkit.kernels.rope.angles` returns it; on the CPU ``[t, 1, d]``,
            as `agentkit.kernels.rope.whole` does. The tables are made once a step rather than in here: they serve all
            layers, and far positions need an exact range reduction.
        sin: like ``cos``.
        slots: ``[t]``, where each token's key and value go; a token whose slot is −1 writes nothing.
        kv: ``[slots, 2, kv_heads, d]``, a layer of the pool, of the dtype of ``qkv`` or float8_e4m3fn.
        norms: of queries and keys.
        scales: what keys and values in a pool of fp8 have to be multiplied with to be themselves again.
        bounds: ``[pages, 2, kv_heads, d]``, smallest and largest value of the keys in each page; a page has as many
            slots as there are slots for one of these. Brought up to date for the written tokens, whose slots within
            one page must be ascending and follow each other in the batch.

    Returns:
        ``[t, heads, d]``, the rotated queries.

    Raises:
        ValueError: shapes or dtypes that do not fit; it names the argument.
    """
    _check(qkv, slots, kv, scales, bounds)
    if qkv.device.type == "cuda":
        query = launch_rotate_and_write(qkv, cos, sin, slots, kv, norms, scales)
        if bounds is not None:
            launch_bounds(kv, slots, bounds, scales[0])
        return query
    kv_heads, d = kv.shape[2:]
    heads = qkv.shape[1] - 2 * kv_heads
    if norms is not None:
        q = rms_norm(qkv[:, :heads], norms.query, norms.eps)
        k = rms_norm(qkv[:, heads : heads + kv_heads], norms.key, norms.eps)
        qkv = torch.cat([q, k, qkv[:, heads + kv_heads :]], 1)
    rotate_(qkv[:, : heads + kv_heads], cos, sin)
    rows = qkv[:, heads:].view(-1, 2, kv_heads, d)
    try:
        _write(kv, slots, rows, scales)
    except IndexError:  # a slot of −1: to look for them first would take as long as the write
        live = slots >= 0
        _write(kv, slots[live], rows[live], scales)
    if bounds is not None:
        bounds_(kv, slots[slots >= 0], bounds, scales[0])
    return qkv[:, :heads]


def _check(qkv: Tensor, slots: Tensor, kv: Tensor, scales: tuple[float, float], bounds: Tensor | None) -> None:
    if kv.shape[1] != 2 or kv.shape[3] != qkv.shape[2] or qkv.shape[1] <= 2 * kv.shape[2]:
        raise ValueError(f"qkv: {tuple(qkv.shape)} does not fit a pool of {tuple(kv.shape)}")
    if slots.shape != qkv.shape[:1]:
        raise ValueError(f"slots: {tuple(slots.shape)}, expected one for each of {qkv.shape[0]} tokens")
    if kv.dtype not in (qkv.dtype, torch.float8_e4m3fn):
        raise ValueError(f"kv: {kv.dtype}, expected {qkv.dtype} or float8_e4m3fn")
    if kv.dtype is not torch.float8_e4m3fn and scales != (1.0, 1.0):
        raise ValueError(f"scales: {scales} for a pool of {kv.dtype}, which holds keys and values themselves")
    if bounds is not None and (bounds.shape[1:] != kv.shape[1:] or kv.shape[0] % max(1, bounds.shape[0])):
        raise ValueError(f"bounds: {tuple(bounds.shape)} does not fit a pool of {tuple(kv.shape)}")


def _write(kv: Tensor, slots: Tensor, rows: Tensor, scales: tuple[float, float]) -> None:
    """Write rows ``[t, 2, kv_heads, d]`` to the pool; torch copies fp8 by index only as bytes."""
    if kv.dtype is not torch.float8_e4m3fn:
        kv.index_copy_(0, slots, rows)
        return
    factor = 1 / torch.tensor(scales, dtype=torch.float32).view(1, 2, 1, 1)
    small = (rows.float() * factor).clamp(-FP8_LIMIT, FP8_LIMIT).to(kv.dtype)
    kv.view(torch.uint8).index_copy_(0, slots, small.view(torch.uint8))


def bounds_(kv: Tensor, slots: Tensor, bounds: Tensor, key_scale: float) -> None:
    """Bring pages' key bounds up to date for tokens that have been written; the definition of `launch_bounds`.

    A page begins anew with its first slot. A token that is written again (a rejected draft) may leave bounds that
    are wider than need be, never ones that are too narrow.

    Args:
        kv: ``[slots, 2, kv_heads, d]``, with the tokens.
        slots: ``[t]`` int64, none negative.
        bounds: ``[pages, 2, kv_heads, d]``, changed in place.
        key_scale: what the pool's keys are multiplied with.
    """
    page_size = kv.shape[0] // bounds.shape[0]
    pages = slots // page_size
    begun = pages[slots % page_size == 0]
    bounds[begun, 0], bounds[begun, 1] = torch.inf, -torch.inf
    keys = kv[:, 0].view(torch.uint8)[slots].view(kv.dtype) if kv.element_size() == 1 else kv[slots, 0]
    keys = (keys.float() * key_scale).to(bounds.dtype)
    index = pages[:, None, None].expand_as(keys)
    bounds[:, 0].scatter_reduce_(0, index, keys, "amin")
    bounds[:, 1].scatter_reduce_(0, index, keys, "amax")


def launch_rotate_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    kv: Tensor,
    norms: HeadNorms | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Launch the kernel of `rotate_and_write`.

    Raises:
        ValueError: shapes or dtypes that the kernel is not written for; it names the argument.
    """
    _check(qkv, slots, kv, scales, None)
    t, total, d = qkv.shape
    kv_heads = kv.shape[2]
    heads = total - 2 * kv_heads
    if d < 2 or d & (d - 1):
        raise ValueError(f"qkv: heads of {d} values, expected a power of two")
    if qkv.stride()[1:] != (d, 1) or kv.stride(3) != 1 or not slots.is_contiguous():
        strides = qkv.stride(), kv.stride(), slots.stride()
        raise ValueError(f"qkv, kv, slots: strides {strides}, expected each token's heads, and all slots, together")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (t, 1, d // 2) or table.dtype is not torch.float32 or not table.is_contiguous():
            raise ValueError(f"{name}: {table.dtype} {tuple(table.shape)}, expected fp32 {(t, 1, d // 2)}, contiguous")
    query = torch.empty(t, heads, d, dtype=qkv.dtype, device=qkv.device)
    if t == 0:
        return query
    block = heads_together(heads, kv_heads)
    _rotate_and_write[(t, total // block)](
        qkv,
        cos,
        sin,
        slots,
        norms.query if norms is not None else cos,
        norms.key if norms is not None else cos,
        query,
        kv,
        qkv.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        norms.eps if norms is not None else 0.0,
        1 / scales[0],
        1 / scales[1],
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=d,
        BLOCK=block,
        NORM=norms is not None,
        LIMIT=FP8_LIMIT if kv.dtype is torch.float8_e4m3fn else None,
        num_warps=warps(block, d),
    )
    return query


def heads_together(heads: int, kv_heads: int) -> int:
    """How many heads a program takes: a power of two, so that queries, keys and values are never mixed."""
    together = heads | kv_heads
    return min(8, together & -together)


def warps(heads: int, d: int) -> int:
    """So many that a thread moves 16 bytes of bf16 of each half of the heads at once."""
    return min(8, max(1, heads * d // 512))


def launch_bounds(kv: Tensor, slots: Tensor, bounds: Tensor, key_scale: float) -> None:
    """Launch the kernel of `bounds_`, after the one that writes the keys; slots of −1 are passed over."""
    if not slots.numel():
        return
    page = kv.shape[0] // bounds.shape[0]
    _bounds[(slots.numel(), kv.shape[2])](
        kv,
        slots,
        bounds,
        slots.numel(),
        kv.stride(0),
        kv.stride(2),
        bounds.stride(0),
        bounds.stride(1),
        bounds.stride(2),
        key_scale,
        PAGE=page,
        BLOCK=triton.next_power_of_2(page),
        D=kv.shape[3],
        num_warps=4,
    )


@jit
def _head_norm(a, b, weight, i, eps, D: tl.constexpr, DTYPE: tl.constexpr):
    """Norm of heads given as two halves ``[BLOCK, D / 2]``, rounded where `rms_norm_reference` rounds."""
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
    first = tl.load(weight + i).to(tl.float32)[None, :]
    second = tl.load(weight + D // 2 + i).to(tl.float32)[None, :]
    a = ((a * scale).to(DTYPE).to(tl.float32) * first).to(DTYPE).to(tl.float32)
    b = ((b * scale).to(DTYPE).to(tl.float32) * second).to(DTYPE).to(tl.float32)
    return a, b


@jit
def _store(to, a, b, factor, D: tl.constexpr, LIMIT: tl.constexpr):
    """Store both halves of heads, kept inside the range of fp8 where the pool is of fp8."""
    if LIMIT is not None:
        a = tl.minimum(tl.maximum(a * factor, -LIMIT), LIMIT)
        b = tl.minimum(tl.maximum(b * factor, -LIMIT), LIMIT)
    tl.store(to, a.to(to.dtype.element_ty))
    tl.store(to + D // 2, b.to(to.dtype.element_ty))


@jit
def _rotate_and_write(
    qkv, cos, sin, slots, query_norm, key_norm, query, kv,
    qkv_row, kv_slot, kv_pair, kv_head, eps, key_factor, value_factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """BLOCK heads of one token, all queries, all keys or all values."""
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    head = tl.arange(0, BLOCK)[:, None]
    i = tl.arange(0, HALF)
    source = qkv + token * qkv_row + (first + head) * D + i[None, :]
    a = tl.load(source).to(tl.float32)
    b = tl.load(source + HALF).to(tl.float32)
    slot = tl.load(slots + token).to(tl.int64)
    if first < HEADS + KV_HEADS:
        if NORM:
            weight = query_norm if first < HEADS else key_norm
            a, b = _head_norm(a, b, weight, i, eps, D, qkv.dtype.element_ty)
        c = tl.load(cos + token * HALF + i)[None, :]
        s = tl.load(sin + token * HALF + i)[None, :]
        a, b = a * c - b * s, b * c + a * s
        if first < HEADS:
            _store(query + (token * HEADS + first + head) * D + i[None, :], a, b, 1.0, D, None)
        elif slot >= 0:
            to = kv + slot * kv_slot + (first - HEADS + head) * kv_head + i[None, :]
            _store(to, a, b, key_factor, D, LIMIT)
    elif slot >= 0:
        to = kv + slot * kv_slot + kv_pair + (first - HEADS - KV_HEADS + head) * kv_head + i[None, :]
        _store(to, a, b, value_factor, D, LIMIT)


@jit
def _bounds(
    kv, slots, bounds, tokens, kv_slot, kv_head, bounds_page, bounds_pair, bounds_head, scale,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One KV head of one page, by the program of the page's first token in the batch; the others have no work."""
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    before = tl.load(slots + token - 1, mask=token > 0, other=-1).to(tl.int64)
    page = slot // PAGE
    if (slot >= 0) & ((before < 0) | (before // PAGE != page)):
        i = tl.arange(0, D)[None, :]
        row = token + tl.arange(0, BLOCK)
        at = tl.load(slots + row, mask=row < tokens, other=-1).to(tl.int64)
        mine = ((at >= 0) & (at // PAGE == page))[:, None]
        keys = kv + at[:, None] * kv_slot + tl.program_id(1) * kv_head + i
        key = tl.load(keys, mask=mine, other=0.0).to(tl.float32) * scale
        low = tl.min(tl.where(mine, key, float("inf")), 0)[None, :]
        high = tl.max(tl.where(mine, key, float("-inf")), 0)[None, :]
        to = bounds + page * bounds_page + tl.program_id(1) * bounds_head + i
        if slot % PAGE != 0:
            low = tl.minimum(low, tl.load(to).to(tl.float32))
            high = tl.maximum(high, tl.load(to + bounds_pair).to(tl.float32))
        tl.store(to, low.to(bounds.dtype.element_ty))
        tl.store(to + bounds_pair, high.to(bounds.dtype.element_ty))
