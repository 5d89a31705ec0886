"""The sampler's kernels against `draw` and the definition of the filters, in Triton's interpreter."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from agentkit.kernels import choose as module
from agentkit.kernels import sample as cpu
from agentkit.kernels.choose import choose
from agentkit.kernels.jit import jit, tl
from agentkit.kernels.sample import Filter, Rows, draw, gumbel, keep_reference, log_probabilities
from tests.kernels.test_sample import disputed, filters, packed, rows_of, seeds

EVERY = [
    Filter(t, k, p, m)
    for t, k, p, m in itertools.product([0.7, 1.0, 3.0], [0, 1, 7, 700], [1.0, 0.9, 0.3], [0.0, 0.05])
] + [Filter(), Filter(top_k=5, top_p=0.5)]


def launch(logits: Tensor, allowed: Tensor | None, how: list[Filter], numbers: list[int], positions: list[int]):
    """Ids and log-probabilities of the kernels."""
    mask = None if allowed is None else packed(allowed)
    ids, logprob = choose(logits, mask, Rows.of(how, numbers, positions), True)
    assert logprob is not None
    return ids, logprob


def assert_drawn(logits: Tensor, f: Filter, seed: int, position: int, token: int) -> None:
    """``token`` is what `draw` takes of a masked row, or as good: another may be kept, or win, by rounding alone."""
    want = draw(logits, f, seed, position)
    if token == want:
        return
    assert not f.greedy
    kept = keep_reference(logits, f)
    assert kept[token] or disputed(logits, f, token)
    tokens = torch.tensor([token, want])
    value = logits[tokens] / f.temperature + gumbel(seed, position, tokens)
    assert value[0] >= value[1] - 1e-5 or disputed(logits, f, want)


@pytest.mark.parametrize("size", [1, 33, 600, 2049, 5000])
@pytest.mark.parametrize("share", [None, 0.01, 0.7])
def test_each_row_draws_what_the_cpu_draws_under_every_filter(size: int, share: float | None) -> None:
    generator = torch.Generator().manual_seed(size)
    how = EVERY if size == 33 and share is None else EVERY[size % 7 :: 7]  # a program takes milliseconds here
    logits = torch.randn(len(how), size, generator=generator) * 3
    allowed = None if share is None else torch.rand(logits.shape, generator=generator) < share
    if allowed is not None:
        allowed[:, size // 2] = True
    numbers, positions = list(range(len(how))), list(range(100, 100 + len(how)))
    ids, logprob = launch(logits, allowed, how, numbers, positions)
    for row, f in enumerate(how):
        masked = logits[row] if allowed is None else logits[row].masked_fill(~allowed[row], -math.inf)
        assert int(ids[row]) == draw(masked, f, numbers[row], positions[row])
        want, _ = log_probabilities(logits[row], int(ids[row]), 0)
        assert float(logprob[row]) == pytest.approx(want, abs=2e-6 * size**0.5 + 1e-5)


@given(data=st.data(), size=st.sampled_from([1, 2, 40, 2500]))
@settings(max_examples=25, deadline=None)
def test_flat_peaked_tied_and_masked_rows_draw_what_the_cpu_draws(data: st.DataObject, size: int) -> None:
    logits = torch.stack([data.draw(rows_of(size)) for _ in range(3)])
    how = [data.draw(filters) for _ in logits]
    numbers = [data.draw(seeds) for _ in logits]
    ids, _ = launch(logits, None, how, numbers, [3, 2**33, 5])
    for row, (f, seed, position) in enumerate(zip(how, numbers, [3, 2**33, 5], strict=True)):
        assert_drawn(logits[row], f, seed, position, int(ids[row]))


def test_the_vocabulary_of_qwen3_with_its_padded_tail() -> None:
    """151,936 logits, of which the mask allows 151,669; the tail holds the largest logits and one NaN."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 151_936, generator=generator) * 2
    logits[:, 151_669:] = 50.0
    logits[3, 151_700] = math.nan
    logits[:, [7, 70_000, 151_668]] += 9
    allowed = (torch.arange(151_936) < 151_669).expand(4, -1)
    how = [Filter(), Filter(temperature=1.0), Filter(0.7, 20, 0.8), Filter(temperature=1.0, top_p=0.95, min_p=0.01)]
    ids, _ = launch(logits, allowed, how, [1, 2, 3, 4], [10, 20, 30, 40])
    masked = logits.masked_fill(~allowed, -math.inf)
    assert ids.tolist() == [draw(masked[i], f, i + 1, 10 * (i + 1)) for i, f in enumerate(how)]


