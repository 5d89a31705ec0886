"""Sampling: filters against their definition by a full sort, noise against the distribution it must give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit.kernels.sample import (
    Filter,
    apply_mask_,
    apply_mask_reference,
    draw,
    gumbel,
    keep_reference,
    log_probabilities,
    penalize_,
)

filters = st.builds(
    Filter,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
)


@st.composite
def rows(draw: st.DrawFn) -> torch.Tensor:
    """Logits of one row: flat, peaked, with ties, with masked tokens; at least one is allowed."""
    size = draw(st.sampled_from([1, 2, 7, 300, 5000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(size, generator=generator) * draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]))
    if draw(st.booleans()):
        logits = logits.round()
    if draw(st.booleans()):
        logits[torch.rand(size, generator=generator) < 0.5] = -math.inf
        logits[draw(st.integers(0, size - 1))] = 1.0
    return logits


@given(logits=rows(), f=filters)
@settings(max_examples=300, deadline=None)
def test_only_kept_tokens_are_drawn_and_the_kept_set_is_the_definitions(logits: torch.Tensor, f: Filter) -> None:
    from agentkit.kernels.sample import _candidates  # pyright: ignore[reportPrivateUsage]

    kept = keep_reference(logits, f).nonzero().squeeze(-1)
    got = _candidates(logits, f)
    # Where a token sits on the edge to the last bit, the two summation orders may disagree about its equals.
    difference = set(kept.tolist()) ^ set(got.tolist())
    edge = logits[kept].min()
    assert all(abs(float(logits[t] - edge)) < 1e-4 for t in difference)
    assert draw(logits, f, 3, 4) in set(got.tolist())


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -math.inf])
    counts = np.bincount([draw(logits, Filter(temperature=1.0), 11, i) for i in range(20_000)], minlength=4)
    expected = logits.softmax(-1).numpy() * 20_000
    chi_square = float((((counts - expected) ** 2)[:3] / expected[:3]).sum())
    assert chi_square < 16.3  # 0.1 % point with two degrees of freedom is 13.8; one fixed seed, so no flake
    assert counts[3] == 0


def test_noise_is_uniform_and_independent_between_neighbours() -> None:
    tokens = torch.arange(50_000)
    uniform = torch.exp(-torch.exp(-gumbel(1, 2, tokens)))
    assert abs(float(uniform.mean()) - 0.5) < 0.005
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.003)
    for other in (gumbel(1, 3, tokens), gumbel(2, 2, tokens), gumbel(1, 2, tokens).roll(1)):
        correlation = torch.corrcoef(torch.stack([uniform, torch.exp(-torch.exp(-other))]))[0, 1]
        assert abs(float(correlation)) < 0.02


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000)
    f = Filter(temperature=1.0, top_p=0.95)
    first = [draw(logits, f, 7, i) for i in range(50)]
    torch.manual_seed(99)
    assert [draw(logits, f, 7, i) for i in range(50)] == first
    assert [draw(logits, f, 8, i) for i in range(50)] != first


@given(width=st.integers(1, 200), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_mask_in_place_equals_its_definition(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = -(-width // 32)
    mask = torch.randint(-(2**31), 2**31, (3, words), generator=generator, dtype=torch.int64).to(torch.int32)
    logits = torch.randn(3, width, generator=generator)
    want = apply_mask_reference(logits, mask)
    apply_mask_(logits, mask)
    assert torch.equal(logits, want)


def test_an_empty_row_is_an_error_and_not_a_token() -> None:
    nothing = torch.full((4,), -math.inf)
    for f in (Filter(), Filter(temperature=1.0), Filter(temperature=1.0, top_p=0.5)):
        with pytest.raises(ValueError, match="no token is allowed"):
            draw(nothing, f, 0, 0)
    with pytest.raises(ValueError, match="not numbers"):
        draw(torch.full((4,), math.nan), Filter(), 0, 0)


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
