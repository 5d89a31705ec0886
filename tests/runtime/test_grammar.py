"""Grammars: what is legal, what is refused, and that nothing but text the schema allows can be written."""

from __future__ import annotations

import copy
import json
import random
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit.runtime.errors import EngineError, SchemaError
from agentkit.runtime.grammar import (
    ChoiceSpec,
    Grammar,
    GrammarCompiler,
    GrammarSpec,
    JsonSpec,
    LarkSpec,
    Matcher,
    RegexSpec,
)
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import open_checkpoint
from tests.qwen import qwen_folder
from tests.runtime.schemas import legal_ids, random_schema
from tests.smol import smol_path

QWEN = Vocabulary.from_folder(qwen_folder())
SMOL = open_checkpoint(smol_path()).vocabulary()
PADDED = 151_936
COMPILER = GrammarCompiler(QWEN, PADDED)
SMALL = GrammarCompiler(SMOL, SMOL.size)
SEEDS = st.integers(0, 10_000)
TEXTS = st.text(st.characters(exclude_characters="\x7f"), max_size=20)  # DEL is only written as an escape
TOOL = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "lines": {"type": "array", "items": {"type": "integer"}}},
    "required": ["path", "lines"],
    "additionalProperties": False,
}


def compiled(spec: GrammarSpec | dict[str, Any], style: Any = "document") -> Grammar:
    if isinstance(spec, dict):
        spec = JsonSpec(json.dumps(spec), style)
    return COMPILER.submit(spec).result()


def accepts(grammar: Grammar, text: str, vocab: Vocabulary = QWEN) -> bool:
    matcher = grammar.matcher()
    return all(map(matcher.advance, vocab.encode(text))) and matcher.can_stop()


def after(grammar: Grammar, text: str) -> Matcher:
    matcher = grammar.matcher()
    assert all(map(matcher.advance, QWEN.encode(text)))
    return matcher


def walk(grammar: Grammar, rng: random.Random, steps: int) -> Matcher:
    matcher = grammar.matcher()
    for _ in range(steps):
        if matcher.finished():
            break
        legal = [int(i) for i in legal_ids(matcher, PADDED) if i not in QWEN.end_ids]
        if not legal:
            break
        assert matcher.advance(rng.choice(legal))
    return matcher


# the mask


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_token_is_legal_in_the_mask_exactly_if_it_can_be_taken(seed: int):
    rng = random.Random(seed)
    matcher = walk(compiled(random_schema(rng)), rng, rng.randint(0, 12))
    legal = set(legal_ids(matcher, PADDED).tolist())
    sample = rng.sample(sorted(legal), min(40, len(legal))) + rng.choices(range(PADDED), k=150)
    for token in sample:
        assert matcher.validate([token]) == (token in legal)
        assert matcher.fork().advance(token) == (token in legal)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_control_tokens_and_padding_are_never_legal(seed: int):
    rng = random.Random(seed)
    matcher = walk(compiled(random_schema(rng)), rng, rng.randint(0, 12))
    legal = set(legal_ids(matcher, PADDED).tolist())
    assert not legal & (set(QWEN.control.values()) - QWEN.end_ids)
    assert not legal & set(range(QWEN.size, PADDED))
    assert (QWEN.end_ids <= legal) == matcher.can_stop()


def test_a_string_takes_no_piece_of_a_character_that_leaves_it_broken():
    matcher = after(compiled({"type": "string"}), '"')
    lone = [i for i in range(QWEN.size) if len(b := QWEN.token_bytes(i)) == 1 and 0x80 <= b[0] < 0xC0]
    assert lone
    assert not set(lone) & set(legal_ids(matcher, PADDED).tolist())
    begun = next(i for i in range(QWEN.size) if QWEN.token_bytes(i) == b"\xf0")
    assert matcher.advance(begun)
    assert not matcher.advance(QWEN.encode('"')[0])
    ids = matcher.completion(10)
    assert ids is not None
    b"".join(QWEN.token_bytes(i) for i in [begun, *ids]).decode()


@pytest.mark.parametrize("text", ["<tool_call>", "<|im_end|>", "<|endoftext|>"])
def test_a_control_literal_in_a_schema_is_ordinary_text(text: str):
    grammar = compiled({"const": text})
    ids = QWEN.encode(json.dumps(text))
    assert grammar.matcher().forced() == ids
    assert not set(ids) & set(QWEN.control.values())
    assert accepts(grammar, json.dumps(text))


