"""Completions: any unfinished output can be closed, and within any budget that the shortest document fits."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema.validators import validator_for

from agentkit.runtime.closing import Closer, Context, Hints, completes, example
from agentkit.runtime.errors import CapacityError
from agentkit.runtime.grammar import ChoiceSpec, Grammar, GrammarCompiler, GrammarSpec, JsonSpec, RegexSpec
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import open_checkpoint
from tests.qwen import qwen_folder
from tests.runtime.schemas import random_output, random_schema
from tests.smol import smol_path

QWEN = Vocabulary.from_folder(qwen_folder())
SMOL = open_checkpoint(smol_path()).vocabulary()
PADDED = 151_936
COMPILER = GrammarCompiler(QWEN, PADDED)
SMALL = GrammarCompiler(SMOL, SMOL.size)
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                "right": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "left", "right"],
            "additionalProperties": False,
        }
    },
}


def compiled(schema: dict[str, Any], style: Any = "document") -> Grammar:
    return COMPILER.submit(JsonSpec(json.dumps(schema), style)).result()


def completed(grammar: Grammar, text: str) -> str:
    """`text` and the completion found after it."""
    matcher = grammar.matcher()
    assert all(map(matcher.advance, QWEN.encode(text)))
    ids = matcher.completion(200)
    assert ids is not None
    assert completes(matcher, ids)
    return text + QWEN.decode(ids)


def faults(schema: dict[str, Any], text: str) -> list[str]:
    validator = validator_for(schema)
    checked = validator(schema, format_checker=validator.FORMAT_CHECKER)
    return [fault.message for fault in checked.iter_errors(json.loads(text))]


@pytest.mark.parametrize(
    ("compiler", "vocab", "size"), [(COMPILER, QWEN, PADDED), (SMALL, SMOL, SMOL.size)], ids=["qwen3", "smollm2"]
)
@given(st.integers(0, 100_000))
@settings(max_examples=60, deadline=None)
def test_random_outputs_within_random_budgets_are_whole_and_valid(
    compiler: GrammarCompiler, vocab: Vocabulary, size: int, seed: int
):
    rng = random.Random(seed)
    schema = random_schema(rng)
    grammar = compiler.submit(JsonSpec(json.dumps(schema), rng.choice(["call", "document"]))).result()
    budget = grammar.minimum + rng.choice([0, 1, 4, 30, 120])
    ids = random_output(grammar, rng, budget, size)
    assert len(ids) <= budget
    assert not faults(schema, vocab.decode(ids))

    matcher = grammar.matcher()
    cut = rng.randint(0, len(ids))
    assert all(map(matcher.advance, ids[:cut]))
    rest = matcher.completion(2000)
    assert rest is not None
    assert not faults(schema, vocab.decode([*ids[:cut], *rest]))


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string", "minLength": 300}, '"ab'),
        ({"type": "string"}, '"ab\\'),
        ({"type": "string"}, '"ab\\u00'),
        ({"type": "number"}, "-"),
        ({"type": "number"}, "12."),
        ({"type": "number", "minimum": 1000, "maximum": 2000}, "1"),
        ({"type": "string", "pattern": r"^[A-Z]{2}-\d{4,}$"}, '"A'),
        ({"type": "string", "pattern": r"^[a-z]+(-[a-z]+){3}@x\.(org|com)$"}, '"abc-de-'),
        ({"type": "string", "format": "date-time"}, '"2024-0'),
        (
            {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "minItems": 3}, "minItems": 4},
            "[[1",
        ),
        ({"enum": ["one", "other", "最後"]}, '"o'),
        (TREE, '{"value": 1, "left": {"value": 2, "left": {"value": 3'),
    ],
)
def test_awkward_places_are_left(schema: dict[str, Any], text: str):
    assert not faults(schema, completed(compiled(schema), text))


def test_a_recursive_branch_is_not_followed():
    grammar = compiled(TREE, "call")
    assert completed(grammar, "") == '{"value": 0, "left": null, "right": []}'


def test_a_long_format_after_a_recursive_branch_is_reached():
    """Going into the branch again and again must not look better than writing the 36 characters of the format."""
    tree = {
        "type": "object",
        "properties": {
            "value": {"type": "string", "pattern": "^[ä-ü]{2,3}$"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
            "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
        },
        "required": ["next", "value"],
        "additionalProperties": False,
    }
    schema = {
        "type": "object",
        "properties": {"first": {"$ref": "#/$defs/tree"}, "id": {"type": "string", "format": "uuid"}},
        "required": ["first", "id"],
        "additionalProperties": False,
        "$defs": {"tree": tree},
    }
    for compiler, vocab in ((COMPILER, QWEN), (SMALL, SMOL)):
        grammar = compiler.submit(JsonSpec(json.dumps(schema), "document")).result()
        text = vocab.decode(grammar.matcher().completion(2000) or [])
        assert not faults(schema, text)
        assert json.loads(text)["first"]["next"] is None


def test_optional_members_are_left_out():
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    assert completed(compiled(schema), "") == "{}"
    assert completed(compiled(schema), '{"a": "x') == '{"a": "x"}'


@pytest.mark.parametrize(
    ("spec", "text", "whole"),
    [
        (ChoiceSpec(("yes", "yes please", "no thanks")), "yes ", "yes please"),
        (RegexSpec(r"\d{3}-[a-z]+@x\.com"), "12", r"\d{3}-[a-z]+@x\.com"),
        (RegexSpec(r"(foo|bar){2,}!"), "ba", r"(foo|bar){2,}!"),
    ],
)
def test_other_grammars_are_completed(spec: GrammarSpec, text: str, whole: str):
    grammar = COMPILER.submit(spec).result()
    assert re.fullmatch(whole, completed(grammar, text))


def test_no_completion_is_longer_than_the_limit():
    matcher = compiled(TREE).matcher()
    shortest = matcher.completion(100)
    assert shortest is not None
    assert matcher.completion(len(shortest) - 3) is None


def test_a_complete_output_needs_nothing():
    matcher = compiled({"type": "integer"}).matcher()
    assert matcher.advance(QWEN.encode("4")[0])
    assert matcher.completion(0) == []


def test_a_token_that_leaves_no_room_is_refused_and_the_output_closed():
    grammar = compiled(TREE, "call")
    matcher = grammar.matcher()
    for token in QWEN.encode('{"value": 1, "left":'):
        assert matcher.advance(token)
    closer = Closer(matcher, grammar.reserve)
    opening, nothing = QWEN.encode(" {")[0], QWEN.encode(" null")[0]
    room = len(matcher.completion(100) or [])
    assert closer.admit(opening, 100) is None
    assert closer.admit(nothing, room) is None
    closing = closer.admit(opening, room)
    assert closing is not None
    assert len(closing) <= room
    assert completes(matcher, closing)


def test_where_nothing_fits_there_is_an_error_and_no_silence():
    grammar = compiled(TREE, "call")
    closer = Closer(grammar.matcher(), grammar.reserve)
    with pytest.raises(CapacityError, match="max_tokens"):
        closer.admit(grammar.matcher().forced()[0], 3)


def test_far_from_the_end_of_the_budget_nothing_is_searched():
    grammar = compiled({"type": "string"})
    matcher = grammar.matcher()
    closer = Closer(matcher, grammar.reserve)
    assert closer.admit(0, grammar.reserve + 1) is None  # not even that the token is legal
    with pytest.raises(ValueError, match="not legal"):
        closer.admit(0, grammar.reserve)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    ),
    st.data(),
)
@settings(max_examples=60)
def test_the_context_is_that_of_the_whole_text_however_it_is_cut(value: Any, data: st.DataObject):
    text = json.dumps(value, indent=data.draw(st.sampled_from([None, 1]))).encode()
    cut = data.draw(st.integers(0, len(text)))
    stepwise = Context().after(text[:cut])
    assert Context.of(text[:cut])[:3] == stepwise[:3]
    assert stepwise.after(text[cut:])[:3] == (0, False, False)


def test_json_after_free_text_begins_at_the_last_marker():
    hints = Hints(json=True, marker="<call>\n")
    assert hints.context(b'She said: "') is None
    assert hints.context(b'She said: "<call>\n{"a": ') == Context.of(b'{"a": ')
    assert hints.context(b'{"a": "') == Context.of(b'{"a": "')


@pytest.mark.parametrize(
    "pattern",
    [
        r"^[a-z]+$",
        r"^[A-Z]{2}-\d{2,4}$",
        r"^(north|south)-[0-9a-f]{4}$",
        r"^\S+@\S+\.(com|org)$",
        r"^a(?:b(c|d){2}){1,3}?x+$",
        r"^https?:\/\/.*$",
        r"^[\w.:-]+$",
        r"^A\x42\s\W$",
        r"^(?P<y>\d{4})-\d\d$",
    ],
)
def test_an_example_matches_its_pattern(pattern: str):
    assert re.search(pattern, example(pattern))
