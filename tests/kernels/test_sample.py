"""Sampling on the CPU: filters against their definition by a full sort, noise against the distribution it must give,
a batch against its rows one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit.kernels import sample as module
from agentkit.kernels.sample import (
    Filter,
    Rows,
    draw,
    gumbel,
    keep_reference,
    log_probabilities,
    penalize_,
    sample,
    target_log_probabilities,
)

filters = st.builds(
    Filter,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.5, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
)
seeds = st.one_of(st.integers(-3, 3), st.integers(-(2**70), 2**70))


@st.composite
def rows_of(draw: st.DrawFn, size: int) -> Tensor:
    """Logits of one row: flat, peaked, with ties, with masked tokens; at least one is allowed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(size, generator=generator) * draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]))
    if draw(st.booleans()):
        logits = logits.round()
    if draw(st.booleans()):
        logits[torch.rand(size, generator=generator) < 0.5] = -math.inf
        logits[draw(st.integers(0, size - 1))] = 1.0
    return logits


rows = st.sampled_from([1, 2, 7, 300, 5000]).flatmap(rows_of)


def packed(allowed: Tensor) -> Tensor:
    """``[r, v]`` bool as words of bits."""
    bits = np.packbits(allowed.numpy(), axis=1, bitorder="little")
    words = np.zeros((len(bits), -(-allowed.shape[1] // 32) * 4), dtype=np.uint8)
    words[:, : bits.shape[1]] = bits
    return torch.from_numpy(words.view(np.int32))


def disputed(logits: Tensor, f: Filter, token: int) -> bool:
    """Whether rounding decides if top-p keeps a token: the mass of those before it is 1 - 1e-6 … 1 + 1e-6 times p."""
    before = keep_reference(logits, Filter(f.temperature, f.top_k))
    x = (logits.double() / f.temperature).masked_fill(~before, -math.inf)
    mass = float(x.softmax(-1)[x > x[token]].sum())
    return bool(before[token]) and f.top_p < 1 and abs(mass - f.top_p) < 1e-6


@given(logits=rows, f=filters.filter(lambda f: f.temperature > 0))
@settings(max_examples=300, deadline=None)
def test_what_may_be_drawn_is_what_the_definition_keeps(logits: Tensor, f: Filter) -> None:
    x = logits.numpy() * np.float32(module._inverse(f.temperature))
    got = (x >= module._edge(x, x.max(), f)) & (x > -math.inf)
    for token in np.flatnonzero(got != keep_reference(logits, f).numpy()):
        assert disputed(logits, f, int(token))
    assert got[draw(logits, f, 3, 4)]


def test_the_last_token_of_the_nucleus_is_kept_and_the_next_is_not() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, kept in ((0.4999, 1), (0.5001, 2), (0.7499, 2), (0.7501, 4), (0.876, 4)):
        f = Filter(temperature=1.0, top_p=top_p)
        assert int(keep_reference(logits, f).sum()) == kept
        assert {draw(logits, f, 1, i) for i in range(200)} == set(range(kept))


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -math.inf])
    counts = np.bincount([draw(logits, Filter(temperature=1.0), 11, i) for i in range(20_000)], minlength=4)
    expected = logits.softmax(-1).numpy() * 20_000
    chi_square = float((((counts - expected) ** 2)[:3] / expected[:3]).sum())
    assert chi_square < 13.8  # the 99.9 % point of two degrees of freedom; the seed is fixed, so no flake
    assert counts[3] == 0


def test_draws_from_a_large_vocabulary_follow_the_filtered_softmax() -> None:
    """Ten groups of 100 tokens; what the filter keeps of them is drawn in the proportion of the masses."""
    logits = torch.linspace(0, 3, 10).repeat_interleave(100)
    f = Filter(temperature=0.8, top_p=0.9)
    kept = keep_reference(logits, f)
    expected = (logits / 0.8).masked_fill(~kept, -math.inf).softmax(-1).view(10, 100).sum(1).numpy() * 6000
    counts = np.bincount([draw(logits, f, i, 5) // 100 for i in range(6000)], minlength=10)
    some = expected > 0
    assert 3 < some.sum() < 10
    assert counts[~some].sum() == 0
    assert float(((counts - expected)[some] ** 2 / expected[some]).sum()) < 24.3  # 99.9 % of seven degrees or fewer


def test_noise_is_uniform_and_independent_between_neighbours() -> None:
    tokens = torch.arange(50_000)
    uniform = torch.exp(-torch.exp(-gumbel(1, 2, tokens)))
    assert abs(float(uniform.mean()) - 0.5) < 0.005
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.003)
    for other in (gumbel(1, 3, tokens), gumbel(2, 2, tokens), gumbel(1, 2, tokens).roll(1)):
        correlation = torch.corrcoef(torch.stack([uniform, torch.exp(-torch.exp(-other))]))[0, 1]
        assert abs(float(correlation)) < 0.02


def test_noise_is_finite_and_within_its_range_at_both_ends_of_the_hash() -> None:
    noise = module._noise(np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.uint32))
    assert np.isfinite(noise).all()
    assert noise[0] == pytest.approx(33 * math.log(2), abs=1e-5)
    assert noise[-1] == pytest.approx(-math.log(24 * math.log(2)), abs=1e-5)
    assert noise[0] - noise[-1] < module._NOISE_RANGE


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000)
    f = Filter(temperature=1.0, top_p=0.95)
    first = [draw(logits, f, 7, i) for i in range(50)]
    torch.manual_seed(99)
    assert [draw(logits, f, 7, i) for i in range(50)] == first
    assert [draw(logits, f, 8, i) for i in range(50)] != first


