"""What is seen to be a valid schema at once is one in the eyes of jsonschema."""

from __future__ import annotations

import random
from typing import Any

import jsonschema
import pytest

from agentkit.runtime.schema.sound import sound
from tests.runtime.schemas import random_schema

ODD: list[Any] = [None, -1, 1.5, True, "", "x", "(", [], ["a", "a"], [1], {}, {"type": "x"}]


def spoilt(value: Any, rng: random.Random) -> Any:
    """A copy with a value or two exchanged for another."""
    if rng.random() < 0.04:
        return rng.choice(ODD)
    if isinstance(value, dict):
        return {key: spoilt(member, rng) for key, member in value.items()}
    return [spoilt(item, rng) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("draft", [jsonschema.Draft202012Validator, jsonschema.Draft7Validator])
def test_no_schema_that_is_seen_to_be_valid_is_refused_by_its_metaschema(draft: Any) -> None:
    rng = random.Random(7)
    seen = 0
    for _ in range(150):
        schema = spoilt(random_schema(rng), rng)
        if sound(schema):
            seen += 1
            draft.check_schema(schema)
    assert seen > 5


def test_the_schema_of_a_tool_is_seen_to_be_valid() -> None:
    path = {"type": "string", "description": "where", "default": "."}
    assert sound({"type": "object", "properties": {"path": path}, "required": [], "additionalProperties": False})
