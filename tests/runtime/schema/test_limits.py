"""Schema bombs: each is refused or compiled, by a limit that stops the work, in a process that may be killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.schema.front import inline
from agentkit.runtime.schema.limits import require_bounded
from bench.instances import status
from bench.pool import Lost, Worker

PATIENCE = 10.0


def matching(pattern: str, **more: Any) -> str:
    return json.dumps({"type": "string", "pattern": pattern, **more})


def doubling(keyword: str, levels: int) -> str:
    """References that lead to the last of `levels` definitions in 2 ** levels ways."""
    parts = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i - 1}"}] * 2} for i in range(1, levels)}
    return json.dumps({"$ref": f"#/$defs/d{levels - 1}", "$defs": {"d0": {"type": "string"}, **parts}})


def growing(levels: int) -> str:
    """An object whose shortest document has 2 ** levels strings in it: a billion laughs."""
    parts: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(1, levels):
        inner = {"$ref": f"#/$defs/d{i - 1}"}
        parts[f"d{i}"] = {"type": "object", "properties": {"a": inner, "b": inner}, "required": ["a", "b"]}
    return json.dumps({"$ref": f"#/$defs/d{levels - 1}", "$defs": parts})


def nested(keyword: str, levels: int) -> str:
    part: Any = {"type": "object", "properties": {"k": {"type": "string"}}}
    for _ in range(levels):
        part = {keyword: [part, part]}
    return json.dumps(part)


def chain(length: int) -> str:
    parts = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**parts, f"d{length}": {"type": "string"}}})


LONG = "a" * 40 + "!"
REFUSED = {
    "20,000 levels": '{"items":' * 20_000 + "{}" + "}" * 20_000,
    "80 levels": '{"items":' * 80 + "{}" + "}" * 80,
    "60,000 parentheses": matching("(" * 60_000 + ")" * 60_000),
    "200 groups inside each other": matching("(" * 200 + "a" + ")" * 200),
    "a quantifier of nothing": matching("^+[a-z]$"),
    "a million repetitions": matching("(a{1000}){1000}"),
    "100,000 repetitions": matching("^x{100000}$"),
    "an exponential automaton": matching("^(.*a.{300})$"),
    "an alternation of 20,000": matching("^(" + "|".join(f"w{i * 7919}" for i in range(20_000)) + ")$"),
    "a billion laughs": growing(40),
    "anyOf doubled 40 times": doubling("anyOf", 40),
    "an enum of 100 MB": json.dumps({"enum": ["x" * 100] * 1_000_000}),
    "a text of 10 MB": json.dumps({"description": "x" * 10_000_000}),
    "100,000 properties": json.dumps({"properties": {f"p{i}": {} for i in range(100_000)}}),
    "3,000 required properties": json.dumps({"type": "object", "required": [f"k{i}" for i in range(3000)]}),
    "a billion items": json.dumps({"type": "array", "minItems": 10**9}),
    "a thousand times a thousand items": json.dumps(
        {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000, "items": {"minLength": 1}}}
    ),
    "a billion characters": json.dumps({"type": "string", "minLength": 10**9}),
    "a billion members": json.dumps({"type": "object", "minProperties": 10**9}),
    "a million that are contained": json.dumps({"type": "array", "contains": {}, "minContains": 10**6}),
    "a string of 200,000 characters": json.dumps({"const": "x" * 200_000}),
    "references in a circle": json.dumps(
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    "recursion without an end": '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}',
    "1,500 references in a row": chain(1500),
    "a pattern to judge by that backtracks": json.dumps(
        {"type": "array", "uniqueItems": True, "items": {"type": "string", "pattern": "^(a+)+$"}}
    ),
    "a pattern for a name that backtracks": json.dumps(
        {"type": "object", "properties": {LONG: {}}, "patternProperties": {"^(a+)+$": {"type": "string"}}}
    ),
    "a pattern for a constant that backtracks": json.dumps({"allOf": [{"const": LONG}, {"pattern": "^(a|a)*$"}]}),
}
ANSWERED = {
    "oneOf doubled 40 times": doubling("oneOf", 40),
    "allOf doubled 40 times": doubling("allOf", 40),
    "oneOf in oneOf": nested("oneOf", 11),
    "anyOf in anyOf": nested("anyOf", 11),
    "allOf in allOf": nested("allOf", 11),
    "conditions beside each other": json.dumps(
        {"allOf": [{"if": {"properties": {f"k{i}": {"const": 1}}}, "then": {"required": [f"m{i}"]}} for i in range(30)]}
    ),
    "alternatives beside each other": json.dumps(
        {"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for i in range(20)]} for j in range(20)]}
    ),
    "dependents of each other": json.dumps({"dependentRequired": {f"k{i}": [f"k{i * 7 % 30}"] for i in range(30)}}),
    "patterns met with each other": json.dumps({"allOf": [{"pattern": f".*{c}.*"} for c in "abcdefghijklmnop"]}),
    "names under many patterns": json.dumps({"patternProperties": {chr(97 + i): {"minLength": i} for i in range(20)}}),
    "an enum of 5,000": json.dumps({"enum": [f"value-{i}" for i in range(5000)]}),
    "a million characters at most": matching("^[a-z]+$", maxLength=1_000_000),
}


class Judge:
    """One worker, begun anew where a schema has ended it."""

    def __init__(self) -> None:
        self.worker = Worker("ours")

    def status(self, schema: str) -> str:
        try:
            return self.worker.ask(PATIENCE, status, schema)
        except Lost as lost:
            self.worker.kill()
            self.worker = Worker("ours")
            return str(lost)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.worker.kill()


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED.keys())
def test_a_schema_bomb_is_refused(judge: Judge, schema: str):
    assert judge.status(schema) == "refused"


@pytest.mark.parametrize("schema", ANSWERED.values(), ids=ANSWERED.keys())
def test_a_large_schema_is_answered(judge: Judge, schema: str):
    assert judge.status(schema) in ("exact", "verified", "refused")


def test_what_is_refused_is_located():
    with pytest.raises(SchemaError, match="8,192") as caught:
        inline(json.dumps({"properties": {"a/b": {"items": {"minLength": 10_000}}}}), "document")
    assert caught.value.pointer == "/properties/a~1b/items"


def test_what_tools_and_documents_have_is_within_the_limits():
    wide: dict[str, Any] = {
        f"p{i}": {"type": "string", "pattern": "^(a(b(c)))$", "minLength": 500} for i in range(1000)
    }
    require_bounded({"properties": wide, "anyOf": [{}] * 300, "enum": ["x"] * 10_000, "items": {"minItems": 600}})