def test_more_candidates_than_a_tile_holds() -> None:
    """Flat rows, of which the filters keep thousands: top-k, top-p and the winner lie in different tiles."""
    size = 3 * module.TILE - 100
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(0)) * 0.3
    how = [Filter(1.0, 0, 0.97), Filter(1.0, size - 500), Filter(1.0, 6000, 0.8), Filter(1.0, 0, 0.999, 0.2)]
    ids, _ = launch(logits, None, how, [0, 1, 2, 3], [5, 5, 5, 5])
    assert ids.tolist() == [draw(logits[i], f, i, 5) for i, f in enumerate(how)]
    assert all(int(keep_reference(logits[i], f).sum()) > module.TILE for i, f in enumerate(how))


def test_all_equal_logits_at_every_cut() -> None:
    """Equals stay together, so top-k and top-p keep all of them; greedy takes the first allowed one."""
    logits = torch.full((4, 2100), 2.5)
    allowed = torch.arange(2100).expand(4, -1) >= 2060
    how = [Filter(), Filter(1.0, 3), Filter(1.0, 0, 0.01), Filter(1.0, 0, 1.0, 1.0)]
    ids, _ = launch(logits, allowed, how, [9] * 4, [1] * 4)
    warm = draw(logits[0].masked_fill(~allowed[0], -math.inf), Filter(temperature=1.0), 9, 1)
    assert ids.tolist() == [2060, warm, warm, warm]


def test_zeros_of_both_signs_are_equals() -> None:
    logits = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0, -5.0]]).repeat(16, 1)
    ids, _ = launch(logits, None, [Filter(1.0, 1)] * 16, list(range(16)), [0] * 16)
    assert set(ids.tolist()) == {0, 1, 3, 4}


@pytest.mark.parametrize("f", [Filter(), Filter(1.0), Filter(1.0, 2), Filter(1.0, 3, 0.9)])
def test_a_row_without_a_token_is_minus_one_and_leaves_the_others_alone(f: Filter) -> None:
    logits = torch.arange(2500.0).remainder(7).repeat(6, 1)
    allowed = torch.ones(6, 2500, dtype=torch.bool)
    allowed[0] = False
    logits[1] = -math.inf
    logits[2, 2300] = math.nan
    logits[3, 5] = math.inf
    logits[4, 5] = math.nan
    allowed[4, 5] = False
    ids, logprob = launch(logits, allowed, [f] * 6, [1] * 6, [1] * 6)
    masked = logits.masked_fill(~allowed, -math.inf)
    assert ids.tolist() == [-1, -1, -1, -1, draw(masked[4], f, 1, 1), draw(masked[5], f, 1, 1)]
    assert logprob[:4].isnan().all()
    assert not logprob[5].isnan()


def test_a_draw_depends_neither_on_the_batch_nor_on_the_place_in_it() -> None:
    logits = torch.randn(8, 2300, generator=torch.Generator().manual_seed(2))
    how = [Filter(), Filter(1.0), Filter(0.7, 20, 0.8), Filter(1.0, 0, 0.9)]
    how += [Filter(1.0, 0, 1.0, 0.1), Filter(1.0, 0, 1.0, 0.1), Filter(2.0), Filter(0.5)]
    numbers, positions = list(range(50, 58)), list(range(8))
    ids, logprob = launch(logits, None, how, numbers, positions)
    order = [3, 7, 1, 0, 6, 2, 5, 4]
    again = launch(logits[order], None, *([x[i] for i in order] for x in (how, numbers, positions)))
    assert torch.equal(again[0], ids[order])
    assert torch.equal(again[1], logprob[order])
    for i in range(8):
        alone = launch(logits[i : i + 1], None, how[i : i + 1], numbers[i : i + 1], positions[i : i + 1])
        assert torch.equal(alone[0], ids[i : i + 1])
        assert torch.equal(alone[1], logprob[i : i + 1])


