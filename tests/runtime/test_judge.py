"""The judge of finished documents against jsonschema, and the one value on which it lays a fault."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit.runtime.schema.judge import Judge

_UNION = {
    "oneOf": [
        {"properties": {"kind": {"const": "a"}, "size": {"minimum": 5}}, "required": ["kind", "size"]},
        {"properties": {"kind": {"const": "b"}, "name": {"type": "string"}}, "required": ["kind", "name"]},
    ]
}


@pytest.mark.parametrize(
    ("schema", "document", "value", "pointer", "keyword"),
    [
        ({"uniqueItems": True}, '["a", "b\\"", "b\\"", "a"]', '"b\\""', "/2", "uniqueItems"),
        ({"uniqueItems": True}, '[1, true, {"x": 1}, {"x": 1.0}]', '{"x": 1.0}', "/3", "uniqueItems"),
        ({"contains": {"const": 1}}, "[2, 3]", "[2, 3]", "", "contains"),
        ({"maxItems": 1}, "[[1], [2], [3]]", "[2]", "/1", "maxItems"),
        ({"minProperties": 2}, '\n{"a": 1} ', '{"a": 1}', "", "minProperties"),
        ({"maxProperties": 1}, '{"a": 1, "b": [2]}', "[2]", "/b", "maxProperties"),
        ({"properties": {"a": {"required": ["x"]}}}, '{"z": 0, "a": {"y": {}}}', '{"y": {}}', "/a", "required"),
        ({"propertyNames": {"pattern": "^x"}}, '{"xa": "b", "b": 2}', '"b"', "", "pattern"),
        (
            {"additionalProperties": False, "properties": {"a": {}}},
            '{"a": "b", "b": 2}',
            '"b"',
            "",
            "additionalProperties",
        ),
        ({"items": {"format": "ipv4"}}, '["1.2.3.4", "x"]', '"x"', "/1", "format"),
        ({"not": {"required": ["b"]}}, '{"a": 1, "b": 2}', '{"a": 1, "b": 2}', "", "not"),
        (
            {"if": {"required": ["a"]}, "then": {"properties": {"b": {"const": 1}}}},
            '{"a": 0, "b": 2}',
            "2",
            "/b",
            "const",
        ),
        ({"oneOf": [{"minimum": 3}, {"maximum": 5}]}, "4", "4", "", "oneOf"),
        (_UNION, '{"kind": "a", "size": 3}', "3", "/size", "minimum"),
        ({}, '{"k": {"b": 1, "b": 1}}', '"b"', "/k", "properties"),
        ({"items": {"minimum": 5}}, '[9, {"a/b": 0}, 3, 2]', "3", "/2", "minimum"),  # the first that is complete
        ({"properties": {"a/b~": {"const": 1}}}, '{"a\\/b~": 2}', "2", "/a~1b~0", "const"),
    ],
)
def test_the_fault_is_laid_on_the_value_that_must_change(
    schema: dict[str, Any], document: str, value: str, pointer: str, keyword: str
) -> None:
    fault = Judge(json.dumps(schema)).fault(document)
    assert fault is not None
    assert (fault.pointer, fault.keyword) == (pointer, keyword)
    start, end = fault.span
    assert document[start:end] == value
    assert json.loads(f"[{','.join(document[s:e] for s, e in fault.members)}]") == _inside(json.loads(value))


def _inside(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def test_an_integer_that_python_does_not_read_is_a_fault_and_no_exception() -> None:
    fault = Judge("{}").fault(f"[{'9' * 5000}]")
    assert fault is not None
    assert fault.pointer == ""


_scalars = st.sampled_from([0, 1, 1.0, True, None, "", "a", 'q"}', "é]"])
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", 'c"']), inner, max_size=3),
    max_leaves=8,
)
_SCHEMAS: list[dict[str, Any]] = [
    {"type": ["array", "object"], "uniqueItems": True, "minProperties": 1, "maxProperties": 2},
    {"additionalProperties": {"$ref": "#"}, "items": {"$ref": "#"}, "uniqueItems": True, "not": {"const": 1}},
    {
        "anyOf": [
            {"type": "array", "contains": {"type": "string"}},
            {"propertyNames": {"maxLength": 1}, "type": "object"},
        ]
    },
    {"oneOf": [{"type": "object"}, {"required": ["a"]}, {"type": "array", "maxItems": 1}]},
    {"dependentRequired": {"a": ["b"]}, "if": {"required": ["b"]}, "then": {"properties": {"b": {"type": "array"}}}},
]


@settings(max_examples=200, deadline=None)
@given(_values, st.sampled_from(_SCHEMAS), st.sampled_from([None, 1]))
def test_the_verdict_is_that_of_jsonschema_and_the_value_lies_where_it_is_said_to(
    value: Any, schema: dict[str, Any], indent: int | None
) -> None:
    document = json.dumps(value, indent=indent)
    fault = Judge(json.dumps(schema)).fault(document)
    assert (fault is None) == jsonschema.Draft202012Validator(schema).is_valid(value)
    if fault is not None:
        found: Any = value
        for step in fault.pointer.split("/")[1:]:
            found = found[int(step) if isinstance(found, list) else step]
        start, end = fault.span
        shown = json.loads(document[start:end])
        assert shown == found or shown in found  # a key is at fault
