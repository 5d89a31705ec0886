"""The Triton form of paged attention: one kernel for every use, and one that merges parts.

A program takes a work item (a block of query rows and a stretch of one page list) for one KV head. The rows' heads
that share this KV head are packed into the tile, so a decode row of Qwen3-4B fills four of its sixteen rows and four
branches of a prefix fill it whole. The online softmax is that of Milakov and Gimelshein 2018 (arXiv:1805.02867), the
tiling that of FlashAttention-2 (Dao 2023, arXiv:2307.08691), the merge of splits by log-sum-exp that of
Flash-Decoding (Dao et al. 2023, https://pytorch.org/blog/flash-decoding).
"""

# pyright: basic
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agentkit.kernels.groups import FAR
from agentkit.kernels.jit import jit, tl

if TYPE_CHECKING:
    from agentkit.kernels.plan import Plan

#: Head sizes that tiles are built for: powers of two, as Triton's ranges are.
HEAD_DIMS = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Config:
    """How a tile is compiled: keys in it, warps of a program, tiles of keys and values on their way at once."""

    keys: int
    warps: int
    stages: int


def configure(arch: str, query: torch.dtype, head_dim: int, page_size: int, tile: int, sparse: bool) -> Config:
    """The configuration of a tile shape on an architecture.

    Chosen by what the compiler makes of it (tests/kernels/budget.json): no spills, two tiles of keys and values in
    shared memory at once, warp-group products where there are 64 rows and more. What the pool's dtype is makes no
    difference: keys and values are widened to the query's.

    Args:
        arch: ``sm_80`` … ``sm_120`` or an AMD ``gfx`` name.
        query: dtype of queries and results.
        head_dim: size of a head.
        page_size: tokens in a page.
        tile: rows of the tile.
        sparse: whether positions are read from the page lists.
    """
    keys = min(64, (1 << 14) // (head_dim * query.itemsize))  # 16 KiB of keys, as much of values
    if arch.startswith("gfx"):
        narrow = tile > 16 or sparse or head_dim == 256
        return Config(max(16, keys // 2) if narrow else keys, 8 if tile >= 64 else 4, 2)
    small = arch in ("sm_86", "sm_87", "sm_89", "sm_120", "sm_121")  # 99 KiB of shared memory instead of 163 and more
    if small or (tile >= 64 and arch == "sm_80"):
        keys //= 2
    if sparse and tile < 64:
        keys = min(keys, 32)  # the masks of a wider tile spill
    keys = max(16, min(keys, 2 * page_size))  # a page id for each token of a wider tile spills
    return Config(keys, 8 if tile == 128 or (tile == 64 and head_dim == 256) else 4, 3)


@jit
def attend_tile(
    query, acc, top, total, keys, values, page, start, n, hi, position, slot, scale, window, sinks, every,
    WHOLE: tl.constexpr, SPARSE: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over tokens ``n : n + N`` of a list, which are before ``hi`` where ``WHOLE``."""
    token = tl.arange(0, N)
    d = tl.arange(0, D)
    if PAGE >= N:  # a 64-bit base and 32-bit offsets from it: 64 bits for every lane cost registers, and spill
        base = page.to(tl.int64) * (PAGE * slot) + n % PAGE * slot
        keys += base
        values += base
        at = token * slot
        within = n % PAGE + token
    else:
        within = (n + token) % PAGE
        at = page.to(tl.int64) * (PAGE * slot) + within * slot
    if WHOLE:
        k = tl.load(keys + (at[None, :] + d[:, None]))
        v = tl.load(values + (at[:, None] + d[None, :]))
    else:  # slots behind the context hold anything, and 0 × NaN is NaN
        live = n + token < hi
        k = tl.load(keys + (at[None, :] + d[:, None]), mask=live[None, :], other=0.0)
        v = tl.load(values + (at[:, None] + d[None, :]), mask=live[:, None], other=0.0)
    k, v = k.to(query.dtype), v.to(query.dtype)
    scores = tl.dot(query, k, input_precision=PRECISION)
    if WHOLE and not SPARSE:
        ahead = tl.maximum(top, tl.max(scores, 1) * scale)
        level = ahead
    else:
        where = start + within if SPARSE else start + n + token
        seen = where[None, :] <= position[:, None]
        if SPARSE:
            always = (where < sinks) | ((where // PAGE + 1) % every == 0)
            seen &= always[None, :] | (where[None, :] > position[:, None] - window)
        if not WHOLE:
            seen &= live[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        ahead = tl.maximum(top, tl.max(scores, 1) * scale)
        level = tl.where(ahead == float("-inf"), 0.0, ahead)  # a row that has seen nothing yet
    weights = tl.exp2(scores * scale - level[:, None])
    fade = tl.exp2(top - level)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(query.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, ahead, total


@jit
def attend_kernel(
    query, keys, values, out, partial, lse, items, rows, positions, targets, entries,
    query_row, query_head, slot, head_stride, entry_head, scale, value_scale, window, sinks, every,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, SPARSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One work item for one KV head; `agentkit.kernels.plan.ITEM` says what an item is.

    Args:
        query: ``[t, heads, d]`` with strides ``query_row``, ``query_head``.
        keys: ``[slots, kv_heads, d]`` with strides ``slot``, ``head_stride``; ``values`` alike.
        out: ``[t, heads, d]`` contiguous, written by items that are their rows' only part.
        partial: ``[parts, heads, d]`` fp32 and ``lse`` ``[parts, heads]`` fp32 in base 2, written by the others.
        rows: query row of each row entry, that of ``out`` as well where an item is its rows' only part;
            ``positions`` and ``targets`` alike: its position, its first part.
        entries: page ids, or where ``SPARSE`` pairs of a page id and the position of the page's first token;
            ``entry_head`` words further for each KV head.
        scale: factor on the products, times log2(e) and the scale of keys.
    """
    WORDS: tl.constexpr = 2 if SPARSE else 1  # pyright: ignore[reportAssignmentType]
    HEADS: tl.constexpr = KV_HEADS * GROUP
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS  # heads of a token lie side by side in memory: programs side by side read them
    items += pid // KV_HEADS * 8
    count = tl.load(items + 1)
    if count == 0:
        return
    first = tl.load(items)
    start = tl.load(items + 3)
    length = tl.load(items + 4)
    split = tl.load(items + 5)
    splits = tl.load(items + 6)
    whole = ((length + N - 1) // N + splits - 1) // splits * N
    lo = tl.minimum(split * whole, length)
    hi = tl.minimum(lo + whole, length)
    last = tl.maximum(hi - 1, 0)
    entries += kv_head * entry_head + tl.load(items + 2) * WORDS

    m = tl.arange(0, M)
    d = tl.arange(0, D)
    live = m // GROUP < count
    row = tl.load(rows + first + m // GROUP, mask=live, other=0)
    position = tl.load(positions + first + m // GROUP, mask=live, other=0x3FFFFFFF)
    head = kv_head * GROUP + m % GROUP
    q = query + (row.to(tl.int64) * query_row + head * query_head)[:, None] + d[None, :]
    q = tl.load(q, mask=live[:, None], other=0.0)

    keys += kv_head * head_stride
    values += kv_head * head_stride
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.full([M], 0.0, tl.float32)
    acc = tl.full([M, D], 0.0, tl.float32)
    clear = hi if SPARSE else tl.minimum(hi, tl.min(position, 0) + 1 - start)  # what all rows see
    bare = lo + tl.maximum(clear - lo, 0) // N * N
    # The page of a tile is loaded one tile ahead: loaded in its own, it would hold back the loads that depend on it,
    # and with them the pipeline.
    lane = 0 if PAGE >= N else tl.arange(0, N)  # one page for a tile, or one for each of its tokens
    at = entries + tl.minimum(lo + lane, last) // PAGE * WORDS
    page = tl.load(at)
    begin = tl.load(at + 1) if SPARSE else start
    for n in tl.range(lo, bare, N):
        this, these = page, begin
        at = entries + tl.minimum(n + N + lane, last) // PAGE * WORDS
        page = tl.load(at)
        begin = tl.load(at + 1) if SPARSE else start
        acc, top, total = attend_tile(
            q, acc, top, total, keys, values, this, these, n, hi, position, slot, scale, window, sinks, every,
            True, SPARSE, PAGE, N, D, PRECISION,
        )  # fmt: skip
    for n in tl.range(bare, hi, N, num_stages=1):
        at = entries + tl.minimum(n + lane, last) // PAGE * WORDS
        page = tl.load(at)
        begin = tl.load(at + 1) if SPARSE else start
        acc, top, total = attend_tile(
            q, acc, top, total, keys, values, page, begin, n, hi, position, slot, scale, window, sinks, every,
            False, SPARSE, PAGE, N, D, PRECISION,
        )  # fmt: skip

    some = total > 0
    acc *= tl.where(some, value_scale / tl.where(some, total, 1.0), 0.0)[:, None]
    if tl.load(items + 7) == 1:
        o = out + (row.to(tl.int64) * HEADS + head)[:, None] * D + d[None, :]
        tl.store(o, acc.to(out.dtype.element_ty), mask=live[:, None])
    else:
        target = tl.load(targets + first + m // GROUP, mask=live, other=0)
        part = (target + split).to(tl.int64) * HEADS + head
        tl.store(partial + part[:, None] * D + d[None, :], acc, mask=live[:, None])
        tl.store(lse + part, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=live)


@jit
def merge_kernel(partial, lse, out, merges, HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Results of one row and head from its parts, ``P`` at a time; a row whose parts saw nothing becomes zero."""
    pid = tl.program_id(0)
    head = pid % HEADS
    merges += pid // HEADS * 4
    count = tl.load(merges + 2)
    if count == 0:
        return
    row = tl.load(merges).to(tl.int64)
    first = tl.load(merges + 1)
    d = tl.arange(0, D)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.full([1], 0.0, tl.float32)
    acc = tl.full([D], 0.0, tl.float32)
    for n in tl.range(0, count, P):
        part = n + tl.arange(0, P)
        at = (first + part).to(tl.int64) * HEADS + head
        score = tl.load(lse + at, mask=part < count, other=float("-inf"))
        ahead = tl.maximum(top, tl.max(score, 0))
        level = tl.where(ahead == float("-inf"), 0.0, ahead)
        weight = tl.exp2(score - level)
        fade = tl.exp2(top - level)
        part = tl.load(partial + at[:, None] * D + d[None, :], mask=weight[:, None] > 0, other=0.0)
        acc = acc * fade + tl.sum(part * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        top = ahead
    acc = tl.where(total > 0, acc / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(out + (row * HEADS + head) * D + d, acc.to(out.dtype.element_ty))


def check(query: Tensor, keys: Tensor, values: Tensor, plan: Plan, scale: float, key_scale: float) -> None:
    """Refuse what the kernels do not support, before a launch.

    Raises:
        ValueError: naming the argument.
    """
    shape = plan.shape
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"query: {query.dtype}, there are kernels for float32, float16 and bfloat16")
    fp8 = keys.dtype is torch.float8_e4m3fn and query.dtype is not torch.float32
    if keys.dtype is not query.dtype and not fp8:
        raise ValueError(f"keys: {keys.dtype} under a query of {query.dtype}")
    if fp8 and plan.arch in ("sm_80", "sm_86", "sm_87"):
        raise ValueError(f"keys: float8_e4m3fn needs compute capability 8.9, this is {plan.arch}")
    if values.dtype is not keys.dtype:
        raise ValueError(f"values: {values.dtype}, keys are {keys.dtype}")
    if query.shape[2] not in HEAD_DIMS:
        raise ValueError(f"query: heads of {query.shape[2]}, there are kernels for {HEAD_DIMS}")
    if query.shape[1:] != (shape.heads, shape.head_dim) or keys.shape[1] != shape.kv_heads:
        raise ValueError(f"query, keys: {tuple(query.shape)}, {tuple(keys.shape)} are not the plan's {shape}")
    if query.shape[0] != plan.tokens * plan.turns:
        raise ValueError(f"query: {query.shape[0]} rows, the plan was updated for {plan.tokens * plan.turns}")
    if keys.shape[0] != shape.pages * shape.page_size:
        raise ValueError(f"keys: {keys.shape[0]} slots are not {shape.pages} pages of {shape.page_size}")
    if any(x.device != plan.device for x in (query, keys, values)):
        raise ValueError(f"query, keys, values: {query.device}, {keys.device}, {values.device}; plan: {plan.device}")
    if any(x.stride(2) != 1 for x in (query, keys, values)):
        raise ValueError("query, keys, values: the numbers of a head must lie side by side")
    if keys.stride() != values.stride():
        raise ValueError(f"values: strides {values.stride()}, keys have {keys.stride()}")
    if max(shape.page_size, 64) * keys.stride(0) >= 1 << 31:
        raise ValueError(f"keys: a page of stride {keys.stride(0)} spans 2**31 numbers and more")
    if not (scale > 0 and key_scale > 0):
        raise ValueError(f"scale, key_scale: {scale}, {key_scale} must be positive")


def attend(
    query: Tensor, keys: Tensor, values: Tensor, plan: Plan, scale: float, key_scale: float, value_scale: float
) -> Tensor:
    """Launch a plan whose arguments `check` has seen. `agentkit.kernels.attention.paged_attention` documents them."""
    shape = plan.shape
    out = torch.empty(plan.tokens, *query.shape[1:], dtype=query.dtype, device=query.device)
    for launch in plan.launches:
        if not launch.count:
            continue
        config = configure(plan.arch, query.dtype, shape.head_dim, shape.page_size, launch.tile, plan.sparse)
        attend_kernel[(launch.count * shape.kv_heads,)](
            query, keys, values, out, plan.partial, plan.lse, plan.items[launch.first * 8 :], plan.rows,
            plan.positions, plan.targets, plan.entries, query.stride(0), query.stride(1), keys.stride(0),
            keys.stride(1), plan.entry_head, scale * key_scale * math.log2(math.e), value_scale,
            plan.window.window, plan.window.sinks, plan.window.every or FAR,
            KV_HEADS=shape.kv_heads, GROUP=shape.group, M=launch.tile, N=config.keys, D=shape.head_dim,
            PAGE=shape.page_size, SPARSE=plan.sparse,
            PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    if plan.merge_count:
        merge_kernel[(plan.merge_count * shape.heads,)](
            plan.partial, plan.lse, out, plan.merges, HEADS=shape.heads, D=shape.head_dim, P=16, num_warps=4
        )
    return out
