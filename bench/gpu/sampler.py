"""The sampler over Qwen3's vocabulary under a mask, beside the bytes of the logits and torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from agentkit.kernels import choose
from agentkit.kernels.sample import Filter, Rows
from bench.gpu.card import Bench
from bench.gpu.report import Item, Target
from bench.gpu.timing import cache_bytes

VOCABULARY = 151_936
FILTERS = {
    "greedy": Filter(),
    "temperature 1": Filter(temperature=1.0),
    "top-k 20, top-p 0.8": Filter(temperature=0.7, top_k=20, top_p=0.8),
    "top-p 0.95": Filter(temperature=1.0, top_p=0.95),
}


def run(bench: Bench) -> Iterator[Item]:
    rows, size = (2, 600) if bench.rehearsal else (64, VOCABULARY)
    copies = 2 if bench.rehearsal else max(2, -(-5 * cache_bytes(bench.device) // (rows * size * 4)))
    logits = [torch.randn(rows, size, device=bench.device) * 3 for _ in range(copies)]
    words = -(-size // 32)
    mask = torch.randint(-(2**31), 2**31, (rows, words), device=bench.device, dtype=torch.int64).to(torch.int32)
    moved = rows * size * 4 + mask.numel() * 4
    for name, f in FILTERS.items():
        how = Rows.of([f] * rows, list(range(rows)), [100] * rows, bench.device)
        seconds = bench.clock.graph([partial(choose.choose, x, mask, how, False) for x in logits])
        target = Target(40, of="value", at_most=True)
        yield bench.figure(
            f"masked sampler, {rows} rows, {name}", seconds * 1e6, "µs", target=target,
            share=moved / seconds / bench.copied, floor="copy",
        )  # fmt: skip
    how = Rows.of([Filter()] * rows, [0] * rows, [100] * rows, bench.device)
    seconds = bench.clock.graph([partial(choose.choose, x, mask, how, True) for x in logits])
    yield bench.figure("greedy with log-probabilities", seconds * 1e6, "µs")
    bits = 1 << torch.arange(32, device=bench.device, dtype=torch.int32)
    peers: dict[str, Callable[[Tensor], Tensor]] = {
        "torch masked argmax": lambda x: _masked(x, mask, bits).argmax(-1),
        "torch masked top-k 20, top-p 0.8": lambda x: _narrowed(_masked(x, mask, bits)),
    }
    for name, peer in peers.items():
        seconds = bench.clock.graph([partial(peer, x) for x in logits])
        yield bench.figure(name, seconds * 1e6, "µs", role="peer")


def _masked(logits: Tensor, mask: Tensor, bits: Tensor) -> Tensor:
    allowed = ((mask.unsqueeze(-1) & bits) != 0).flatten(1)[:, : logits.shape[1]]
    return logits.masked_fill(~allowed, -torch.inf)


def _narrowed(logits: Tensor) -> Tensor:
    """What a sampler in plain torch does, without a full sort: the nucleus of the k largest, by Gumbel's trick."""
    values, tokens = (logits / 0.7).topk(20, -1)
    mass = values.softmax(-1)
    values = values.masked_fill(mass.cumsum(-1) - mass > 0.8, -torch.inf)
    noise = torch.empty_like(values).exponential_().log().neg()
    return tokens.gather(-1, (values + noise).argmax(-1, keepdim=True))
