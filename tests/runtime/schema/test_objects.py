"""Objects: which names and how many of them jsonschema allows is what can be written."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.schema.judged import Judged

NAMES = ["a", "b", "c", "ab"]
OTHERS = ["d", "x", "ax", "xb", "cd", "é", "a\n"]
PATTERNS = ["^a", "b$", "^[ab]+$", "c|d", "^x", "^a.$", "^(?!a)", "^a$", r"^\w$", r"\W"]
NAME_RULES: list[Any] = [
    *({"enum": ["a", "x", "d"]}, {"const": "a"}, {"pattern": "^[ab]"}, {"pattern": "^(?!a)"}, {"maxLength": 1}),
    *({"minLength": 2, "pattern": "b"}, {"type": "string"}, False, True),
]


def random_value_schema(rng: random.Random) -> Any:
    kinds: list[Any] = [True, {}, False, {"type": "integer"}, {"type": "string"}, {"type": ["integer", "string"]}]
    kinds += [{"enum": rng.sample([1, 2, "a", "b", None, True], 3)}, {"type": "integer", "maximum": 1}]
    return rng.choice(kinds)


def random_object(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_value_schema(rng) for name in rng.sample(NAMES, rng.randint(0, 4))},
        "patternProperties": {name: random_value_schema(rng) for name in rng.sample(PATTERNS, rng.randint(1, 2))},
        "additionalProperties": rng.choice([False, random_value_schema(rng)]),
        "required": rng.sample([*NAMES, "d"], rng.randint(0, 2)),
        "minProperties": rng.randint(0, 3),
        "maxProperties": rng.randint(0, 4),
        "propertyNames": rng.choice(NAME_RULES),
    }
    likely = {"type": 0.8, "properties": 0.7, "additionalProperties": 0.6}
    return {key: value for key, value in given.items() if rng.random() < likely.get(key, 0.35)}


def in_order(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Keys as they are written: declared ones, required ones, listed ones, those with a pattern, others."""
    names = schema.get("propertyNames")
    listed = names.get("enum", [names.get("const")]) if isinstance(names, dict) else []
    declared = [*schema.get("properties", {}), *schema.get("required", []), *listed]

    def rank(name: str) -> int:
        if name in declared:
            return declared.index(name)
        return 100 if any(re.search(pattern, name) for pattern in schema.get("patternProperties", {})) else 200

    return {name: value[name] for name in sorted(value, key=rank)}


@given(st.integers(0, 100_000))
@settings(max_examples=150, deadline=None)
def test_any_object_agrees_with_jsonschema(seed: int):
    rng = random.Random(seed)
    schema = random_object(rng)
    judged = Judged(schema)
    assert not judged.refusal or "nsatisfiable" in judged.refusal, judged.refusal
    values: list[Any] = [None, 3]
    for _ in range(15):
        names = rng.sample([*NAMES, *OTHERS], rng.randint(0, 4))
        values.append(in_order({name: rng.choice([1, 2, "a", "b", None, True]) for name in names}, schema))
    wrong = judged.wrong(values)
    # Names in which only Python's reading finds a pattern may be refused.
    assert not [one for one in wrong if "not accepted" not in one or ("é" not in one and "\\n" not in one)], judged.part


@pytest.mark.parametrize(
    ("schema", "accepted", "refused"),
    [
        ({"properties": {"a": {}, "b": {}}, "minProperties": 1, "additionalProperties": False}, {"b": 1}, {}),
        ({"properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2}, {"a": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}),
        ({"properties": {"a": {}}, "minProperties": 1}, {"d": 1}, {}),
        ({"properties": {"a": {"type": "null"}}, "propertyNames": {"pattern": "^.$"}}, {"a": None}, {"bc": 1}),
        ({"patternProperties": {"^a": {"type": "integer"}, "b$": {"maximum": 3}}}, {"ab": 3}, {"ab": 4}),
        (
            {"patternProperties": {"^a": {"type": "integer"}}, "properties": {"ab": {"maximum": 3}}},
            {"ab": 3},
            {"ab": 4},
        ),
        ({"patternProperties": {"^(?!x)": {"type": "null"}}, "additionalProperties": False}, {"a": None}, {"x": None}),
        ({"required": ["a"], "additionalProperties": {"type": "null"}}, {"a": None}, {"a": 1}),
    ],
)
def test_names_and_counts_are_exact(schema: dict[str, Any], accepted: Any, refused: Any):
    judged = Judged({"type": "object", **schema})
    assert judged.status == "exact"
    assert judged.wrong([accepted, refused]) == []
    assert (judged.validator.is_valid(accepted), judged.validator.is_valid(refused)) == (True, False)


def test_listed_names_close_an_object_and_cannot_be_repeated():
    judged = Judged({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "null"}})
    assert judged.notes == []
    assert not judged.accepts('{"a": null, "a": null}')


def test_names_that_are_counted_and_could_be_repeated_are_verified():
    judged = Judged({"type": "object", "minProperties": 2})
    assert [note[:2] for note in judged.notes] == [("minProperties", "verified")]
    assert judged.accepts('{"a": null, "a": null}')
    assert Judged({"type": "object", "minProperties": 1}).notes == []


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"properties": {"a": {"type": "null"}}}, r"\u0061"),
        ({"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}}, r"\u0061"),
        ({"properties": {"a\n": {"type": "null"}}}, r"a\u000a"),
        ({"patternProperties": {"^a": {"type": "null"}}}, r"\u0061b"),
        ({"patternProperties": {"^a": {"type": "null"}}, "additionalProperties": {"type": "integer"}}, r"\u0061b"),
    ],
)
def test_a_declared_name_cannot_hide_in_escapes(schema: dict[str, Any], name: str):
    judged = Judged({"type": "object", **schema})
    assert judged.notes == []
    assert judged.wrong_texts([f'{{"{name}": 1}}', '{"b": 1}', '{"b/c d": 1}']) == []
    assert judged.accepts('{"b": 1}')


def test_a_declared_name_that_could_hide_in_escapes_is_verified():
    judged = Judged({"properties": {str(i): {"type": "null"} for i in range(9)}, "additionalProperties": {"const": 1}})
    assert [note[:2] for note in judged.notes] == [("additionalProperties", "verified")]


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"propertyNames": {"anyOf": [{"pattern": "^a"}]}}, "propertyNames"),
        ({"patternProperties": {r"(a)\1": {"type": "null"}}, "additionalProperties": False}, "patternProperties"),
        ({"properties": {str(i): {"type": "null"} for i in range(20)}, "maxProperties": 3}, "maxProperties"),
        (
            {
                "patternProperties": {"^a": {"type": "object", "minProperties": 1}},
                "properties": {"ab": {"type": "object", "properties": {"c": {"type": "null"}}}},
            },
            "patternProperties",
        ),
    ],
)
def test_what_is_too_much_for_a_grammar_is_verified(schema: dict[str, Any], keyword: str):
    judged = Judged({"type": "object", **schema})
    assert judged.refusal == ""
    assert keyword in [note[0] for note in judged.notes if note[1] == "verified"]


def test_object_keywords_say_nothing_about_other_types():
    assert Judged({"type": "null", "minProperties": 3, "patternProperties": {r"(a)\1": {}}}).part == {"type": "null"}
