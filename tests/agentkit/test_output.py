"""Output types: from Python types, JSON schemas and outlines' terms to what may be written, and back."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from outlines.types import CFG, Choice, JsonSchema, Regex
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from agentkit.output import OutputError, constraint
from agentkit.runtime.errors import SchemaError
from agentkit.runtime.grammar import GrammarCompiler, JsonSpec
from agentkit.runtime.weights import open_checkpoint
from tests.smol import smol_path

SMOL = open_checkpoint(smol_path()).vocabulary()
COMPILER = GrammarCompiler(SMOL, SMOL.size)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Item(BaseModel):
    name: str
    price: Annotated[float, Field(ge=0)]
    colour: Colour = Colour.RED
    parent: Item | None = None


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Row(TypedDict):
    key: str
    values: list[int]


def allows(output: Any, text: str) -> bool:
    matcher = COMPILER.submit(constraint(output).spec).result().matcher()
    return all(map(matcher.advance, SMOL.encode(text))) and matcher.can_stop()


@pytest.mark.parametrize(
    ("output", "text", "value"),
    [
        (Item, '{"name": "a", "price": 1.5}', Item(name="a", price=1.5)),
        (
            Item,
            '{"name": "a", "price": 0, "colour": "blue", "parent": {"name": "b", "price": 2}}',
            Item(name="a", price=0, colour=Colour.BLUE, parent=Item(name="b", price=2)),
        ),
        (list[Item], '[{"name": "a", "price": 1}]', [Item(name="a", price=1)]),
        (Point, '{"x": 3, "y": -1}', Point(3, -1)),
        (Row, '{"key": "k", "values": [1, 2]}', {"key": "k", "values": [1, 2]}),
        (Item | Point, '{"x": 3}', Point(3)),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (int, "-12", -12),
        (float, "2.5", 2.5),
        (bool, "true", True),
        (int | None, "null", None),
        (Colour, "blue", Colour.BLUE),
        (Level, "2", Level.HIGH),
        (Literal["yes", "no"], "no", "no"),
        (Literal[1, "a"], '"a"', "a"),
        ({"type": "array", "items": {"type": "integer"}}, "[1, 2]", [1, 2]),
        (re.compile(r"\d{3}"), "123", "123"),
        (Regex(r"[ab]+"), "abba", "abba"),
        (Choice(["left", "right"]), "left", "left"),
        (JsonSchema({"type": "object", "properties": {"a": {"type": "null"}}}), '{"a": null}', {"a": None}),
        (CFG('start: "x" | "y"'), "y", "y"),
    ],
)
def test_a_type_is_what_may_be_written_and_what_comes_back(output: Any, text: str, value: Any):
    assert allows(output, text)
    assert constraint(output).parse(text) == value


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (Item, '{"name": "a"}'),
        (Item, '{"name": "a", "price": -1}'),
        (list[Item], "[{}]"),
        (Colour, "green"),
        (Literal["yes", "no"], "maybe"),
        (int, "1.5"),
        (re.compile(r"\d{3}"), "12"),
        (Choice(["left", "right"]), "up"),
    ],
)
def test_nothing_else_may_be_written(output: Any, text: str):
    assert not allows(output, text)


def test_a_list_of_models_is_a_schema_and_no_pattern():
    spec = constraint(list[Item]).spec
    assert isinstance(spec, JsonSpec)
    assert json.loads(spec.schema)["type"] == "array"


def test_fields_keep_the_order_they_were_declared_in():
    spec = constraint(Item).spec
    assert isinstance(spec, JsonSpec)
    assert list(json.loads(spec.schema)["$defs"]["Item"]["properties"]) == ["name", "price", "colour", "parent"]


@pytest.mark.parametrize(
    ("output", "text", "says"),
    [
        ({"type": "object"}, '{"a": ', "JSON"),
        ({"type": "array", "items": {"type": "integer"}}, '[1, "x"]', r"\$\[1\]"),
        ({"type": "string", "format": "date"}, '"2023-02-30"', "date"),
        (Item, '{"name": "a", "price": -2}', "price"),
    ],
)
def test_what_does_not_fit_is_said(output: Any, text: str, says: str):
    with pytest.raises(OutputError, match=says):
        constraint(output).parse(text)


def test_what_only_pydantic_checks_is_said_with_its_place():
    class Even(BaseModel):
        n: int

        def model_post_init(self, context: object) -> None:
            if self.n % 2:
                raise ValueError("n must be even")

    assert constraint(Even).parse('{"n": 2}').n == 2
    with pytest.raises(OutputError, match="even"):
        constraint(Even).parse('{"n": 3}')


def test_a_type_without_a_schema_is_refused_by_name():
    class Socket:
        pass

    with pytest.raises(SchemaError, match="Socket.*dataclass"):
        constraint(Socket)


def test_outlines_is_imported_only_for_its_own_types():
    code = (
        "import sys, agentkit.output as o, dataclasses;"
        "o.constraint(int); o.constraint({'type': 'object'});"
        "sys.exit('outlines' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
