"""The kernels of `agentkit.kernels.sample.sample`: a token for each row of a batch, without a sort.

`_scan` reads the logits once, a stretch of a row in each program, and keeps the best token of the stretch; `_merge`
takes the best of the row. That is all for greedy rows and for those with a temperature alone. For the others

* `_merge` finds a logit below which top-k, top-p and min-p keep nothing. It needs only what `_scan` left behind: the
  k-th largest of many pieces' maxima is no larger than the k-th largest logit, and tokens below the largest logit
  by log(n / (1 - p)) together have less than the mass that top-p leaves out;
* `_gather` lists the few tokens above it;
* `_pick` finds the edges of top-k and top-p among them by bisection over the ordered bits of an fp32, so they are
  exact, and draws.

Masses are summed in 64-bit fixed point: whole numbers have no order of summation, so the result is the same in
every run although `_gather` lists tokens in any order.
"""

# pyright: basic
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agentkit.kernels.jit import jit, tl, triton

if TYPE_CHECKING:
    from agentkit.kernels.sample import Rows

#: Logits of one program of `_scan` and `_gather`, and of one piece of it whose maximum is kept.
BLOCK, PIECE = 2048, 512
#: Candidates that `_pick` holds in registers; the rest is read again in every step.
TILE = 4096
SCAN_WARPS, MERGE_WARPS, GATHER_WARPS, PICK_WARPS = 4, 4, 4, 8

_INF = tl.constexpr(float("inf"))
_ONE = tl.constexpr(float(1 << 44))  # of the fixed point