@given(data=st.data(), size=st.sampled_from([1, 31, 33, 300, 2000]), share=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]))
@settings(max_examples=200, deadline=None)
def test_a_batch_is_its_rows_one_by_one(data: st.DataObject, size: int, share: float) -> None:
    logits = torch.stack([data.draw(rows_of(size)) for _ in range(4)])
    how = [data.draw(filters) for _ in logits]
    numbers = [data.draw(seeds) for _ in logits]
    allowed = torch.rand(logits.shape, generator=torch.Generator().manual_seed(size)) < share
    mask = packed(allowed) if data.draw(st.booleans()) else None
    before = logits.clone()
    got = sample(logits, mask, Rows.of(how, numbers, [5, 6, 7, 2**40]), logprobs=True)
    assert torch.equal(logits, before)
    assert got.logprob is not None
    for row, (f, seed, position) in enumerate(zip(how, numbers, [5, 6, 7, 2**40], strict=True)):
        masked = logits[row] if mask is None else logits[row].masked_fill(~allowed[row], -math.inf)
        token = int(got.ids[row])
        if bool((masked == -math.inf).all()):
            assert token == -1
            assert math.isnan(got.logprob[row])
        else:
            assert token == draw(masked, f, seed, position)
            assert float(got.logprob[row]) == pytest.approx(log_probabilities(logits[row], token, 0)[0], abs=1e-5)


