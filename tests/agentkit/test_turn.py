"""The grammar of a turn against what the chat template writes, and the parser against the grammar."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.grammar import ChoiceSpec, Grammar, GrammarCompiler, GrammarSpec, JsonSpec, LarkSpec, RegexSpec
from agentkit.runtime.text import Detokenizer, Piece
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import open_checkpoint
from agentkit.schema import Json
from agentkit.template import Assistant, Call, ChatTemplate, Tags, User
from agentkit.turn import (
    ArgumentDelta,
    CallReady,
    CallStarted,
    Event,
    OutputDelta,
    TextDelta,
    TurnParser,
    turn_spec,
)
from tests.qwen import qwen_folder
from tests.runtime.schemas import random_output
from tests.smol import smol_path


@dataclass
class Sig:
    name: str
    schema: Json
    description: str = ""


@dataclass
class Setting:
    """One model: its vocabulary, template and compiler."""

    vocab: Vocabulary
    size: int
    template: ChatTemplate = field(init=False)
    compiler: GrammarCompiler = field(init=False)

    def __post_init__(self) -> None:
        self.template = ChatTemplate(self.vocab)
        self.compiler = GrammarCompiler(self.vocab, self.size)

    @property
    def tags(self) -> Tags:
        return self.template.tool_format.tags

    def grammar(self, final: GrammarSpec | None = None, **options: Any) -> Grammar:
        spec = turn_spec(TOOLS, final, self.tags, **options)
        assert spec is not None
        return self.compiler.submit(spec).result()

    def encode(self, text: str, calls: list[Call]) -> list[int]:
        """Ids of a turn as the chat template writes them into a conversation."""
        turn = self.template.encode_start([User("q"), Assistant(text, tuple(calls)), User("r")])
        start = self.template.encode_start([User("q")])
        end = turn.index(self.vocab.end_id, len(start))
        return turn[len(start) : end]


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TOOLS = [
    Sig("read", _object(path={"type": "string"}, lines={"type": "array", "items": {"type": "integer"}})),
    Sig("read_file", {**_object(where={"$ref": "#/$defs/P"}), "$defs": {"P": {"type": "string", "pattern": "^a+@b$"}}}),
    Sig("now", _object()),
]
QWEN = Setting(Vocabulary.from_folder(qwen_folder()), 151_936)
_smol = open_checkpoint(smol_path()).vocabulary()
SMOL = Setting(_smol, _smol.size)
BOTH = pytest.mark.parametrize("model", [QWEN, SMOL], ids=["qwen3", "smollm2"])
ANSWER = JsonSpec(json.dumps(_object(answer={"type": "integer"})))

CALLS = st.one_of(
    st.builds(
        lambda path, lines: Call("read", {"path": path, "lines": lines}),
        st.text(st.characters(exclude_characters="\x7f"), max_size=12)  # DEL is only written as an escape
        | st.sampled_from(["<tool_call>\n", "</tool_call>", 'a"}}\n', "<|im_end|>", "}\\"]),
        st.lists(st.integers(-(10**9), 10**9), max_size=3),
    ),
    st.builds(lambda n: Call("read_file", {"where": "a" * n + "@b"}), st.integers(1, 5)),
    st.just(Call("now", {})),
)
TEXTS = st.sampled_from(["", "Let me see.", 'I say "hi" {[', "x < y <tool_", "Ünï 日本 🫨"])


def accepts(grammar: Grammar, ids: list[int]) -> bool:
    matcher = grammar.matcher()
    return all(map(matcher.advance, ids)) and matcher.can_stop()


def events(model: Setting, ids: list[int], final: GrammarSpec | None = None) -> list[Event]:
    parser, detokenizer = TurnParser(model.tags, final), Detokenizer(model.vocab)
    found = [event for token in ids for piece in detokenizer.feed(token) for event in parser.feed(piece)]
    found += [event for piece in detokenizer.flush() for event in parser.feed(piece)]
    return found + parser.end()


def text_of(found: list[Event]) -> str:
    return "".join(event.text for event in found if isinstance(event, TextDelta))


def calls_of(found: list[Event]) -> list[Call]:
    return [Call(event.name, event.arguments) for event in found if isinstance(event, CallReady)]


@BOTH
@given(TEXTS, st.lists(CALLS, max_size=3))
@settings(max_examples=40, deadline=None)
def test_what_the_template_writes_is_legal_id_for_id_and_parsed_back(model: Setting, text: str, calls: list[Call]):
    clean = [
        Call(c.name, json.loads(model.vocab.decode(model.vocab.encode(json.dumps(c.arguments, ensure_ascii=False)))))
        for c in calls
    ]
    ids = model.encode(text, clean)
    assume(model is QWEN or "<tool_" not in text)  # where tags are ordinary text, text must not begin one
    matcher = model.grammar().matcher()
    at = 0
    while at < len(ids):
        forced = matcher.forced()
        assert forced[: len(ids) - at] == ids[at : at + len(forced)]
        for token in forced or [ids[at]]:
            assert matcher.advance(token)
            at += 1
    assert matcher.can_stop()
    found = events(model, ids)
    assert calls_of(found) == clean
    assert text_of(found).strip() == text.strip()


@BOTH
def test_a_turn_is_text_or_text_and_calls(model: Setting):
    grammar = model.grammar()
    now = [Call("now", {})]
    newline = model.vocab.encode("\n")
    assert accepts(grammar, model.encode("Hello", []))
    assert accepts(grammar, model.encode("", now))
    assert accepts(grammar, model.encode("Let me see.", now * 3))
    assert not accepts(grammar, model.encode("", now) + newline)
    assert not accepts(grammar, model.encode("", now) + model.vocab.encode(" and so on"))
    assert not accepts(grammar, model.encode("", [Call("never", {})]))
    assert not accepts(grammar, model.encode("", [Call("now", {"a": 1})]))
    assert not accepts(grammar, model.encode("", [Call("read", {"path": 3, "lines": []})]))


@BOTH
def test_free_text_cannot_hold_the_tag_without_starting_a_call(model: Setting):
    matcher = model.grammar().matcher()
    opening = model.encode("See ", [Call("now", {})])
    literal = model.vocab.encode("See <tool_call>")
    if model is SMOL:
        assert all(map(matcher.advance, literal))
        assert not matcher.can_stop()
        assert model.vocab.decode(matcher.forced()).startswith('\n{"name": "')
    else:  # spelt out it is ordinary text, and stays so
        assert all(map(matcher.advance, literal))
        assert matcher.can_stop()
        assert calls_of(events(model, literal)) == []
        assert text_of(events(model, literal)) == "See <tool_call>"
    assert accepts(model.grammar(), opening)


@BOTH
def test_masks_change_what_a_turn_may_do(model: Setting):
    now, read = model.encode("", [Call("now", {})]), model.encode("", [Call("read", {"path": "", "lines": []})])
    words = model.encode("Hello", [])
    assert not accepts(model.grammar(choice="required"), words)
    assert accepts(model.grammar(choice="required"), now)
    assert accepts(model.grammar(choice="now"), now)
    assert not accepts(model.grammar(choice="now"), read)
    assert not accepts(model.grammar(allowed=frozenset({"read", "read_file"})), now)
    assert accepts(model.grammar(allowed=frozenset({"read", "read_file"})), words)
    both = model.encode("", [Call("now", {}), Call("now", {})])
    assert accepts(model.grammar(), both)
    assert not accepts(model.grammar(parallel=False), both)
    matcher = model.grammar(choice="required", parallel=False).matcher()
    assert all(map(matcher.advance, now))
    assert matcher.finished()


def test_where_nothing_is_constrained_there_is_no_grammar():
    assert turn_spec([], None, QWEN.tags) is None
    assert turn_spec(TOOLS, None, QWEN.tags, choice="none") is None
    assert turn_spec(TOOLS, ANSWER, QWEN.tags, choice="none") == ANSWER
    grammar = SMOL.grammar(choice="none")  # here the tag is text, so text must be kept from it
    assert accepts(grammar, SMOL.encode("Hello <b> and < 3", []))
    assert not accepts(grammar, SMOL.vocab.encode("<tool_call>\n"))


@BOTH
def test_a_typed_output_does_not_suppress_calls_nor_end_in_text(model: Setting):
    grammar = model.grammar(ANSWER)
    answer = model.vocab.encode('{"answer": 42}')
    assert accepts(grammar, answer)
    assert accepts(grammar, model.encode("", [Call("now", {})]))
    assert accepts(grammar, model.encode("I look.", [Call("now", {})]))
    assert not accepts(grammar, model.encode("It is 42.", []))
    for text in ('{"answer": "x"}', ' {"answer": 1}', '{"other'):
        assert grammar.matcher().validate(model.vocab.encode(text)) < len(model.vocab.encode(text))
    found = events(model, answer, ANSWER)
    assert all(isinstance(event, OutputDelta) for event in found)
    assert "".join(event.text for event in found if isinstance(event, OutputDelta)) == '{"answer": 42}'
    found = events(model, model.encode("I look.", [Call("now", {})]), ANSWER)
    assert text_of(found).strip() == "I look."


@BOTH
@pytest.mark.parametrize(
    ("final", "text"), [(ChoiceSpec(("yes", "no")), "yes"), (RegexSpec("[0-9]{2}/[0-9]{2}"), "12/34")]
)
def test_choices_and_patterns_can_be_final_beside_tools(model: Setting, final: GrammarSpec, text: str):
    grammar = model.grammar(final)
    assert accepts(grammar, model.vocab.encode(text))
    assert accepts(grammar, model.encode("", [Call("now", {})]))
    assert not accepts(grammar, model.vocab.encode("Well"))


@BOTH
@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_any_turn_is_closed_within_its_budget_and_parses(model: Setting, seed: int):
    rng = random.Random(seed)
    final = rng.choice([None, ANSWER])
    choice = rng.choice(["auto", "required", "read_file"])
    grammar = model.grammar(final, choice=choice)
    budget = grammar.minimum + rng.choice([0, 2, 10, 40])
    ids = random_output(grammar, rng, budget, model.size)
    assert len(ids) <= budget
    ids = [i for i in ids if i not in model.vocab.end_ids]
    assert accepts(grammar, ids)
    found = events(model, ids, final)
    if choice != "auto":
        assert calls_of(found)
    for event in found:
        if isinstance(event, CallReady):
            parts = [e.text for e in found if isinstance(e, ArgumentDelta) and e.index == event.index]
            assert json.loads("".join(parts)) == event.arguments


@BOTH
def test_an_unfinished_call_is_completed(model: Setting):
    ids = model.encode('Say "x', [Call("read_file", {"where": "aaa@b"})])
    for cut in range(1, len(ids)):
        matcher = model.grammar(ANSWER).matcher()
        assert all(map(matcher.advance, ids[:cut]))
        rest = matcher.completion(60)
        assert rest is not None
        assert calls_of(events(model, [*ids[:cut], *rest], ANSWER))


def test_events_come_in_order_and_do_not_depend_on_how_the_text_is_cut():
    ids = SMOL.encode("Well.", [Call("read", {"path": 'a "b" }', "lines": [1]}), Call("now", {})])
    text = SMOL.vocab.decode(ids)
    for size in (1, 2, 7, len(text)):
        parser = TurnParser(SMOL.tags)
        found = [e for at in range(0, len(text), size) for e in parser.feed(Piece(text[at : at + size]))] + parser.end()
        assert text_of(found) == "Well.\n"
        assert [(e.index, e.name) for e in found if isinstance(e, CallStarted)] == [(0, "read"), (1, "now")]
        assert calls_of(found) == [Call("read", {"path": 'a "b" }', "lines": [1]}), Call("now", {})]
        kinds = [type(e) for e in found]
        assert kinds.index(CallStarted) < kinds.index(ArgumentDelta) < kinds.index(CallReady)


def test_a_tool_whose_schema_cannot_be_used_is_named():
    with pytest.raises(SchemaError, match="tool lookup.*uniqueItems"):
        turn_spec([Sig("lookup", _object(ids={"type": "array", "uniqueItems": True}))], None, QWEN.tags)


def test_what_is_not_enforced_in_a_tool_is_reported():
    spec = turn_spec([Sig("pay", _object(iban={"type": "string", "format": "iban"}))], None, QWEN.tags)
    assert spec is not None
    [(what, report)] = QWEN.compiler.submit(spec).result().reports
    assert (what, report.findings[0].pointer) == ("tool pay", "/properties/iban")


@BOTH
def test_what_the_grammar_is_too_wide_for_is_judged_behind_its_own_header(model: Setting):
    odd = {"oneOf": [{"type": "string", "pattern": "^[0-9]+$"}, {"type": "string", "pattern": "^[0-9a-c]"}]}
    tools = [Sig("exact", _object(x={"type": "integer"})), Sig("odd", _object(x=odd))]
    spec = turn_spec(tools, JsonSpec(json.dumps(odd)), model.tags)
    assert isinstance(spec, LarkSpec)
    assert [json.loads(value.schema) for value in spec.judged] == [tools[1].schema, odd]
    review = model.compiler.submit(spec).result().review()
    assert review is not None

    def fails(ids: list[int]) -> bool:
        """Whether a fresh output with these ids ends in a fault."""
        return not review.fork().hear(ids, ended=True)

    for text in ("", 'I call {"name": "odd", "arguments": {"x": "1"}} '):
        calls = [Call("exact", {"x": 1}), Call("odd", {"x": 'a<tool_call>\n{"name": "odd"'}), Call("exact", {"x": 2})]
        assert not fails(model.encode(text, calls))
        assert not fails(model.encode(text, [*calls, Call("odd", {"x": "1a"}), *calls]))
        assert fails(model.encode(text, [*calls, Call("odd", {"x": "12"}), *calls]))
    assert fails(model.vocab.encode('"12"'))
    assert not fails(model.vocab.encode('"1b"'))
    assert not fails(model.vocab.encode('Say "12"'))


def test_ninety_four_tools_make_one_grammar():
    tools = [Sig(f"tool_{i}", TOOLS[0].schema) for i in range(94)]
    spec = turn_spec(tools, None, QWEN.tags)
    assert spec is not None
    grammar = QWEN.compiler.submit(spec).result()
    assert accepts(grammar, QWEN.encode("", [Call("tool_93", {"path": "x", "lines": []})]))
    assert not accepts(grammar, QWEN.encode("", [Call("tool_94", {"path": "x", "lines": []})]))


@BOTH
def test_a_call_can_be_completed_from_each_of_its_tokens(model: Setting):
    """Were a completion not found, a budget smaller than the grammar's reserve would end the call there and then."""
    schema = {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "City and state."},
            "cuisine": {"type": "string"},
            "max_distance": {"type": "integer"},
        },
        "required": ["location", "cuisine"],
        "additionalProperties": False,
    }
    spec = turn_spec([Sig("restaurant.find_nearby", schema)], None, model.tags, choice="required")
    assert spec is not None
    grammar = model.compiler.submit(spec).result()
    arguments = {"location": "Seattle, WA", "cuisine": "Chinese", "max_distance": 10}
    matcher = grammar.matcher()
    for token in model.encode("", [Call("restaurant.find_nearby", arguments)]):
        assert matcher.advance(token)
        ids = matcher.completion(grammar.minimum + 20)
        assert ids is not None, f"nothing was found after {token}"
        fork = matcher.fork()
        assert all(map(fork.advance, ids))
        assert fork.can_stop()