def test_rows_of_logits_and_masks_may_lie_apart() -> None:
    wide = torch.full((3, 900), math.nan)
    logits = wide[:, :700]
    logits.copy_(torch.randn(3, 700, generator=torch.Generator().manual_seed(1)))
    allowed = torch.rand(3, 700, generator=torch.Generator().manual_seed(2)) < 0.5
    words = torch.full((3, 40), -1, dtype=torch.int32)
    words[:, :22] = packed(allowed)
    how = [Filter(), Filter(1.0), Filter(1.0, 5)]
    ids, logprob = choose(logits, words[:, :22], Rows.of(how, [1, 2, 3], [0, 0, 0]), False)
    masked = logits.masked_fill(~allowed, -math.inf)
    assert ids.tolist() == [draw(masked[i], f, i + 1, 0) for i, f in enumerate(how)]
    assert logprob is None


def test_no_rows_are_no_launch() -> None:
    ids, logprob = choose(torch.zeros(0, 100), None, Rows.of([], [], []), True)
    assert ids.shape == (0,)
    assert logprob is not None
    assert logprob.shape == (0,)


@jit
def _draws_kernel(logits, seed, positions, drawn, N: tl.constexpr, V: tl.constexpr):
    n, token = tl.arange(0, N), tl.arange(0, V)
    low, high = module.row_key(tl.load(seed), tl.load(positions + n))
    times = module.arrival(low[:, None], high[:, None], token[None, :])
    weight = tl.exp(tl.load(logits + token))
    tl.store(drawn + n, tl.argmax(weight[None, :] / times, 1))


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -math.inf, 2.0, 1.5, -1.0, 0.5, -2.0])
    draws = 1 << 15
    rows = Rows.of([Filter(temperature=1.0)] * draws, [5] * draws, list(range(draws)))
    drawn = torch.empty(draws, dtype=torch.int32)
    _draws_kernel[(1,)](logits, rows.seed, rows.position, drawn, N=draws, V=8)
    counts = drawn.bincount(minlength=8).numpy()
    expected = logits.softmax(-1).numpy() * draws
    some = expected > 0
    assert counts[~some].sum() == 0
    assert float(((counts - expected)[some] ** 2 / expected[some]).sum()) < 22.5  # 99.9 % of six degrees of freedom
    assert drawn[:100].tolist() == [draw(logits, Filter(temperature=1.0), 5, i) for i in range(100)]


@jit
def _hash_kernel(seed, position, hashes, times, first, N: tl.constexpr):
    low, high = module.row_key(tl.load(seed), tl.load(position))
    token = first + tl.arange(0, N)
    tl.store(hashes + tl.arange(0, N), module.token_hash(low, high, token).to(tl.int64))
    tl.store(times + tl.arange(0, N), module.arrival(low, high, token))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1, 123456789123456789])
@pytest.mark.parametrize("position", [0, 262_143, 2**32])
def test_the_hash_is_the_cpus_bit_for_bit_and_its_logarithm_exact_to_rounding(seed: int, position: int) -> None:
    rows = Rows.of([Filter(1.0)], [seed], [position])
    hashes, times = torch.empty(1024, dtype=torch.int64), torch.empty(1024)
    for first in (0, 151_000):
        _hash_kernel[(1,)](rows.seed, rows.position, hashes, times, first, N=1024)
        tokens = np.arange(first, first + 1024)
        want = cpu._hash(cpu._key(seed, position), tokens)
        assert np.array_equal(hashes.numpy(), want.astype(np.int64))
        v = np.minimum((want.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
        assert np.allclose(times.numpy(), -np.log1p(-v.astype(np.float64)), rtol=4e-7, atol=0)
        assert torch.allclose(-times.log(), gumbel(seed, position, torch.from_numpy(tokens)), rtol=0, atol=2e-6)
