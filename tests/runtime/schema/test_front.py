"""Combined keywords against jsonschema: what the grammar of a schema accepts, and what is valid."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema.validators import validator_for

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.grammar import Grammar, GrammarCompiler, JsonSpec
from agentkit.runtime.schema.drafts import dialect_of
from agentkit.runtime.schema.front import prepare, report_on
from agentkit.runtime.schema.report import SchemaReport
from agentkit.runtime.schema.shape import plainly_valid
from agentkit.runtime.vocab import Vocabulary
from tests.qwen import qwen_folder
from tests.runtime.schema.combined import NAMES, orders, random_combined, random_document

Json = dict[str, Any]

QWEN = Vocabulary.from_folder(qwen_folder())
COMPILER = GrammarCompiler(QWEN, QWEN.size)
SEEDS = st.integers(0, 100_000)
KIND = {"properties": {"kind": {"enum": ["a", "b", "c"]}, "x": {}, "y": {}}, "required": ["kind"], "type": "object"}
KINDS: list[Any] = [
    {"kind": "a", "x": 1},
    {"kind": "a"},
    {"kind": "b", "y": 1},
    {"kind": "b", "x": 1},
    {"kind": "c"},
    {"kind": "a", "x": 1, "y": 1},
    {"kind": "d"},
    {},
]
MEMBERS: list[Any] = [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": "x"}, {"c": 1}, {"a": 1, "c": 1}, 3, "a"]
SCALARS: list[Any] = [None, True, False, 0, 1, 2, 1.5, "", "a", "b", "ab", "ba", "b\n", [], [1], {}, {"a": 1}]


def compiled(schema: Json) -> tuple[Grammar, SchemaReport]:
    grammar = COMPILER.submit(JsonSpec(json.dumps(schema), "call")).result()
    return grammar, grammar.reports[0][1]


def admits(grammar: Grammar, value: Any) -> bool:
    """Whether a grammar takes a value, with its keys in some order."""
    for ordered in orders(value):
        matcher = grammar.matcher()
        if all(map(matcher.advance, QWEN.encode(json.dumps(ordered, ensure_ascii=False)))) and matcher.can_stop():
            return True
    return False


def judge(schema: Json) -> Any:
    dialect = validator_for(schema, default=jsonschema.Draft202012Validator)
    return dialect(schema, format_checker=dialect.FORMAT_CHECKER)


def differences(schema: Json, values: list[Any]) -> list[str]:
    """Values on which grammar and jsonschema disagree more than the report admits."""
    grammar, report = compiled(schema)
    found: list[str] = []
    for value in values:
        valid, admitted = judge(schema).is_valid(value), admits(grammar, value)
        if valid != admitted and not (admitted and report.status == "verified"):
            found.append(f"{value!r} is {'' if valid else 'not '}valid and {'' if admitted else 'not '}admitted")
    return found


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
EXACT: dict[str, tuple[Json, list[Any]]] = {
    "allOf unites properties": (
        {"allOf": [OBJECT, {"required": ["a"]}, {"properties": {"b": {"minimum": 1}}}]},
        MEMBERS,
    ),
    "a closed branch of allOf closes all": ({"allOf": [{**OBJECT, "additionalProperties": False}, {}]}, MEMBERS),
    "allOf of patterns": ({"type": "string", "allOf": [{"pattern": "a"}, {"pattern": "b"}]}, SCALARS),
    "allOf of enums": ({"allOf": [{"enum": [1, "a", None]}, {"enum": ["a", True, 1]}, {"type": "string"}]}, SCALARS),
    "anyOf beside properties": ({**OBJECT, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, MEMBERS),
    "oneOf of required properties": ({**OBJECT, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, MEMBERS),
    "oneOf of overlapping ranges": (
        {"oneOf": [{"type": "number", "maximum": 1}, {"type": "number", "minimum": 1}]},
        SCALARS,
    ),
    "oneOf of overlapping enums": ({"oneOf": [{"enum": [1, 2, "a"]}, {"enum": [2, "a", "b"]}]}, SCALARS),
    "oneOf of overlapping patterns": ({"type": "string", "oneOf": [{"pattern": "a"}, {"pattern": "b"}]}, SCALARS),
    "oneOf of three that overlap": ({"oneOf": [{"type": "string"}, {"enum": ["a", 1]}, {"const": 1}]}, SCALARS),
    "oneOf by a tag": ({**KIND, "oneOf": [{"properties": {"kind": {"const": k}}} for k in "ab"]}, KINDS),
    "not an enum": ({"not": {"enum": ["a", 1, None, True, "b\n"]}}, SCALARS),
    "not a type": ({"not": {"type": ["string", "number", "array"]}}, SCALARS),
    "not a pattern": ({"type": "string", "not": {"pattern": "^a|b$"}}, SCALARS),
    "not required": ({**OBJECT, "not": {"required": ["a", "b"]}}, MEMBERS),
    "not anyOf": (
        {**OBJECT, "not": {"anyOf": [{"required": ["a"]}, {"properties": {"b": {"const": 1}}}]}},
        [*MEMBERS, {"b": 2}],
    ),
    "not a range, doubly": ({"type": "number", "not": {"not": {"minimum": 1, "exclusiveMaximum": 2}}}, SCALARS),
    "if then else": (
        {
            **KIND,
            "if": {"properties": {"kind": {"const": "a"}}},
            "then": {"required": ["x"]},
            "else": {"required": ["y"]},
        },
        KINDS,
    ),
    "several ifs": (
        {
            **KIND,
            "allOf": [
                {
                    "if": {"properties": {"kind": {"const": "a"}}},
                    "then": {"required": ["x"], "properties": {"y": False}},
                },
                {"if": {"properties": {"kind": {"const": "b"}}}, "then": {"required": ["y"]}},
            ],
        },
        KINDS,
    ),
    "dependentRequired": ({**OBJECT, "dependentRequired": {"a": ["b"], "c": ["a"]}}, MEMBERS),
    "dependentSchemas": ({**OBJECT, "dependentSchemas": {"a": {"properties": {"b": False}}}}, MEMBERS),
    "dependencies of draft 7": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            **OBJECT,
            "dependencies": {"a": ["b"], "b": {"maxProperties": 2}},
        },
        MEMBERS,
    ),
    "siblings of $ref count since 2019-09": (
        {"$ref": "#/$defs/o", "required": ["a"], "$defs": {"o": OBJECT}},
        MEMBERS,
    ),
    "siblings of $ref are ignored before": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "properties": {"a": {"$ref": "#/definitions/o", "enum": [7]}},
            "definitions": {"o": {"type": "integer"}},
        },
        [*MEMBERS, {"a": "x"}],
    ),
    "an exclusive bound of draft 4": (
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "minimum": 1,
            "exclusiveMinimum": True,
            "type": "number",
        },
        SCALARS,
    ),
    "a tuple of draft 7": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [{"type": "integer"}],
            "additionalItems": False,
        },
        [[], [1], ["a"], [1, 2]],
    ),
    "an escaped pointer": (
        {"$defs": {"a/b ~%": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/a~1b%20~0%25"}}},
        [*MEMBERS, {"a": "x"}],
    ),
    "an anchor, and a base that $id gives": (
        {
            "$id": "https://example.org/root",
            "$defs": {"i": {"$id": "item", "$defs": {"n": {"$anchor": "num", "type": "integer"}}}},
            "properties": {"a": {"$ref": "item#num"}, "b": {"$ref": "https://example.org/item#/$defs/n"}},
        },
        [*MEMBERS, {"a": "x"}],
    ),
    "$dynamicRef in a document of its own": (
        {
            "$dynamicAnchor": "node",
            "type": "object",
            "properties": {"a": {"$dynamicRef": "#node"}},
            "additionalProperties": False,
        },
        [{}, {"a": {}}, {"a": {"a": {}}}, {"a": {"b": {}}}, {"a": 1}],
    ),
    "recursion through allOf": (
        {
            "$defs": {
                "t": {"type": "object", "properties": {"a": {"allOf": [{"$ref": "#/$defs/t"}, {"required": ["b"]}]}}}
            },
            "allOf": [{"$ref": "#/$defs/t"}, {"properties": {"b": {"type": "integer"}}}],
        },
        [{}, {"a": {}}, {"a": {"b": 1}}, {"a": {"b": 1, "a": {}}}, {"a": {"b": 1, "a": {"b": 2}}}, {"b": "x"}],
    ),
    "unevaluatedProperties see through allOf and $ref": (
        {
            "$defs": {"o": OBJECT},
            "$ref": "#/$defs/o",
            "allOf": [{"properties": {"c": {}}}],
            "unevaluatedProperties": False,
        },
        [*MEMBERS, {"d": 1}],
    ),
    "unevaluatedProperties see what holds": (
        {
            "type": "object",
            "anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"b": {}}}],
            "unevaluatedProperties": {"type": "null"},
        },
        [*MEMBERS, {"a": 2, "b": 1}, {"a": 1, "c": None}],
    ),
    "unevaluatedItems": (
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}],
            "anyOf": [{"prefixItems": [True, {"const": 2}]}, {"maxItems": 1}],
            "unevaluatedItems": False,
        },
        [[], [1], [1, 2], [1, 3], [1, 2, 3]],
    ),
    "a metaschema": (
        {
            "type": "object",
            "properties": {"a": {"$ref": "http://json-schema.org/draft-07/schema#/definitions/simpleTypes"}},
        },
        [{"a": "string"}, {"a": "text"}, {}],
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_rewritten_admits_exactly_what_is_valid(name: str):
    schema, values = EXACT[name]
    assert compiled(schema)[1].status == "exact"
    verdicts = {judge(schema).is_valid(value) for value in values}
    assert verdicts == {True, False}
    assert differences(schema, values) == []


@given(SEEDS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_combinations_admit_what_is_valid(seed: int, modern: bool):
    rng = random.Random(seed)
    schema = random_combined(rng, modern)
    values = [random_document(rng) for _ in range(25)]
    try:
        assert differences(schema, values) == []
    except SchemaError as error:
        if "No output satisfies this grammar" in str(error):
            return  # the search for a short output did not find one, of which seed 3256 of draft 7 is an example
        # Nothing satisfies it, or it leads to itself, as jsonschema says in its own way.
        with contextlib.suppress(RecursionError):
            assert not any(judge(schema).is_valid(value) for value in values)


@pytest.mark.parametrize(
    ("schema", "pointer", "keyword"),
    [
        ({"properties": {"a/b": {"not": {"required": ["c"], "uniqueItems": True}}}}, "/properties/a~1b", "not"),
        (
            {"$defs": {"x": {"if": {"multipleOf": 3}, "then": {"maximum": 5}}}, "items": {"$ref": "#/$defs/x"}},
            "/$defs/x",
            "if",
        ),
        ({"anyOf": [{"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}], "type": "integer"}]}, "/anyOf/0", "oneOf"),
        (
            {"allOf": [{"type": "array"}, {"contains": {"const": 1}, "unevaluatedItems": False}]},
            "/allOf/1",
            "unevaluatedItems",
        ),
    ],
)
def test_what_is_wider_is_reported_where_the_user_wrote_it(schema: Json, pointer: str, keyword: str):
    report = report_on(json.dumps(schema))
    assert report.status == "verified"
    assert (pointer, keyword) in {(finding.pointer, finding.keyword) for finding in report.findings}


@pytest.mark.parametrize(
    ("schema", "pointer", "says"),
    [
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "", "othing satisfies"),
        ({"properties": {"a": {"$ref": "https://example.org/x"}}}, "/properties/a", "Copy what it refers to into"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "/properties/a", "does not exist"),
        (
            {"properties": {"a": {"$ref": "#/required"}}, "required": ["a"]},
            "/properties/a",
            "an object or a truth value",
        ),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
            "/$defs/a/allOf/0",
            "leads to itself",
        ),
        ({"properties": {"a": {"minLength": -1}}}, "/properties/a/minLength", "not valid"),
    ],
)
def test_a_report_says_why_a_schema_is_refused(schema: Json, pointer: str, says: str):
    report = report_on(json.dumps(schema))
    assert report.status == "refused"
    [finding] = report.findings
    assert finding.pointer == pointer
    assert says in finding.reason


def test_a_report_is_made_of_any_text():
    for text in ("", "{", "[]", "false", '{"type": 3}', '{"$schema": 3}', "[" * 10_000):
        assert report_on(text).status == "refused"
    assert report_on("true").status == "exact"


def test_combinations_that_multiply_are_cut_short():
    choices = [{"anyOf": [{"required": [f"a{i}{j}"]} for j in range(6)]} for i in range(12)]
    assert report_on(json.dumps({"type": "object", "allOf": choices})).status in ("exact", "verified", "refused")


def test_members_come_in_the_order_of_declaration():
    schema = {
        "allOf": [{"properties": {"z": {"const": 1}, "y": {"const": 1}}}, {"properties": {"x": {"const": 1}}}],
        "type": "object",
        "properties": {"m": {"const": 1}},
        "required": ["x", "y", "z", "m"],
        "unevaluatedProperties": False,
    }
    assert QWEN.decode(compiled(schema)[0].matcher().forced()) == '{"m": 1, "z": 1, "y": 1, "x": 1}'


@given(SEEDS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_looks_like_a_schema_is_one(seed: int, modern: bool):
    rng = random.Random(seed)
    schema = random_combined(rng, modern)
    part = schema
    while rng.random() < 0.8 and (inner := [v for v in part.values() if isinstance(v, dict) and v]):
        part = rng.choice(inner)
    key = rng.choice([*part, *NAMES, "type", "items", "exclusiveMinimum", "$id", "required", "enum", "dependencies"])
    part[key] = rng.choice(
        [None, True, 1, -1, 1.5, "string", "(", "#", [], ["a", "a"], [{}], {}, {"a": 1}, {"a": ["b"]}]
    )
    if plainly_valid(schema, dialect_of(schema)):
        dialect_of(schema).check_schema(schema)
        prepare(json.dumps(schema))