def test_a_mask_row_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="mask row"):
        compiled({}).matcher().fill(np.zeros(10, dtype=np.int32))


# state


@given(SEEDS, st.integers(0, 15))
@settings(max_examples=15, deadline=None)
def test_rollback_restores_the_state_across_forced_ids_and_the_end(seed: int, steps: int):
    rng = random.Random(seed)
    matcher = walk(compiled(random_schema(rng), "call"), rng, rng.randint(0, 8))
    before, forced = legal_ids(matcher, PADDED), matcher.forced()
    taken = 0
    for _ in range(steps):
        for token in matcher.forced() or [int(rng.choice([*legal_ids(matcher, PADDED), -1]))]:
            taken += matcher.advance(token)
    matcher.rollback(taken)
    assert np.array_equal(legal_ids(matcher, PADDED), before)
    assert matcher.forced() == forced


def test_every_end_id_ends_a_complete_output_and_nothing_follows():
    vocab = copy.copy(SMOL)
    vocab.end_ids = frozenset({SMOL.end_id, SMOL.control["<|endoftext|>"]})
    assert len(vocab.end_ids) == 2
    compiler = GrammarCompiler(vocab, vocab.size)
    matcher = compiler.submit(JsonSpec('{"type": "integer"}')).result().matcher()
    compiler.close()
    for end in vocab.end_ids:
        assert not matcher.advance(end)
        assert matcher.advance(vocab.encode("7")[0])
        assert not matcher.finished()
        assert vocab.end_ids <= set(legal_ids(matcher, vocab.size).tolist())
        assert matcher.validate([end, end]) == 1
        assert matcher.advance(end)
        assert matcher.finished()
        assert not legal_ids(matcher, vocab.size).size
        assert matcher.forced() == []
        assert not matcher.advance(vocab.encode("7")[0])
        matcher.rollback(2)


def test_a_fork_goes_its_own_way():
    matcher = after(compiled({"enum": ["ab", "cd"]}), '"')
    fork = matcher.fork()
    assert fork.advance(QWEN.encode("ab")[0])
    assert matcher.advance(QWEN.encode("cd")[0])
    assert [QWEN.decode(m.forced()) for m in (fork, matcher)] == ['"', '"']


def test_an_illegal_token_changes_nothing():
    matcher = after(compiled(TOOL, "call"), '{"path": "a')
    before = legal_ids(matcher, PADDED)
    for token in (QWEN.end_id, QWEN.control["<tool_call>"], PADDED - 1, -1):
        assert not matcher.advance(token)
    assert np.array_equal(legal_ids(matcher, PADDED), before)


def test_more_ids_than_were_taken_cannot_be_undone():
    with pytest.raises(ValueError, match="cannot undo"):
        compiled({}).matcher().rollback(1)


@pytest.mark.parametrize(("compiler", "vocab"), [(COMPILER, QWEN), (SMALL, SMOL)], ids=["qwen3", "smollm2"])
@given(TEXTS, st.lists(st.integers(-(10**6), 10**6), max_size=4))
@settings(max_examples=25, deadline=None)
def test_forced_ids_are_those_that_the_text_encodes_to(
    compiler: GrammarCompiler, vocab: Vocabulary, text: str, n: list[int]
):
    value = vocab.decode(vocab.encode(json.dumps({"path": text, "lines": n}, ensure_ascii=False)))
    ids = vocab.encode(value)
    matcher = compiler.submit(JsonSpec(json.dumps(TOOL), "call")).result().matcher()
    at = 0
    while at < len(ids):
        forced = matcher.forced()
        assert forced == ids[at : at + len(forced)]
        for token in forced or [ids[at]]:
            assert matcher.advance(token)
            at += 1
    assert matcher.can_stop()


# what is bounded


def test_documents_take_indentation_but_no_runaway_white_space():
    grammar = compiled(TOOL)
    value = {"path": "a", "lines": [1, 2]}
    for text in (json.dumps(value), json.dumps(value, indent=4), json.dumps(value, separators=(",", ":"))):
        assert accepts(grammar, text)
    assert not accepts(grammar, '{\n\n"path": "a", "lines": []}')
    assert not accepts(grammar, '{  "path": "a", "lines": []}')
    assert not accepts(grammar, "{\n" + " " * 25 + '"path": "a", "lines": []}')


