"""Every kernel beside its torch twin, before anything is timed."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu.card import Bench
from bench.gpu.report import Check, Item, Trial
from tests.kernels.rule import assert_as_exact

#: A name, and what raises where a kernel is wrong.
Proof = tuple[str, Callable[[], None]]


def run(bench: Bench) -> Iterator[Item]:
    """This process's share of all proofs."""
    from bench.gpu import attention_proofs, linear_proofs, other_proofs

    proofs = [*attention_proofs.proofs(bench), *other_proofs.proofs(bench), *linear_proofs.proofs(bench)]
    first, every = bench.shard
    yield from prove(proofs[first::every][bench.skip :])


def prove(proofs: list[Proof]) -> Iterator[Trial | Check]:
    """Run proofs, each for itself. A lost device is raised: nothing after it would mean anything."""
    for name, proof in proofs:
        yield Trial(name)
        begin = time.perf_counter()
        detail = ""
        try:
            proof()
        except Exception as cause:
            traceback.print_exc()
            detail = f"{type(cause).__name__}: {cause}".replace("\n", " ")[:300] or "failed"
        yield Check(name, not detail, time.perf_counter() - begin, detail)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def as_exact(ours: Tensor, peer: Tensor, exact: Tensor) -> None:
    """The rule of `tests.kernels.rule`, wherever the tensors are."""
    assert_as_exact(ours.cpu(), peer.cpu(), exact.cpu())


def same_bits(a: Tensor, b: Tensor, what: str) -> None:
    """Assert that two tensors are one, NaN included."""
    left, right = (x.cpu().contiguous().view(torch.uint8) for x in (a, b))
    assert left.shape == right.shape, f"{left.shape}, {right.shape}: {what}"
    assert bool((left == right).all()), what
