"""Arrays: distinct items, and items of which some must be of a kind."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.schema.judged import Judged


def random_item_schema(rng: random.Random) -> Any:
    kinds: list[Any] = [True, {"type": "integer"}, {"type": "boolean"}, {"type": ["integer", "string"]}, False]
    kinds += [{"enum": rng.sample([1, 2, "a", "b", None, True], rng.randint(1, 4))}, {"const": "a"}]
    return rng.choice(kinds)


def random_array(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {
        "type": "array",
        "items": random_item_schema(rng),
        "prefixItems": [random_item_schema(rng) for _ in range(rng.randint(1, 3))],
        "minItems": rng.randint(0, 3),
        "maxItems": rng.choice([0, 1, 2, 3, 4, 5, 2.0]),
        "uniqueItems": rng.random() < 0.8,
        "contains": random_item_schema(rng),
        "minContains": rng.randint(0, 2),
        "maxContains": rng.randint(0, 3),
    }
    likely = {"type": 0.8, "items": 0.6, "prefixItems": 0.3, "minItems": 0.3, "minContains": 0.2, "maxContains": 0.2}
    return {key: value for key, value in given.items() if rng.random() < likely.get(key, 0.5)}


@given(st.integers(0, 100_000))
@settings(max_examples=150, deadline=None)
def test_any_array_agrees_with_jsonschema(seed: int):
    rng = random.Random(seed)
    judged = Judged(random_array(rng))
    assert not judged.refusal or "nsatisfiable" in judged.refusal, judged.refusal
    values: list[Any] = [None, "a"]
    values += [rng.choices([1, 2, "a", "b", None, True], k=rng.randint(0, 4)) for _ in range(20)]
    assert judged.wrong(values) == [], judged.part


@pytest.mark.parametrize("bounds", [{}, {"minItems": 2}, {"maxItems": 2}, {"minItems": 1, "maxItems": 3}])
def test_distinct_items_of_a_small_enum_are_exact(bounds: dict[str, int]):
    judged = Judged({"type": "array", "items": {"enum": ["a", 1, None, 1.0]}, "uniqueItems": True, **bounds})
    assert judged.notes == []
    values = [list(items) for size in range(5) for items in product(["a", 1, None], repeat=size)]
    assert judged.wrong(values) == []
    assert judged.accepts('["a", 1]')


def test_an_item_that_must_be_there_is_exact_in_a_short_array():
    judged = Judged({"type": "array", "items": {"enum": [1, 2, 3]}, "contains": {"const": 2}, "maxItems": 4})
    assert judged.notes == []
    assert judged.wrong([list(items) for size in range(6) for items in product([1, 2, 3], repeat=size)]) == []


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"uniqueItems": False}, {}),
        ({"uniqueItems": True, "maxItems": 1}, {"maxItems": 1}),
        ({"items": {"type": "null"}, "contains": {"type": "null"}, "maxContains": 2}, {"minItems": 1, "maxItems": 2}),
        ({"contains": True, "minContains": 2}, {"minItems": 2}),
        ({"contains": {"type": "null"}, "minContains": 0}, {}),
        ({"minItems": 2.0}, {"minItems": 2}),
    ],
)
def test_what_says_little_is_said_by_bounds(schema: dict[str, Any], part: dict[str, Any]):
    judged = Judged({"type": "array", **schema})
    assert {key: judged.part[key] for key in judged.part if key not in ("type", "items")} == part
    assert judged.status == "exact"


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
        ({"items": {"enum": list(range(9))}, "uniqueItems": True}, "uniqueItems"),
        ({"contains": {"const": 1}}, "contains"),
        ({"contains": {"const": 1}, "maxContains": 1, "maxItems": 3}, "maxContains"),
        ({"prefixItems": [{"const": 1}], "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_what_cannot_be_written_out_is_verified(schema: dict[str, Any], keyword: str):
    judged = Judged({"type": "array", **schema})
    assert judged.refusal == ""
    assert [note[0] for note in judged.notes if note[1] == "verified" and "twice" not in note[2]] == [keyword]


def test_distinct_items_of_a_large_enum_are_no_more_than_it_has():
    judged = Judged({"type": "array", "items": {"enum": list(range(9))}, "uniqueItems": True})
    assert judged.part["maxItems"] == 9


def test_array_keywords_say_nothing_about_other_types():
    assert Judged({"type": "null", "uniqueItems": True, "contains": {}}).part == {"type": "null"}
    judged = Judged({"items": {"enum": [1, 2]}, "uniqueItems": True})
    assert judged.wrong([None, "a", 3, {"a": 1}, [1, 2], [1, 1]]) == []
