"""What holds of every grammar and every output: replay, bounds, and that no valid document is kept out."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema.validators import validator_for

from agentkit.runtime.closing import Context
from agentkit.runtime.grammar import Grammar, GrammarCompiler, JsonSpec, Matcher
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import open_checkpoint
from tests.qwen import qwen_folder
from tests.runtime.schemas import Bigrams, legal_ids, random_output, random_schema
from tests.smol import smol_path

QWEN = Vocabulary.from_folder(qwen_folder())
SMOL = open_checkpoint(smol_path()).vocabulary()
PADDED = 151_936
COMPILER = GrammarCompiler(QWEN, PADDED)
SMALL = GrammarCompiler(SMOL, SMOL.size)
DIGITS = [QWEN.encode(character)[0] for character in "0123456789-.eE"]
SEEDS = st.integers(0, 100_000)
DOCUMENTS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}, {"city": "Åarhus ✈ 東京"}),
    ({"type": "object", "properties": {"unit": {"enum": ["°C", "°F", None]}}}, {"unit": None}),
    ({"type": "object", "additionalProperties": {"type": "number"}}, {"": 0, "a b": -1.5, 'say "hi"': 1e3, "é": 0.001}),
    ({"type": "array", "items": {"type": ["integer", "null"]}, "minItems": 2}, [0, None, -999_999_999, 17]),
    ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False}, ["\\n\t/", 4]),
    ({"type": "string", "pattern": r"^[A-Z]{2}-\d{2,4}$"}, "DK-0042"),
    ({"type": "string", "minLength": 3, "maxLength": 5}, "日本語🫨"),
    ({"type": "string", "format": "date-time"}, "2024-02-29T23:59:59.25+05:30"),
    (
        {"anyOf": [{"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]}, {"type": "null"}]},
        None,
    ),
    ({}, {"any": [{"thing": [[[]]]}, True, "", 12.75], "": {}}),
    ({"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}}, {"next": {"next": {}}}),
    ({"type": "integer", "minimum": 1990, "maximum": 2030, "multipleOf": 5}, 2025),
]


def compiled(schema: dict[str, Any], style: Any = "document", compiler: GrammarCompiler = COMPILER) -> Grammar:
    return compiler.submit(JsonSpec(json.dumps(schema), style)).result()


def faults(schema: dict[str, Any], text: str) -> list[str]:
    validator = validator_for(schema)
    checked = validator(schema, format_checker=validator.FORMAT_CHECKER)
    return [fault.message for fault in checked.iter_errors(json.loads(text))]


def excluded(grammar: Grammar, ids: list[int]) -> str | None:
    """What precedes the first of `ids` that the masks exclude, or the whole text if it may not end there."""
    matcher = grammar.matcher()
    for at, token in enumerate([*ids, QWEN.end_id]):
        if token not in legal_ids(matcher, PADDED) or not matcher.advance(token):
            return QWEN.decode(ids[:at])
    return None


def wander(grammar: Grammar, rng: random.Random, steps: int) -> tuple[Matcher, list[int]]:
    """A state that random legal ids lead to, and those ids."""
    matcher, ids = grammar.matcher(), list[int]()
    for _ in range(steps):
        legal = [int(i) for i in legal_ids(matcher, PADDED) if i not in QWEN.end_ids]
        if not legal:
            break
        ids.append(rng.choice(legal))
        assert matcher.advance(ids[-1])
    return matcher, ids


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_a_state_is_that_of_its_ids_whatever_was_taken_and_undone(seed: int):
    rng = random.Random(seed)
    grammar = compiled(random_schema(rng), rng.choice(["call", "document"]))
    matcher, ids = grammar.matcher(), list[int]()
    for _ in range(25):
        if rng.random() < 0.35:
            undone = rng.randint(0, min(len(ids), rng.choice([1, 4, 25])))
            matcher.rollback(undone)
            ids = ids[: len(ids) - undone]
        else:
            legal = legal_ids(matcher, PADDED).tolist()
            for token in matcher.forced() or ([rng.choice(legal)] if legal else []):
                assert matcher.advance(token)
                ids.append(token)
    replayed = grammar.matcher()
    assert all(map(replayed.advance, ids))
    assert np.array_equal(legal_ids(matcher, PADDED), legal_ids(replayed, PADDED))
    assert (matcher.forced(), matcher.can_stop(), matcher.finished()) == (
        replayed.forced(),
        replayed.can_stop(),
        replayed.finished(),
    )


def write_documents(count: int) -> None:
    """`count` documents by a random model at temperature 2, at budgets from the minimum up."""
    model = Bigrams(SMOL.size, seed=20261126, temperature=2.0)
    for seed in range(count):
        rng = random.Random(seed)
        schema = random_schema(rng)
        grammar = compiled(schema, rng.choice(["call", "document"]), SMALL)
        budget = grammar.minimum + rng.choice([0, 0, 1, 4, 30, 120])
        ids = random_output(grammar, rng, budget, SMOL.size, model)
        assert len(ids) <= budget, seed
        assert not faults(schema, SMOL.decode(ids)), seed


def test_what_a_random_model_writes_is_whole_and_valid():
    write_documents(60)


@pytest.mark.slow
def test_ten_thousand_documents_of_a_random_model_are_whole_and_valid():
    write_documents(10_000)


@pytest.mark.parametrize(("schema", "value"), DOCUMENTS)
def test_no_mask_excludes_what_a_valid_document_needs(schema: dict[str, Any], value: Any):
    assert not faults(schema, json.dumps(value))
    assert excluded(compiled(schema), QWEN.encode(json.dumps(value, ensure_ascii=False))) is None


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_document_may_be_written_as_json_writes_it(seed: int):
    """Whatever tokens it was drawn in, its usual text in its usual tokens is admitted too."""
    rng = random.Random(seed)
    grammar = compiled(random_schema(rng))
    drawn = json.loads(QWEN.decode(random_output(grammar, rng, grammar.minimum + 40, PADDED)))
    text = json.dumps(drawn, ensure_ascii=False)
    if "e-" not in text and "\x7f" not in text and QWEN.decode(QWEN.encode(text)) == text:
        assert excluded(grammar, QWEN.encode(text)) is None, text


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_white_space_ends_wherever_it_begins(seed: int):
    rng = random.Random(seed)
    matcher, ids = wander(compiled(random_schema(rng)), rng, rng.randint(0, 10))
    if Context.of(b"".join(map(QWEN.token_bytes, ids))).string:
        return
    blank = 0
    while blanks := [i for i in legal_ids(matcher, PADDED).tolist() if QWEN.token_bytes(i).isspace()]:
        token = max(blanks, key=lambda i: (len(QWEN.token_bytes(i)), i))
        blank += len(QWEN.token_bytes(token))
        assert blank <= 25
        assert matcher.advance(token)


@pytest.mark.parametrize("schema", [{"type": "number"}, {"type": "integer"}, {"type": "number", "minimum": 0.5}])
@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_digits_end(schema: dict[str, Any], seed: int):
    rng = random.Random(seed)
    matcher, written = compiled({"type": "array", "items": schema, "minItems": 1}).matcher(), b""
    assert matcher.advance(QWEN.encode("[")[0])
    while legal := [i for i in DIGITS if matcher.validate([i])]:
        token = rng.choice(legal)
        assert matcher.advance(token)
        written += QWEN.token_bytes(token)
        assert len(written) <= 40


@pytest.mark.parametrize(
    ("schema", "begun"),
    [
        ({"type": "string", "minLength": 6}, "abc"),
        ({"type": "string", "pattern": r"^[a-z]{3}-\d{2}$"}, "abc-1"),
        ({"enum": ["abcdef", "abcxyz"]}, "abc"),
        ({"type": "string", "format": "date"}, "2024-0"),
        ({"type": "string", "format": "uuid"}, "00000000-0000-4000"),
        ({"type": "string", "pattern": '^say "[a-z]+"$'}, "say"),
    ],
)
def test_a_quote_cannot_close_a_string_too_early(schema: dict[str, Any], begun: str):
    matcher = compiled({"type": "array", "items": schema, "minItems": 1}).matcher()
    assert all(map(matcher.advance, QWEN.encode('["' + begun)))
    for token in legal_ids(matcher, PADDED).tolist():
        text = QWEN.token_bytes(token).decode(errors="replace")
        inside, quote, _ = text.replace("\\\\", "").replace('\\"', "").partition('"')
        assert not quote or not faults(schema, f'"{begun}{inside}"'), text