def test_calls_have_the_separators_of_chat_templates_only():
    grammar = compiled(TOOL, "call")
    assert accepts(grammar, '{"path": "a", "lines": [1, 2]}')
    for text in ('{"path":"a", "lines": [1, 2]}', '{"path": "a", "lines": [1,2]}', '{ "path": "a", "lines": []}'):
        assert not accepts(grammar, text)


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_numbers_do_not_run_away(kind: str):
    grammar = compiled({"type": kind})
    for text in ("0", "-17", "1699999999", "999999999999999"):
        assert accepts(grammar, text)
    for text in ("1" * 30, "-" + "9" * 25, "0." + "1" * 30, "1e400"):
        assert not accepts(grammar, text)
    assert accepts(grammar, "3.141592653") == (kind == "number")


def test_bounds_of_ours_never_exclude_what_the_schema_asks_for():
    assert accepts(compiled({"type": "integer", "minimum": 10**17}), "2" + "0" * 17)
    assert accepts(compiled({"type": "array", "items": {"const": 1}, "minItems": 1100}), f"[{', '.join(['1'] * 1100)}]")
    assert accepts(compiled({"enum": [10**25, "x"]}), '"x"')  # an integer of any size is read


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("2024-02-29", True),
        ("2023-02-29", False),
        ("1900-02-29", False),
        ("2000-04-31", False),
        ("0000-01-01", False),
        ("9999-12-31", True),
    ],
)
def test_a_date_is_a_day_that_exists(text: str, valid: bool):
    assert accepts(compiled({"type": "string", "format": "date"}), f'"{text}"') == valid


def test_fields_come_in_the_order_of_the_schema():
    names = ["zeta", "alpha", "mid"]
    schema = {"type": "object", "properties": {n: {"const": 1} for n in names}, "required": names}
    assert QWEN.decode(compiled({**schema, "additionalProperties": False}, "call").matcher().forced()).startswith(
        '{"zeta": 1, "alpha'
    )


# other specs


def test_choices_may_be_prefixes_of_each_other():
    grammar = compiled(ChoiceSpec(("yes", "yes please", 'say "no"\n')))
    for text in ("yes", "yes please", 'say "no"\n'):
        assert accepts(grammar, text)
    assert not accepts(grammar, "yes pl")


def test_a_regex_matches_the_whole_output():
    grammar = compiled(RegexSpec(r"[0-9]{4}(-[0-9]{2})?"))
    assert accepts(grammar, "2024-05")
    assert accepts(grammar, "2024")
    assert not accepts(grammar, "2024-05-01")


def test_a_grammar_may_name_control_tokens():
    token = QWEN.control["<tool_call>"]
    matcher = compiled(LarkSpec(f'start: "a" <[{token}]> "b"', control=frozenset({token}))).matcher()
    assert all(map(matcher.advance, [*QWEN.encode("a"), token, *QWEN.encode("b")]))
    assert matcher.finished()


# what is refused


@pytest.mark.parametrize(
    ("schema", "pointer", "says"),
    [
        ({"not": {}}, "", "[Nn]othing satisfies"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, "/properties/a/type", "not valid"),
        ({"properties": {"a~/b": {"$ref": "https://example.org/x"}}}, "/properties/a~0~1b", "another document"),
        ({"$ref": "#/$defs/none"}, "", "does not exist"),
        ({"enum": []}, "", "empty"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "", "minimum"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "", "minLength"),
        ({"type": "string", "pattern": "^ab$", "minLength": 5}, "", "empty"),
    ],
)
def test_what_cannot_be_enforced_is_refused_and_located(schema: dict[str, Any], pointer: str, says: str):
    with pytest.raises(SchemaError, match=says) as caught:
        compiled(schema)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    "schema", [{"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}, {"$ref": "#"}]
)
def test_a_schema_that_no_document_satisfies_is_refused(schema: dict[str, Any]):
    with pytest.raises(SchemaError):
        compiled(schema)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "false", "{", '{"type": NaN', "[" * 100_000, '{"a": ' * 80 + "1" + "}" * 80]
)
def test_what_is_no_schema_is_refused(text: str):
    with pytest.raises(SchemaError):
        COMPILER.submit(JsonSpec(text)).result()


