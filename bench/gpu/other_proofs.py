"""Proofs of the kernels around attention: norms, gate, cache write, key bounds, moves of pages, sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels import cache, choose, norm, pages, rope, silu
from agentkit.kernels.cache import HeadNorms
from agentkit.kernels.sample import Filter, Rows, apply_mask_reference, draw, gumbel, keep_reference, log_probabilities
from bench.gpu.card import Bench
from bench.gpu.correctness import Proof, as_exact, same_bits
from bench.gpu.pools import QWEN, TOY
from tests.kernels.scene import DEVICE, FP8

TYPES = [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
ODD_HEADS = [(1, 1, 2), (9, 3, 64), (12, 4, 32)]
#: Ends of Qwen3's context, and a token that writes nothing.
POSITIONS, TARGETS = [0, 1, 4096, 262_143, 100_003], [7, 40, 0, -1, 23]
FILTERS = [
    Filter(),
    Filter(temperature=1.0),
    Filter(0.7, 20, 0.8),
    Filter(1.0, 0, 0.95, 0.01),
    Filter(1.3, 700),
    Filter(3.0, 0, 0.3),
]
SCALES = (0.125, 0.0625)


def proofs(bench: Bench) -> Iterator[Proof]:
    toy = bench.rehearsal
    for name, dtype in TYPES[1:] if toy else TYPES:
        for rows, n in ((2, 96),) if toy else ((1, 1), (3, 7), (5, 2560), (300, 2560)):
            yield f"norm {name} {rows} × {n}", partial(_norm, rows, n, dtype)
            yield f"residual and norm {name} {rows} × {n}", partial(_added, rows, n, dtype)
        for rows, n in ((2, 40),) if toy else ((1, 1), (3, 7), (64, 9728)):
            yield f"gate {name} {rows} × {n}", partial(_gate, rows, n, dtype)
        for heads in [TOY] if toy else [QWEN, *ODD_HEADS]:
            yield f"rotation and write {name}, heads {heads}", partial(_rotation, heads, dtype, True)
        yield f"rotation without norms {name}", partial(_rotation, TOY if toy else QWEN, dtype, False)
        yield f"write to fp8 {name}", partial(_small, TOY if toy else QWEN, dtype)
    yield "what fp8 cannot hold is its largest number", _saturated
    yield "bounds of pages, bf16", partial(_bounds, torch.bfloat16)
    yield "bounds of pages, fp8", partial(_bounds, FP8)
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", FP8)):
        yield f"moves of pages, {name}", partial(_moves, dtype)
    beyond = 1 << 12 if toy else (1 << 31) + (1 << 27)
    yield "cache write and page copy beyond 2**31 numbers", partial(_far, TOY if toy else QWEN, beyond)
    rows, size = (4, 2100) if toy else (24, 151_936)
    shares = (("unmasked", None), ("one in a hundred allowed", 0.01), ("seven in ten allowed", 0.7))
    for name, share in shares[::2] if toy else shares:
        yield f"sampler, {name}", partial(_sampler, rows, size, share)
    yield "sampler twice is the same bits", partial(_sampled_twice, rows, size)
    yield "sampler, rows that allow nothing", partial(_nothing, size)


def _random(*shape: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread
    return made.to(dtype).to(DEVICE)


def _norm(rows: int, n: int, dtype: torch.dtype) -> None:
    x, weight = _random(rows, n, dtype=dtype, spread=3), _random(n, dtype=dtype, seed=1)
    exact = norm.rms_norm_reference(x.double(), weight.double(), 1e-6)
    as_exact(norm.launch_rms_norm(x, weight, 1e-6), norm.rms_norm_reference(x, weight, 1e-6), exact)


def _added(rows: int, n: int, dtype: torch.dtype) -> None:
    x, residual = _random(rows, n, dtype=dtype), _random(rows, n, dtype=dtype, seed=1, spread=3)
    weight = _random(n, dtype=dtype, seed=2)
    total, peer = norm.add_rms_norm_reference(x, residual, weight, 1e-6)
    _, exact = norm.add_rms_norm_reference(x.double(), residual.double(), weight.double(), 1e-6)
    got = norm.launch_rms_norm(x, weight, 1e-6, residual)
    same_bits(residual, total, "the sum differs")
    as_exact(got, peer, exact)


def _gate(rows: int, n: int, dtype: torch.dtype) -> None:
    gate_up = _random(rows, 2 * n, dtype=dtype, spread=5)
    exact = silu.silu_mul_reference(gate_up.double())
    as_exact(silu.launch_silu_mul(gate_up), silu.silu_mul_reference(gate_up), exact)


def _projection(heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, HeadNorms]:
    """A projection, its tables, and norms."""
    queries, kv_heads, d = heads
    qkv = _random(len(POSITIONS), queries + 2 * kv_heads, d, dtype=dtype, spread=2)
    cos, sin = rope.angles(torch.tensor(POSITIONS), 5e6 ** -(torch.arange(0, d, 2) / d))
    norms = HeadNorms(_random(d, dtype=dtype, seed=1), _random(d, dtype=dtype, seed=2), 1e-6)
    return qkv, cos.to(DEVICE), sin.to(DEVICE), norms


def _exactly(
    qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, norms: HeadNorms | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The definition in the projection's own precision, and in fp64."""
    wide = norms and HeadNorms(norms.query.double(), norms.key.double(), norms.eps)
    peer = cache.rotate_and_write_reference(qkv, cos, sin, kv_heads, norms)
    return peer, cache.rotate_and_write_reference(qkv.double(), cos, sin, kv_heads, wide)