@pytest.mark.parametrize("f", [Filter(), Filter(temperature=1.0), Filter(temperature=1.0, top_k=3, top_p=0.9)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_refused_where_it_is_allowed_and_ignored_where_it_is_masked(f: Filter, bad: float) -> None:
    logits = torch.arange(40.0).repeat(2, 1)
    logits[:, 20] = bad
    allowed = torch.ones(2, 40, dtype=torch.bool)
    allowed[1, 20] = False
    how = Rows.of([f, f], [1, 1], [2, 2])
    for mask in (packed(allowed), packed(allowed & (torch.arange(40) > 3))):
        ids = sample(logits, mask, how).ids
        assert ids[0] == -1
        assert ids[1] == draw(logits[1].masked_fill(~allowed[1], -math.inf), f, 1, 2)


def test_of_equals_the_lowest_allowed_id_is_taken() -> None:
    logits = torch.zeros(3, 100)
    logits[:, 50:] = 1.0
    allowed = torch.ones(3, 100, dtype=torch.bool)
    allowed[1, :60] = False
    allowed[2, :] = False
    allowed[2, 90:] = True
    assert sample(logits, packed(allowed), Rows.of([Filter()] * 3, [0] * 3, [0] * 3)).ids.tolist() == [50, 60, 90]


def test_an_empty_row_is_an_error_and_not_a_token() -> None:
    nothing = torch.full((4,), -math.inf)
    for f in (Filter(), Filter(temperature=1.0), Filter(temperature=1.0, top_p=0.5)):
        with pytest.raises(ValueError, match="no token is allowed"):
            draw(nothing, f, 0, 0)
        with pytest.raises(ValueError, match="not numbers"):
            draw(torch.tensor([0.0, math.nan, 1.0]), f, 0, 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"logits": torch.zeros(2, 40, dtype=torch.bfloat16)}, "logits"),
        ({"logits": torch.zeros(2, 1 << 19)}, "logits"),
        ({"logits": torch.zeros(40, 2).T}, "logits"),
        ({"mask": torch.zeros(2, 1, dtype=torch.int32)}, "mask"),
        ({"mask": torch.zeros(1, 2, dtype=torch.int32)}, "mask"),
        ({"mask": torch.zeros(2, 2, dtype=torch.int64)}, "mask"),
        ({"mask": torch.zeros(2, 4, dtype=torch.int32)[:, ::2]}, "mask"),
        ({"mask": torch.zeros(2, 2, dtype=torch.int32, device="meta")}, "mask"),
        ({"rows": Rows.of([Filter()], [0], [0])}, "rows"),
        ({"rows": Rows.of([Filter()] * 2, [0] * 2, [0] * 2, "meta")}, "rows"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name(change: dict[str, object], named: str) -> None:
    good = {
        "logits": torch.zeros(2, 40),
        "mask": torch.ones(2, 2, dtype=torch.int32),
        "rows": Rows.of([Filter()] * 2, [0, 1], [0, 1]),
    }
    sample(**good)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"^{named}: "):
        sample(**(good | change))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("f", "named"),
    [
        (Filter(temperature=math.nan), "temperature"),
        (Filter(temperature=-1.0), "temperature"),
        (Filter(top_k=-1), "top_k"),
        (Filter(top_p=1.5), "top_p"),
        (Filter(min_p=-0.1), "min_p"),
    ],
)
def test_a_filter_out_of_its_range_is_refused_by_name(f: Filter, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        Rows.of([f], [0], [0])
    with pytest.raises(ValueError, match="^seeds, positions: "):
        Rows.of([f, f], [0], [0, 1])


def test_repetition_penalty_is_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits = torch.randn(50) * 4
    seen = torch.tensor([1, 4, 30])
    want = RepetitionPenaltyLogitsProcessor(1.3)(seen[None], logits[None].clone())[0]
    penalize_(logits, seen, 1.3)
    assert torch.equal(logits, want)


def test_log_probabilities_are_the_log_softmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40)
    want = logits.log_softmax(-1)
    chosen, top = log_probabilities(logits, 7, 3)
    assert chosen == pytest.approx(float(want[7]), abs=1e-5)
    assert [t for t, _ in top] == want.topk(3).indices.tolist()
    assert [p for _, p in top] == pytest.approx(want.topk(3).values.tolist(), abs=1e-5)
    assert log_probabilities(logits, 7, 0)[1] == []


def test_log_probabilities_of_targets_are_log_softmax() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 20 + 1e4
    logits[2, 7] = math.inf * -1
    rows, tokens = torch.tensor([0, 2, 2, 2]), torch.tensor([49, 0, 7, 0])
    found = target_log_probabilities(logits, rows, tokens)
    assert torch.allclose(found, logits.double().log_softmax(-1)[rows, tokens].float(), atol=2e-3)  # ulp of 1e4
    assert found[2] == -math.inf
