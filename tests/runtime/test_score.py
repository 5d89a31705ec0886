"""Options as a tree: what is computed for them, and that the answers find their way back."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from agentkit.runtime.request import Usage
from agentkit.runtime.score import Continuations, Options, Scored

PROMPT = [90, 91, 92]
options = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=1, max_size=8)


def log_probability(before: tuple[int, ...], token: int) -> float:
    """Of a model that is told apart by everything it has read."""
    return -float(hash((before, token)) % 100_003)


@given(options=options)
def test_every_option_gets_its_own_log_probabilities_and_every_row_is_computed_once(
    options: list[tuple[int, ...]],
) -> None:
    tree = Options(options)
    rows: list[tuple[int, ...]] = []
    for branch in tree.branches():
        request = branch.request(PROMPT, "")
        assert request.targets is not None
        asked: list[float] = []
        for at, tokens in enumerate(request.targets.tokens, request.targets.first):
            before = tuple(request.ids[: at + 1])
            rows.append(before)
            asked += [log_probability(before, token) for token in tokens]
        assert at + 1 == len(request.ids)
        branch.take(asked)
    inner = {(*PROMPT, *option[:size]) for option in options for size in range(len(option))}
    assert len(rows) == len(inner)
    assert set(rows) == inner
    for option, found in zip(options, tree.logprobs(), strict=True):
        want = [log_probability((*PROMPT, *option[:at]), token) for at, token in enumerate(option)]
        assert list(found) == want


def test_the_longest_option_goes_with_the_prompt() -> None:
    first, *others = Options([(1, 9), (2, 3, 4, 9), (2, 3, 9), (1, 9)]).branches()
    assert first.tokens == (2, 3, 4)
    assert [branch.tokens for branch in others] == [(1,)]  # "2 3" is on the way of the longest


def test_totals_add_up() -> None:
    assert Scored((-0.1,) * 10, Usage()).total == -1.0
    assert Continuations(((-1.0, -2.0), (-0.5,)), Usage()).totals == (-3.0, -0.5)
    assert math.isclose(Scored((), Usage()).total, 0.0)