def _rotation(heads: tuple[int, int, int], dtype: torch.dtype, normed: bool) -> None:
    qkv, cos, sin, norms = _projection(heads, dtype)
    used = norms if normed else None
    peer, exact = _exactly(qkv, cos, sin, heads[1], used)
    targets = torch.tensor(TARGETS, device=DEVICE)
    pool = torch.full((48, 2, *heads[1:]), 77.0, dtype=dtype, device=DEVICE)
    query = cache.launch_rotate_and_write(qkv, cos, sin, targets, pool, used)
    as_exact(query, peer[0], exact[0])
    written = targets >= 0
    as_exact(pool[targets[written]], peer[1][written], exact[1][written])
    others = torch.ones(48, dtype=torch.bool, device=DEVICE).index_fill(0, targets[written], False)
    assert bool((pool[others] == 77).all()), "a slot that no token has was written"


def _small(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    qkv, cos, sin, norms = _projection(heads, dtype)
    targets = torch.tensor(TARGETS, device=DEVICE)
    pool = torch.zeros(48, 2, *heads[1:], dtype=FP8, device=DEVICE)
    cache.launch_rotate_and_write(qkv, cos, sin, targets, pool, norms, SCALES)
    peer, exact = _exactly(qkv, cos, sin, heads[1], norms)
    written = targets >= 0
    factor = torch.tensor(SCALES, device=DEVICE).view(1, 2, 1, 1)
    small = (peer[1][written].float() / factor).clamp(-448, 448).to(FP8).float() * factor
    got = pool.view(torch.uint8)[targets[written]].view(FP8).float() * factor
    as_exact(got, small, exact[1][written])


def _saturated() -> None:
    qkv = torch.cat([torch.ones(1, 2, 4) * 1e4, torch.ones(1, 1, 4) * -1e4], 1).to(DEVICE)
    pool = torch.zeros(4, 2, 1, 4, dtype=FP8, device=DEVICE)
    ones, zeros = torch.ones(1, 1, 2, device=DEVICE), torch.zeros(1, 1, 2, device=DEVICE)
    cache.launch_rotate_and_write(qkv, ones, zeros, torch.tensor([2], device=DEVICE), pool)
    assert pool.float()[2].flatten().tolist() == [448.0] * 4 + [-448.0] * 4, "it is not"


def _bounds(dtype: torch.dtype) -> None:
    """A page from its start, one in its middle, one of a single token, and a token that writes nothing."""
    page, scale = 16, 0.5 if dtype is FP8 else 1.0
    slots = torch.tensor([*range(32, 48), -1, *range(5, 9), 70], device=DEVICE)
    pool = _random(5 * page, 2, 8, 128, dtype=torch.float32, spread=2).to(dtype)
    before = _random(5, 2, 8, 128, dtype=torch.bfloat16, seed=3)
    got, want = before.clone(), before.clone()
    cache.launch_bounds(pool, slots, got, scale)
    cache.bounds_(pool, slots[slots >= 0], want, scale)
    same_bits(got, want, "bounds differ")


def _moves(dtype: torch.dtype) -> None:
    """Every bit pattern: beginnings of pages within the pool, blocks out of it and back in."""
    page = 16
    bits = torch.randint(0, 256, (3, 6 * page, 2, 4, 32 * dtype.itemsize), generator=torch.Generator().manual_seed(0))
    pool = bits.to(torch.uint8).to(DEVICE).view(dtype)
    want = pages.copy_pages_reference(
        pool.view(torch.uint8), [pages.Copy(0, 3, 13), pages.Copy(0, 5, 16), pages.Copy(2, 4, 1)], page
    )
    words = pages.pool_words(pool, page)
    pages.launch_move(words, words, torch.tensor([(0, 3, 13), (0, 5, 16), (2, 4, 1)], device=DEVICE), page)
    same_bits(pool, want, "copies differ")
    blocks = pool.new_empty(2, 3, page, *pool.shape[2:])
    pages.launch_move(words, pages.block_words(blocks), torch.tensor([(1, 0, page), (4, 1, page)], device=DEVICE), page)
    same_bits(blocks[1, 2], pool.unflatten(1, (-1, page))[2, 4], "a block differs from its page")
    back = torch.tensor([(0, 4, page), (1, 1, page)], device=DEVICE)
    pages.launch_move(pages.block_words(blocks), words, back, page)
    same_bits(pool.unflatten(1, (-1, page))[2, 1], blocks[1, 2], "a page differs from its block")


def _far(heads: tuple[int, int, int], numbers: int) -> None:
    """The last pages of a pool of more numbers than 32 bits count."""
    page, (_, kv_heads, d) = 64, heads
    slots = max(3, -(-numbers // (page * 2 * kv_heads * d))) * page
    qkv, cos, sin, norms = _projection(heads, torch.bfloat16)
    near, far = (torch.zeros(n, 2, kv_heads, d, dtype=torch.bfloat16, device=DEVICE) for n in (page, slots))
    targets = torch.tensor(TARGETS, device=DEVICE)
    cache.launch_rotate_and_write(qkv, cos, sin, targets, near, norms)
    shifted = torch.where(targets >= 0, targets + slots - page, -1)
    cache.launch_rotate_and_write(qkv, cos, sin, shifted, far, norms)
    same_bits(far[-page:], near, "what was written differs")
    words = pages.pool_words(far.unsqueeze(0), page)
    last = slots // page - 1
    pages.launch_move(words, words, torch.tensor([(last, 0, page), (last, last - 1, 9)], device=DEVICE), page)
    same_bits(far[:page], near, "the copy to the first page differs")
    same_bits(far[-2 * page : -2 * page + 9], near[:9], "the copy to the last page but one differs")


def _drawn(rows: int, size: int, share: float | None) -> tuple[Tensor, Tensor | None, Tensor, list[Filter], Rows]:
    """Logits, mask, masked logits on the CPU, and how each row is sampled."""
    generator = torch.Generator().manual_seed(size + rows)
    logits = torch.randn(rows, size, generator=generator) * 3
    how = [FILTERS[i % len(FILTERS)] for i in range(rows)]
    words = None
    if share is not None:
        allowed = torch.rand(logits.shape, generator=generator) < share
        allowed[:, size // 2] = True
        bits = np.packbits(allowed.numpy(), axis=1, bitorder="little")
        packed = np.zeros((rows, -(-size // 32) * 4), dtype=np.uint8)
        packed[:, : bits.shape[1]] = bits
        words = torch.from_numpy(packed.view(np.int32))
    masked = logits if words is None else apply_mask_reference(logits, words)
    rows_of = Rows.of(how, list(range(rows)), list(range(100, 100 + rows)), DEVICE)
    return logits.to(DEVICE), None if words is None else words.to(DEVICE), masked, how, rows_of


def _sampler(rows: int, size: int, share: float | None) -> None:
    logits, mask, masked, how, numbers = _drawn(rows, size, share)
    ids, logprob = choose.choose(logits, mask, numbers, True)
    assert logprob is not None
    for row, f in enumerate(how):
        token = int(ids[row])
        want = draw(masked[row], f, row, 100 + row)
        assert token == want or _as_good(masked[row], f, row, 100 + row, token), f"row {row}, {f}: {token}, not {want}"
        said, _ = log_probabilities(logits[row].cpu(), token, 0)
        assert abs(float(logprob[row]) - said) < 2e-6 * size**0.5 + 1e-5, (
            f"row {row}: {float(logprob[row])}, not {said}"
        )


def _as_good(logits: Tensor, f: Filter, seed: int, position: int, token: int) -> bool:
    """Whether rounding alone decides between this token and the CPU's: of an edge's mass, or of a logarithm."""
    if f.greedy or token < 0:
        return False
    loose, tight = (Filter(f.temperature, f.top_k, min(1.0, f.top_p * x), f.min_p) for x in (1 + 1e-5, 1 - 1e-5))
    value = logits / f.temperature + gumbel(seed, position, torch.arange(len(logits)))
    sure = value.masked_fill(~keep_reference(logits, tight), -math.inf).max()
    return bool(keep_reference(logits, loose)[token]) and float(value[token]) >= float(sure) - 1e-5


def _sampled_twice(rows: int, size: int) -> None:
    logits, mask, _, _, numbers = _drawn(rows, size, 0.7)
    (ids, logprob), (again, logprob_again) = (choose.choose(logits, mask, numbers, True) for _ in range(2))
    assert logprob is not None
    assert logprob_again is not None
    same_bits(ids, again, "ids of two runs differ")
    same_bits(logprob, logprob_again, "log-probabilities of two runs differ")


def _nothing(size: int) -> None:
    """−1 for a row that is masked whole, or holds NaN or an infinity where it is allowed."""
    logits = _random(5, size, dtype=torch.float32)
    mask = torch.full((5, -(-size // 32)), -1, dtype=torch.int32, device=DEVICE)
    mask[0] = 0
    logits[1], logits[2, size - 3], logits[3, 5] = -math.inf, math.nan, math.inf
    for f in (Filter(), Filter(1.0), Filter(1.0, 3, 0.9)):
        ids, _ = choose.choose(logits, mask, Rows.of([f] * 5, [1] * 5, [1] * 5, DEVICE), False)
        assert ids.tolist() == [-1, -1, -1, -1, draw(logits[4].cpu(), f, 1, 1)], f"{f}: {ids.tolist()}"
