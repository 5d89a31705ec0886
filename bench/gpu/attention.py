"""Dense attention: decode by bytes, prefill by operations, shared prefixes beside flat ones, fp8 beside bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit.kernels.groups import shared
from bench.gpu.card import Bench
from bench.gpu.pools import PAGE, causal_operations, contexts, gathered, planned, read_bytes, timed
from bench.gpu.report import Item, Note, Target
from bench.gpu.timing import capture
from tests.kernels.scene import FP8

Peer = Callable[[], Tensor]


def named(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def decode(bench: Bench) -> Iterator[Item]:
    """One row of each sequence: 85 % of the copy's bandwidth at 32K, whatever the batch."""
    context = 130 if bench.rehearsal else 32768
    for batch in (1, 2) if bench.rehearsal else (1, 8, 64):
        s = contexts(bench, batch, context)
        plan, moved, name = planned(bench, s), read_bytes(s), f"decode {named(context)} × {batch}"
        seconds = timed(bench, s, plan)
        yield bench.bytes(name, moved, seconds, Target(0.85, goal=0.9), note=_splits(plan))
        k, v = gathered(s)
        q = s.query.unsqueeze(2)
        yield from _peer(bench, f"SDPA {name}", moved, lambda q=q, k=k, v=v: partial(_sdpa, q, k, v, False))
        if batch == 8 and not bench.quick and bench.pace.affords(30, "FlexAttention"):
            yield from _peer(bench, f"FlexAttention {name}", moved, lambda q=q, k=k, v=v: _flex(bench, q, k, v, False))
        del k, v, q, s, plan


def prefill(bench: Bench) -> Iterator[Item]:
    """All rows of a prompt, and a chunk at its end: 60 % of the rate of a large product at 16K."""
    context = 150 if bench.rehearsal else 16384
    for rows in (context, 20) if bench.rehearsal else (context, 2048, 512):
        s = contexts(bench, 1, context, rows)
        plan, done = planned(bench, s), causal_operations(s)
        whole = rows == context
        name = f"prefill {named(context)}" if whole else f"prefill of the last {rows} of {named(context)}"
        seconds = timed(bench, s, plan)
        yield bench.operations(name, done, seconds, Target(0.6, goal=0.75) if whole else None)
        if whole:
            k, v = gathered(s)
            q = s.query.transpose(0, 1).unsqueeze(0)
            yield from _peer(bench, f"SDPA {name}", done, lambda q=q, k=k, v=v: partial(_sdpa, q, k, v, True), True)
            if not bench.quick and bench.pace.affords(30, "FlexAttention"):
                yield from _peer(
                    bench, f"FlexAttention {name}", done, lambda q=q, k=k, v=v: _flex(bench, q, k, v, True), True
                )
            del k, v, q


def prefix_shared(bench: Bench) -> Iterator[Item]:
    """Branches over one prefix, read once or once by each: 3 times as fast for 8 branches over 32K."""
    prefix, suffix = (128, 40) if bench.rehearsal else (32768, 512)
    for branches in (2,) if bench.rehearsal else (8,) if bench.quick else (2, 8, 32):
        s = contexts(bench, branches, prefix + suffix, shared=prefix)
        groups = shared(s.spans, PAGE, least=PAGE)
        assert len(groups) == branches + 1, f"{len(groups)} groups for {branches} branches"
        apart, together = planned(bench, s), planned(bench, s, groups)
        flat_seconds = timed(bench, s, apart)
        seconds = timed(bench, s, together)
        name = f"{branches} branches over {named(prefix)}"
        yield bench.bytes(f"{name}, prefix shared", read_bytes(s, prefix + branches * suffix), seconds)
        yield bench.bytes(f"{name}, flat", read_bytes(s), flat_seconds, role="part", note="bytes as if read by each")
        target = Target(3, of="value") if branches == 8 or bench.rehearsal else None
        yield bench.figure(f"{name}, shared over flat", flat_seconds / seconds, "×", target=target)


def fp8(bench: Bench) -> Iterator[Item]:
    """Keys and values of one byte: 1.7 times as fast at 128K."""
    context = 130 if bench.rehearsal else 131072
    for batch in (1,) if bench.rehearsal or bench.quick else (1, 4):
        taken: dict[torch.dtype, float] = {}
        for dtype in (torch.bfloat16, FP8):
            s = contexts(bench, batch, context, pool_dtype=dtype)
            plan = planned(bench, s)
            taken[dtype] = timed(bench, s, plan)
            name = f"decode {named(context)} × {batch}, KV in {'bf16' if dtype is torch.bfloat16 else 'fp8'}"
            yield bench.bytes(name, read_bytes(s), taken[dtype])
            del s, plan
        gain = taken[torch.bfloat16] / taken[FP8]
        target = Target(1.7, of="value") if batch == 1 else None
        yield bench.figure(f"fp8 over bf16 at {named(context)} × {batch}", gain, "×", target=target)


def _splits(plan: object) -> str:
    launches = getattr(plan, "launches", ())
    return "items " + ", ".join(f"{x.count} of {x.tile} rows" for x in launches)


def _peer(
    bench: Bench, name: str, amount: float, make: Callable[[], Peer], by_operations: bool = False
) -> Iterator[Item]:
    """Make and time a peer, or say why it cannot run."""
    try:
        seconds = bench.clock.cold(capture(make()).replay)
    except Exception as cause:
        if bench.device.type == "cuda":
            torch.cuda.synchronize()  # raises again where the context is lost: then this process has to end
        yield Note(f"{name} did not run: {type(cause).__name__}: {str(cause)[:300]}")
        return
    figure = bench.operations if by_operations else bench.bytes
    yield figure(name, amount, seconds, role="peer")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _flex(bench: Bench, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Peer:
    """FlexAttention, compiled as its documentation asks for; in a rehearsal as it is."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def ahead(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return row >= key

    mask = None
    if causal:
        mask = create_block_mask(ahead, None, None, q.shape[2], k.shape[2], device=str(bench.device))
    function = flex_attention if bench.rehearsal else torch.compile(flex_attention, dynamic=False)
    return lambda: function(q, k, v, block_mask=mask, enable_gqa=True)  # type: ignore[return-value]
