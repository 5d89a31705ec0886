"""Automata: complements and conjunctions of patterns are those of Python's `re`."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit.runtime.schema.automaton import listed, searched
from agentkit.runtime.schema.patterns import Untranslatable

ATOMS = ["a", "b", "c", ".", "[ab]", "[^a]", "ab", "(?:a|bc)", "a*", "b+", "c{1,2}", "(?:ab)*", "^", "$", "(?:a$|b)"]


def random_pattern(rng: random.Random) -> str:
    pattern = "".join(rng.choices(ATOMS, k=rng.randint(1, 4)))
    return rng.choice(["", "^", "^(?!b)", "^(?=a)"]) + pattern + rng.choice(["", "$"])


@given(st.integers(0, 100_000))
@settings(max_examples=80, deadline=None)
def test_patterns_of_automata_match_what_they_should(seed: int):
    rng = random.Random(seed)
    one, other = random_pattern(rng), random_pattern(rng)
    texts = ["".join(rng.choices("abcx", k=rng.randint(0, 5))) for _ in range(60)]
    first, second = searched(one), searched(other)
    for automaton, holds in [
        (first, lambda text: bool(re.search(one, text))),
        (first.others(), lambda text: not re.search(one, text)),
        (first.both(second), lambda text: bool(re.search(one, text) and re.search(other, text))),
        (first.minus(second), lambda text: bool(re.search(one, text) and not re.search(other, text))),
        (first.minus(listed(texts[:3])), lambda text: bool(re.search(one, text)) and text not in texts[:3]),
    ]:
        wanted = [text for text in texts if holds(text)]
        assert automaton.empty <= (not wanted)
        if not automaton.empty:
            pattern = automaton.pattern()
            assert [text for text in texts if re.search(pattern, text)] == wanted, (one, other, pattern)


def test_a_text_that_no_pattern_matches_is_empty():
    assert searched("^a^b").empty
    assert searched("^a").both(searched("^b")).empty
    with pytest.raises(Untranslatable, match="no text"):
        searched("a$b").pattern()


@pytest.mark.parametrize(
    "pattern",
    [
        "^(?!.*a.{9}b)",
        "^(?!.*(?:a.{3}b|c.{3}d|e.{3}f))",
        "^(?!(?:a{1000}){1000})",
        "^(?!" + "|".join(f"word{i}x{i * 7}" for i in range(400)) + ")",
        "(" * 20_000 + ")" * 20_000,
    ],
)
def test_a_pattern_that_would_take_long_is_given_up(pattern: str):
    begun = time.process_time()
    with pytest.raises(Untranslatable, match="size"):
        searched(pattern).others().pattern()
    assert time.process_time() - begun < 5
