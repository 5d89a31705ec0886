"""Norms, the gate, rotation with the cache write, moves of pages: bytes beside the copy's rate, and latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit.kernels import cache, norm, pages, rope, silu
from agentkit.kernels.cache import HeadNorms
from bench.gpu.card import Bench
from bench.gpu.pools import PAGE, filled, heads_of
from bench.gpu.report import Item
from bench.gpu.timing import cache_bytes
from tests.kernels.scene import FP8

Calls = list[Callable[[], object]]


def run(bench: Bench) -> Iterator[Item]:
    hidden, wide = (64, 96) if bench.rehearsal else (2560, 9728)
    for tokens in (3,) if bench.rehearsal else (64, 8192):
        yield from _norms(bench, tokens, hidden)
        yield from _gate(bench, tokens, wide)
        yield from _writes(bench, tokens)
    yield from _moves(bench)


def _sets(bench: Bench, size: int, make: Callable[[], Tensor]) -> list[Tensor]:
    """So many tensors of ``size`` bytes that they do not stay in the cache, within reason."""
    wanted = -(-5 * cache_bytes(bench.device) // max(1, size))
    return [make() for _ in range(1 if bench.rehearsal else min(128, max(2, wanted)))]


def _compare(bench: Bench, name: str, moved: int, ours: Calls, peers: Calls) -> Iterator[Item]:
    yield bench.bytes(name, moved, bench.clock.graph(ours))
    yield bench.bytes(f"torch {name}", moved, bench.clock.graph(peers), role="peer")


def _norms(bench: Bench, tokens: int, hidden: int) -> Iterator[Item]:
    shape, dtype = (tokens, hidden), torch.bfloat16
    size, weight = tokens * hidden * 2, filled((hidden,), dtype, bench.device)
    xs = _sets(bench, size, lambda: filled(shape, dtype, bench.device))
    ours: Calls = [partial(norm.launch_rms_norm, x, weight, 1e-6) for x in xs]
    yield from _compare(
        bench, f"norm of {tokens} rows", 2 * size, ours, [partial(F.rms_norm, x, (hidden,), weight, 1e-6) for x in xs]
    )
    residuals = [torch.zeros_like(x) for x in xs]
    ours = [partial(norm.launch_rms_norm, x, weight, 1e-6, r) for x, r in zip(xs, residuals, strict=True)]

    def added(x: Tensor, residual: Tensor) -> Tensor:
        residual += x
        return F.rms_norm(residual, (hidden,), weight, 1e-6)

    peers: Calls = [partial(added, x, r) for x, r in zip(xs, residuals, strict=True)]
    yield from _compare(bench, f"residual and norm of {tokens} rows", 4 * size, ours, peers)


def _gate(bench: Bench, tokens: int, wide: int) -> Iterator[Item]:
    size = tokens * wide * 2
    xs = _sets(bench, 2 * size, lambda: filled((tokens, 2 * wide), torch.bfloat16, bench.device))
    ours: Calls = [partial(silu.launch_silu_mul, x) for x in xs]
    peers: Calls = [partial(silu.silu_mul_reference, x) for x in xs]
    yield from _compare(bench, f"gate of {tokens} rows", 3 * size, ours, peers)


def _writes(bench: Bench, tokens: int) -> Iterator[Item]:
    """Norms of heads, rotation and the write to the pool: one pass, beside torch's pieces one after another."""
    heads, kv_heads, d = heads_of(bench)
    total, dtype, device = heads + 2 * kv_heads, torch.bfloat16, bench.device
    norms = HeadNorms(filled((d,), dtype, device), filled((d,), dtype, device), 1e-6)
    frequencies = 5e6 ** -(torch.arange(0, d, 2, device=device) / d)
    cos, sin = rope.angles(torch.arange(tokens, device=device) + 1000, frequencies)
    slots = torch.randperm(2 * tokens, device=device)[:tokens]
    size = tokens * total * d * 2
    xs = _sets(bench, size, lambda: filled((tokens, total, d), dtype, device))
    for name, pool_dtype in (("bf16", dtype), ("fp8", FP8)):
        pool = torch.zeros(2 * tokens, 2, kv_heads, d, dtype=pool_dtype, device=device)
        scales = (0.5, 0.25) if pool_dtype is FP8 else (1.0, 1.0)
        written = tokens * (heads * d * 2 + 2 * kv_heads * d * pool.element_size())
        calls: Calls = [
            partial(cache.launch_rotate_and_write, x, cos, sin, slots, pool, norms, scales) for x in xs
        ]  # fmt: skip
        moved = size + written + 2 * cos.numel() * 4
        yield bench.bytes(f"norms, rotation and write of {tokens} tokens to {name}", moved, bench.clock.graph(calls))
    pool = torch.zeros(2 * tokens, 2, kv_heads, d, dtype=dtype, device=device)

    def pieces(x: Tensor) -> None:
        _, rows = cache.rotate_and_write_reference(x, cos, sin, kv_heads, norms)
        pool.index_copy_(0, slots, rows)

    seconds = bench.clock.graph([partial(pieces, x) for x in xs])
    moved = 2 * size + 2 * cos.numel() * 4
    yield bench.bytes(f"torch norms, rotation and write of {tokens} tokens", moved, seconds, role="peer")


def _moves(bench: Bench) -> Iterator[Item]:
    _, kv_heads, d = heads_of(bench)
    layers, count = (2, 2) if bench.rehearsal else (36, 64)
    pool = filled((layers, 2 * count * PAGE, 2, kv_heads, d), torch.bfloat16, bench.device)
    order = torch.randperm(2 * count, device=bench.device)
    words = pages.pool_words(pool, PAGE)
    moves = torch.stack([order[:count], order[count:], torch.full_like(order[:count], PAGE)], 1)
    moved = 2 * layers * count * PAGE * 2 * kv_heads * d * 2
    seconds = bench.clock.cold(lambda: pages.launch_move(words, words, moves, PAGE))
    yield bench.bytes(f"copy of {count} pages in {layers} layers", moved, seconds)

    def indexed() -> None:
        words[:, order[count:]] = words[:, order[:count]]

    yield bench.bytes(f"torch copy of {count} pages", moved, bench.clock.cold(indexed), role="peer")