def choose(logits: Tensor, mask: Tensor | None, rows: Rows, logprobs: bool) -> tuple[Tensor, Tensor | None]:
    """Launch the kernels. See `agentkit.kernels.sample.sample`, which has checked the arguments.

    Nothing here waits for the device or depends on what is in its memory, so the launches can be captured in a graph
    and replayed with other logits, masks, seeds and positions.
    """
    r, v = logits.shape
    device = logits.device
    ids = torch.empty(r, dtype=torch.int64, device=device)
    logprob = torch.empty(r if logprobs else 0, dtype=torch.float32, device=device)
    if not r:
        return ids, logprob if logprobs else None
    parts = triton.cdiv(v, BLOCK)
    pieces = parts * (BLOCK // PIECE)
    floats = torch.empty(r * (3 * parts + pieces + 3), dtype=torch.float32, device=device)
    best, top, total, crest, pivot, peak, normaliser = floats.split([r * parts] * 3 + [r * pieces] + [r] * 3)
    wholes = torch.empty(r * (2 * parts + 2), dtype=torch.int32, device=device)
    token, legal, count, listed = wholes.split([r * parts] * 2 + [r] * 2)
    masked = logits if mask is None else mask
    step = masked.stride(0)
    how = (rows.temperature, rows.top_p, rows.log_min_p, rows.top_k, rows.seed, rows.position)
    flags = {"MASKED": mask is not None, "NARROWS": rows.narrows, "BLOCK": BLOCK}
    _scan[(r, parts)](
        logits, masked, *how, best, token, top, total, crest, legal, v, logits.stride(0), step,
        **flags, LOGPROBS=logprobs, PIECE=PIECE, num_warps=SCAN_WARPS,
    )  # fmt: skip
    _merge[(r,)](
        logits, *how[:4], best, token, top, total, crest, legal, ids, logprob, pivot, peak, normaliser, count, listed,
        logits.stride(0), parts, pieces,
        NARROWS=rows.narrows, LOGPROBS=logprobs, PARTS=triton.next_power_of_2(parts),
        PIECES=triton.next_power_of_2(pieces), num_warps=MERGE_WARPS,
    )  # fmt: skip
    if rows.narrows:
        candidates = torch.empty(r * v, dtype=torch.int32, device=device)
        mass = torch.empty(r * parts, dtype=torch.int64, device=device)
        _gather[(r, parts)](
            logits, masked, *how[:4], pivot, peak, listed, candidates, mass, v, logits.stride(0), step,
            **flags, num_warps=GATHER_WARPS,
        )  # fmt: skip
        _pick[(r,)](
            logits, *how, pivot, peak, normaliser, count, listed, candidates, mass, ids, logprob, v,
            logits.stride(0), parts,
            LOGPROBS=logprobs, PARTS=triton.next_power_of_2(parts), TILE=TILE, num_warps=PICK_WARPS,
        )  # fmt: skip
    return ids, logprob if logprobs else None


@jit
def row_key(seed, position):
    """SplitMix64 of seed and position, as two words."""
    key = _mix(_mix(seed.to(tl.uint64)) ^ position.to(tl.uint64))
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@jit
def _mix(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def token_hash(low, high, token):
    """32 bits of a row key and a token."""
    x = token.to(tl.uint32) * 0x9E3779B9 + low
    x ^= high
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def arrival(low, high, token):
    """The exponential variate whose negative logarithm is `agentkit.kernels.sample.gumbel`, of a row key."""
    v = (token_hash(low, high, token).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = tl.minimum(v, 0.999999940395355224609375)
    # −log(1 − v) for v in (0, 1), within 3e-7 of its value: mantissa in [√½, √2), polynomial fitted to log(1 + f) / f.
    # Triton's logarithm looks out for zeros, infinities and subnormals, which costs half as much again; and where no
    # power of two was taken out, f is −v itself, without what the rounding of 1 − v loses.
    bits = (1.0 - v).to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) & -0x800000
    f = tl.where(power == 0, -v, (bits - power).to(tl.float32, bitcast=True) - 1.0)
    p = 0.08722243458032608 * f - 0.14366787672042847
    p = p * f + 0.1495228260755539
    p = p * f - 0.16562402248382568
    p = p * f + 0.19956833124160767
    p = p * f - 0.25002074241638184
    p = p * f + 0.3333418667316437
    p = p * f - 0.49999988079071045
    p = p * f + 1.0
    return -(power.to(tl.float32) * 8.262958405176314e-08 + f * p)


@jit
def _ordered(x):
    """The bits of an fp32 as an unsigned number of the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@jit
def _unordered(bits):
    return tl.where(bits >> 31 != 0, bits ^ 0x80000000, bits ^ 0xFFFFFFFF).to(tl.float32, bitcast=True)


@jit
def _filter(row, temperature, top_p, log_min_p, top_k):
    """Of a row: whether it narrows, 1 / temperature, log(min-p), k, p."""
    warmth = tl.load(temperature + row).to(tl.float32)
    p = tl.load(top_p + row)
    lowest = tl.load(log_min_p + row).to(tl.float32)
    k = tl.load(top_k + row)
    narrows = (warmth > 0) & ((k > 0) | (p < 1.0) | (lowest > -_INF))
    return narrows, tl.div_rn(1.0, warmth), lowest, k, p


@jit
def _legal(masked, i, v, MASKED: tl.constexpr):
    legal = i < v
    if MASKED:
        word = tl.load(masked + (i >> 5), mask=legal, other=0)
        legal &= ((word >> (i & 31)) & 1) != 0
    return legal


@jit
def _scan(
    logits, masked, temperature, top_p, log_min_p, top_k, seed, position, best, token, top, total, crest, legal,
    v, logits_row, mask_row,
    MASKED: tl.constexpr, NARROWS: tl.constexpr, LOGPROBS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A stretch of one row: its best token, and what `_merge` needs to know of it."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row * tl.num_programs(1) + part
    i = part * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(logits + row * logits_row + i, mask=i < v, other=-_INF)
    allowed = _legal(masked + row * mask_row, i, v, MASKED)
    if LOGPROBS:
        largest = tl.max(raw, 0)
        level = tl.where(largest > -_INF, largest, 0.0)
        tl.store(top + at, largest)
        tl.store(total + at, tl.sum(tl.exp(raw - level), 0))
    x = tl.where(allowed, raw, -_INF)
    x = tl.where(x < _INF, x, _INF)  # NaN too, so that the maximum tells of it
    narrow, inverse, _, _, _ = _filter(row, temperature, top_p, log_min_p, top_k)
    warm = inverse < _INF
    x *= tl.where(warm, inverse, 1.0)
    value = tl.max(x, 0)
    index = 0
    if NARROWS & narrow:
        piece = at * (BLOCK // PIECE) + tl.arange(0, BLOCK // PIECE)
        tl.store(crest + piece, tl.max(tl.reshape(x, (BLOCK // PIECE, PIECE)), 1))
        tl.store(legal + at, tl.sum((x > -_INF).to(tl.int32), 0))
    elif warm & (value > -_INF) & (value < _INF):
        # argmax(x - log(e)) as argmin(e / exp(x)): an exponential costs a fraction of a logarithm.
        low, high = row_key(tl.load(seed + row), tl.load(position + row))
        least, index = tl.min(arrival(low, high, i) * tl.exp(value - x), 0, return_indices=True)
        value -= tl.log(least)
    else:
        index = tl.argmax(x, 0)
    tl.store(best + at, value)
    tl.store(token + at, part * BLOCK + index)


@jit
def _merge(
    logits, temperature, top_p, log_min_p, top_k, best, token, top, total, crest, legal, ids, logprob, pivot, peak,
    normaliser, count, listed, logits_row, parts, pieces,
    NARROWS: tl.constexpr, LOGPROBS: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One row: its token, or where it narrows, the pivot for `_gather`."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    inside = part < parts
    values = tl.load(best + row * parts + part, mask=inside, other=-_INF)
    tokens = tl.load(token + row * parts + part, mask=inside, other=0)
    value, index = tl.max(values, 0, return_indices=True)
    chosen = tl.sum(tl.where(part == index, tokens, 0), 0)
    good = (value > -_INF) & (value < _INF)
    scale = 0.0
    if LOGPROBS:
        tops = tl.load(top + row * parts + part, mask=inside, other=-_INF)
        totals = tl.load(total + row * parts + part, mask=inside, other=0.0)
        level = tl.max(tops, 0)
        scale = level + tl.log(tl.sum(totals * tl.exp(tops - level), 0))
    narrow, _, lowest, k, p = _filter(row, temperature, top_p, log_min_p, top_k)
    if NARROWS & narrow:
        n = tl.sum(tl.load(legal + row * parts + part, mask=inside, other=0), 0)
        few = (k > 0) & (k < n)
        edge = -_INF
        if not (few & (p < 1.0)):  # there the mass of all k tokens must be known, of those below min-p as well
            edge = tl.maximum(edge, value + lowest)
            if p < 1.0:
                edge = tl.maximum(edge, value + tl.log(((1.0 - p) / n).to(tl.float32)) - 0.01)
        if few & (k <= pieces):
            piece = tl.arange(0, PIECES)
            maxima = tl.load(crest + row * pieces + piece, mask=piece < pieces, other=-_INF)
            low = _ordered(tl.min(tl.where(piece < pieces, maxima, _INF), 0))
            high = _ordered(value) + 1
            for _step in range(16):  # a lower bound need not be exact
                middle = low + ((high - low) >> 1)
                enough = tl.sum((maxima >= _unordered(middle)).to(tl.int32), 0) >= k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            edge = tl.maximum(edge, _unordered(low))
        tl.store(pivot + row, edge)
        tl.store(peak + row, tl.where(good, value, _INF))
        tl.store(count + row, n)
        tl.store(listed + row, 0)
        tl.store(normaliser + row, scale)
    else:
        tl.store(ids + row, tl.where(good, chosen, -1).to(tl.int64))
        if LOGPROBS:
            raw = tl.load(logits + row * logits_row + chosen)
            tl.store(logprob + row, tl.where(good, raw - scale, float("nan")))


@jit
def _gather(
    logits, masked, temperature, top_p, log_min_p, top_k, pivot, peak, listed, candidates, mass, v, logits_row,
    mask_row,
    MASKED: tl.constexpr, NARROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens of a stretch that are not below the row's pivot, and the mass of all its tokens."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    narrow, inverse, _, _, _ = _filter(row, temperature, top_p, log_min_p, top_k)
    if narrow:
        level = tl.load(peak + row)
        if level < _INF:
            i = part * BLOCK + tl.arange(0, BLOCK)
            allowed = _legal(masked + row * mask_row, i, v, MASKED)
            x = tl.load(logits + row * logits_row + i, mask=allowed, other=-_INF) * inverse
            weight = (tl.exp(x - level) * _ONE).to(tl.int64)
            tl.store(mass + row * tl.num_programs(1) + part, tl.sum(weight, 0))
            kept = (x > -_INF) & (x >= tl.load(pivot + row))
            n = tl.sum(kept.to(tl.int32), 0)
            if n > 0:
                start = tl.atomic_add(listed + row, n, sem="relaxed")
                place = start + tl.cumsum(kept.to(tl.int32), 0) - 1
                tl.store(candidates + row * v + place, i, mask=kept)


@jit
def _candidate(candidates, logits, inverse, start, n, TILE: tl.constexpr):
    """Tokens of a tile of the list and their scaled logits, −inf behind its end."""
    j = start + tl.arange(0, TILE)
    token = tl.load(candidates + j, mask=j < n, other=0)
    x = tl.load(logits + token, mask=j < n, other=-_INF)
    return token, x * inverse


@jit
def _above(edge, x, candidates, logits, inverse, level, n, MASS: tl.constexpr, TILE: tl.constexpr):
    """How many candidates are not below an edge, or their mass; ``x`` are those of the first tile."""
    found = _weigh(x, edge, level, MASS)
    for start in tl.range(TILE, n, TILE):
        _, more = _candidate(candidates, logits, inverse, start, n, TILE)
        found += _weigh(more, edge, level, MASS)
    return found


@jit
def _weigh(x, edge, level, MASS: tl.constexpr):
    if MASS:
        return tl.sum(tl.where(x >= edge, (tl.exp(x - level) * _ONE).to(tl.int64), 0), 0)
    else:
        return tl.sum((x >= edge).to(tl.int64), 0)


@jit
def _edge(target, low, x, candidates, logits, inverse, level, n, MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest edge that leaves ``target`` above it; ``low`` leaves as much."""
    lower = _ordered(low)
    upper = _ordered(level) + 1
    while upper - lower > 1:
        middle = lower + ((upper - lower) >> 1)
        enough = _above(_unordered(middle), x, candidates, logits, inverse, level, n, MASS, TILE) >= target
        lower = tl.where(enough, middle, lower)
        upper = tl.where(enough, upper, middle)
    return _unordered(lower)


@jit
def _pick(
    logits, temperature, top_p, log_min_p, top_k, seed, position, pivot, peak, normaliser, count, listed, candidates,
    mass, ids, logprob, v, logits_row, parts,
    LOGPROBS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A token of one row that narrows, from its candidates."""
    row = tl.program_id(0).to(tl.int64)
    narrow, inverse, lowest, k, p = _filter(row, temperature, top_p, log_min_p, top_k)
    if narrow:
        logits += row * logits_row
        level = tl.load(peak + row)
        chosen = -1
        if level < _INF:
            n = tl.load(listed + row)
            candidates += row * v
            token, x = _candidate(candidates, logits, inverse, 0, n, TILE)
            edge = tl.load(pivot + row)
            few = (k > 0) & (k < tl.load(count + row))
            if few & (k <= n):
                edge = _edge(k, edge, x, candidates, logits, inverse, level, n, False, TILE)
            if p < 1.0:
                if few:
                    whole = _above(edge, x, candidates, logits, inverse, level, n, True, TILE)
                else:
                    part = tl.arange(0, PARTS)
                    whole = tl.sum(tl.load(mass + row * parts + part, mask=part < parts, other=0), 0)
                target = (whole.to(tl.float64) * p).to(tl.int64)
                if _above(edge, x, candidates, logits, inverse, level, n, True, TILE) >= target:
                    edge = _edge(target, edge, x, candidates, logits, inverse, level, n, True, TILE)
            edge = tl.maximum(edge, level + lowest)
            low, high = row_key(tl.load(seed + row), tl.load(position + row))
            y = tl.where(x >= edge, x - tl.log(arrival(low, high, token)), -_INF)
            value = tl.max(y, 0)
            chosen = tl.min(tl.where(y == value, token, 0x7FFFFFFF), 0)
            for start in tl.range(TILE, n, TILE):
                token, x = _candidate(candidates, logits, inverse, start, n, TILE)
                y = tl.where(x >= edge, x - tl.log(arrival(low, high, token)), -_INF)
                ahead = tl.max(y, 0)
                rival = tl.min(tl.where(y == ahead, token, 0x7FFFFFFF), 0)
                better = (ahead > value) | ((ahead == value) & (rival < chosen))
                chosen = tl.where(better, rival, chosen)
                value = tl.where(better, ahead, value)
        tl.store(ids + row, chosen.to(tl.int64))  # pyright: ignore[reportAttributeAccessIssue]
        if LOGPROBS:
            raw = tl.load(logits + tl.maximum(chosen, 0))
            scale = tl.load(normaliser + row)
            tl.store(logprob + row, tl.where(chosen >= 0, raw - scale, float("nan")))
