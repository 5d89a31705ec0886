"""Numbers: what is written under bounds and divisors is what jsonschema takes for valid, rounding included."""

from __future__ import annotations

import math
import random
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.schema.judged import Judged

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
FRACTIONS = (0.5, -1.5, 0.1, 0.25, 2.75, 3.14, 1e-7, 0.1234567, -0.3, 123456.789)
LARGE = (1e6, 1e9, 1e12, 1e15, -1e15, 1e16, 2**53 + 1, -(2**53) - 1, 2**60 + 1, 10**18, 10**19, 1e300, -1e300, 2**63)
DIVISORS = (1, 2, 7, 0.5, 0.25, 0.75, 0.1, 0.01, 1e-9, 0.07, 2.0, 1.5, 10**10, 5e-324)


def random_bound(rng: random.Random) -> float:
    return rng.choice([rng.randint(-5, 5), rng.randint(-100, 100), rng.choice(FRACTIONS), rng.choice(LARGE)])


def digits(value: float) -> str:
    return str(value) if isinstance(value, int) else format(Decimal(repr(value)), "f")


def near(value: float) -> list[float]:
    """A bound and what lies about it."""
    beside = [math.nextafter(value, end) for end in (-math.inf, math.inf)] if isinstance(value, float) else []
    return [value, value - 1, value + 1, value - 0.5, value + 0.5, *beside]


def of_ours(text: str, kind: str) -> bool:
    """Whether digits are beyond bounds of ours: 9 places, 15 digits; an integer has no fraction."""
    whole, _, fraction = text.lstrip("-").partition(".")
    if kind == "integer":
        return bool(fraction) or len(whole) > 15
    return len(fraction) > 9 or fraction.endswith("0") or len((whole + fraction).strip("0")) >= 15 or len(whole) > 15


@given(st.integers(0, 100_000))
@settings(max_examples=200, deadline=None)
def test_any_bounds_and_divisor_agree_with_jsonschema(seed: int):
    rng = random.Random(seed)
    kind = rng.choice(["integer", "number"])
    schema: dict[str, Any] = {"type": kind}
    schema |= {key: random_bound(rng) for key in BOUNDS if rng.random() < 0.35}
    if rng.random() < 0.3:
        schema["multipleOf"] = rng.choice(DIVISORS)
    judged = Judged(schema)
    values = [value for key in BOUNDS if key in schema for value in near(schema[key])]
    values += [rng.randint(-10, 10), rng.randint(0, 1000) / 100, rng.randint(0, 99) * 0.25, 2**53 + 1, 10**15]
    texts = [digits(value) for value in values if abs(value) < 1e25]
    texts += [text + more for text in texts if "." in text for more in ("0", "9" * 20, "0" * 20 + "1")]
    if judged.status == "refused":
        return
    wrong = judged.wrong_texts(texts)
    assert not [one for one in wrong if "not accepted" not in one or not of_ours(one.split()[0], kind)], judged.part


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"exclusiveMaximum": 1, "exclusiveMinimum": 0}, "0.99999999999999999999"),  # reads as 1.0
        ({"exclusiveMaximum": 1e9}, "999999999.999999999"),
        ({"exclusiveMinimum": 0, "maximum": 0.25}, "0"),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, "-1"),
        ({"type": "integer", "minimum": 2**53 + 1}, str(2**53)),
        ({"const": 2**53 + 1}, str(2**53)),
        ({"enum": [1e30, 1]}, str(10**30)),
    ],
)
def test_digits_that_llguidance_alone_would_admit_are_refused(schema: dict[str, Any], text: str):
    judged = Judged({"type": "number", **schema})
    assert judged.wrong_texts([text]) == []
    assert not judged.accepts(text) or judged.status == "verified"


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"maximum": 3.14}, ["3.1", "3.14", "3"]),
        ({"minimum": -1.25}, ["-1.2", "-1.25"]),
        ({"multipleOf": 0.25}, ["0.5", "0.75", "2"]),
        ({"minimum": 2 * 10**18, "type": "integer"}, ["2" + "0" * 18]),
        ({"maximum": 1e300}, ["5", "-2.5"]),
    ],
)
def test_digits_that_llguidance_alone_would_refuse_are_admitted(schema: dict[str, Any], texts: list[str]):
    judged = Judged({"type": "number", **schema})
    assert [judged.accepts(text) for text in texts] == [True] * len(texts)
    assert judged.status == "exact"


@pytest.mark.parametrize(
    ("schema", "status"),
    [
        ({"type": "number", "multipleOf": 0.01}, "verified"),  # 0.07 / 0.01 is 7.000000000000001
        ({"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 0.05}, "exact"),
        ({"type": "integer", "multipleOf": 0.01, "minimum": 0, "maximum": 1000}, "exact"),
        ({"type": "number", "multipleOf": 0.125}, "exact"),
        ({"type": "number", "multipleOf": 0.07}, "verified"),
        ({"type": "integer", "multipleOf": 5_000_000_000}, "verified"),
        ({"type": "number", "minimum": 1e300}, "refused"),
        ({"type": "integer", "maximum": -(10**19)}, "refused"),
        ({"const": 10**25}, "refused"),
        ({"type": "string", "multipleOf": 0.01, "minimum": 1e300}, "exact"),
    ],
)
def test_a_number_is_exact_verified_or_refused(schema: dict[str, Any], status: str):
    assert Judged(schema).status == status