def test_a_schema_too_large_is_refused():
    with pytest.raises(SchemaError, match="limit"):
        compiled({"enum": ["x" * 300_000]})


def test_unions_in_unions_neither_hang_nor_end_the_compiler():
    bomb: dict[str, Any] = {"type": "object", "properties": {"k": {"type": "string"}}}
    for _ in range(12):
        bomb = {"oneOf": [bomb, {"anyOf": [bomb, bomb]}]}
        if len(json.dumps(bomb)) > 15_000:
            break
    failure = COMPILER.submit(JsonSpec(json.dumps(bomb))).exception()
    assert failure is None or isinstance(failure, SchemaError)
    assert accepts(compiled({"type": "boolean"}), "true")


@pytest.mark.parametrize(
    "spec",
    [
        RegexSpec("["),
        RegexSpec("a(?=b)"),
        RegexSpec("[^\\s\\S]"),
        ChoiceSpec(()),
        ChoiceSpec(("a", "")),
        LarkSpec("start: nothing"),
    ],
)
def test_other_specs_that_cannot_be_used_are_refused(spec: GrammarSpec):
    with pytest.raises(SchemaError):
        compiled(spec)


def test_overlapping_one_of_is_reported():
    grammar = compiled({"type": "string", "oneOf": [{"pattern": "a"}, {"pattern": "b"}]})
    [(_, report)] = grammar.reports
    assert (report.status, report.findings[0].keyword) == ("verified", "oneOf")


def test_an_unknown_format_is_an_annotation_and_reported():
    grammar = compiled({"type": "object", "properties": {"a": {"type": "string", "format": "iban"}}})
    [(_, report)] = grammar.reports
    assert list(map(str, report.findings)) == ["/properties/a: format: 'iban' is an annotation and not enforced."]
    assert report.status == "exact"


def test_a_schema_cannot_change_how_it_is_compiled():
    grammar = compiled({"x-guidance": {"lenient": True}, "type": "string", "minLength": 2})
    assert not accepts(grammar, '"a"')
    grammar = compiled({**TOOL, "x-guidance": {"whitespace_pattern": "[ ]+"}})
    assert not accepts(grammar, '{  "path": "a", "lines": []}')


def test_many_tools_in_one_union_compile():
    branches = [
        {
            "type": "object",
            "properties": {"name": {"const": f"tool_{i}"}, "arguments": TOOL},
            "required": ["name", "arguments"],
        }
        for i in range(94)
    ]
    grammar = compiled({"anyOf": branches}, "call")
    assert accepts(grammar, '{"name": "tool_77", "arguments": {"path": "", "lines": []}}')
    assert not accepts(grammar, '{"name": "tool_94", "arguments": {"path": "", "lines": []}}')


# the compiler


def test_the_same_spec_is_compiled_once_and_failures_are_forgotten():
    spec = JsonSpec('{"const": "once"}')
    assert COMPILER.submit(spec) is COMPILER.submit(spec)
    assert COMPILER.submit(spec) is not COMPILER.submit(JsonSpec(spec.schema, "call"))
    broken = COMPILER.submit(JsonSpec('{"not": {}}'))
    assert isinstance(broken.exception(), SchemaError)
    assert COMPILER.submit(JsonSpec('{"not": {}}')) is not broken


def test_the_order_of_keys_is_part_of_the_identity():
    one, two = ('{"properties": {"a": {}, "b": {}}}', '{"properties": {"b": {}, "a": {}}}')
    assert COMPILER.submit(JsonSpec(one)).result().key != COMPILER.submit(JsonSpec(two)).result().key


def test_a_closed_compiler_ends_its_thread_and_takes_nothing():
    compiler = GrammarCompiler(SMOL, SMOL.size)
    before = threading.active_count()
    compiler.submit(ChoiceSpec(("a",))).result()
    assert threading.active_count() == before + 1
    compiler.close()
    with pytest.raises(EngineError, match="closed"):
        compiler.submit(ChoiceSpec(("b",)))
    for thread in threading.enumerate():
        if thread.name.startswith("agentkit-grammar") and thread is not threading.current_thread():
            thread.join(0.2)
    assert threading.active_count() == before


def test_a_vocabulary_wider_than_the_model_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        GrammarCompiler(QWEN, 1000)
