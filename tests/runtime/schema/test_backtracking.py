"""Patterns that `re` may take exponential time for are told from those that it does not."""

from __future__ import annotations

import pytest

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.schema.backtracking import Patient, explosive, require_patient, search


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(a+)+$",
        r"^(a*)*$",
        r"^(a|a)*$",
        r"^(a|aa)+$",
        r"^(ab|a|b)+$",
        r"(.*a){12}",
        r"([a-z]{1,20}){9}",
        r"^(\w+\s?)+$",
        r"^(([a-z])+.)+[A-Z]([a-z])+$",
        r"((a?){0,5}b)*$",
        r"(?=(a+)+$)a",
    ],
)
def test_a_loop_that_reads_one_text_in_two_ways_is_found(pattern: str):
    assert explosive(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^([a-z]+-)*[a-z]+$",
        r"^[a-z]+( [a-z]+)*$",
        r"^(ab|ba)+$",
        r"^[a-f0-9]{64}$",
        r"a{1,20}b",
        r"^(a?){5}$",
        r"^([0-9]{1,3}\.){3}[0-9]{1,3}$",
        r"^((https?|ftp)://)?([a-z0-9-]+\.)+[a-z]{2,}(/.*)?$",
        r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2})?)?$",
        r"(a)\1",
    ],
)
def test_other_loops_are_let_alone(pattern: str):
    assert not explosive(pattern)


def test_what_could_take_for_ever_is_not_begun():
    assert search("^(a+)+$", "a" * 15)
    assert not search("b", "a" * 10_000)
    with pytest.raises(SchemaError, match="for ever"):
        search("^(a+)+$", "a" * 50 + "!")
    with pytest.raises(SchemaError, match="for ever"):
        Patient({"pattern": "^(a+)+$"}).is_valid("a" * 50 + "!")
    assert not Patient({"pattern": "^a+$"}).is_valid("b")


def test_a_pattern_to_judge_by_is_located():
    with pytest.raises(SchemaError) as caught:
        require_patient({"properties": {"a": {"patternProperties": {"^(x+)*$": {}}}}})
    assert caught.value.pointer == "/properties/a"
