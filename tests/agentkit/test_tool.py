from __future__ import annotations

import enum
import json
import threading
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

import anyio
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from agentkit.schema import clean, parse_docstring, signature
from agentkit.tool import RunContext, Tool, ToolError, tool, toolset


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Address(BaseModel):
    """Where somebody lives."""

    street: str
    title: str = "home"


@dataclass
class Point:
    x: int
    y: float = 0.0


class Options(TypedDict):
    deep: bool


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Opaque:
    pass


@tool
async def read_file(path: str, start_line: int = 1, num_lines: Annotated[int, Field(ge=1)] = 100) -> str:
    """Read part of a text file.

    Lines are numbered.

    Args:
        path: path relative to the
            repository root.
        start_line (int, optional): first line: counted from 1.

    Returns:
        path: not a parameter here.
    """
    return f"{path}:{start_line}+{num_lines}"


@tool
def draw(
    color: Color,
    mode: Literal["fill", "line"],
    at: Point,
    address: Address | None,
    options: Options,
    names: list[list[str]],
    schema: int = 3,
    day: date | None = None,
) -> Point:
    return at


def call(made: Tool[..., Any], arguments: dict[str, Any], context: RunContext[Any] | None = None) -> str:
    async def run() -> str:
        return await made.call(made.validate(arguments), context)

    return anyio.run(run)


def test_a_tool_is_described_by_its_docstring_and_annotations():
    assert read_file.name == "read_file"
    assert read_file.description == "Read part of a text file.\n\nLines are numbered."
    assert read_file.schema == {
        "type": "object",
        "properties": {
            "path": {"type": "string", "description": "path relative to the repository root."},
            "start_line": {"type": "integer", "default": 1, "description": "first line: counted from 1."},
            "num_lines": {"type": "integer", "minimum": 1, "default": 100},
        },
        "required": ["path"],
        "additionalProperties": False,
    }


def test_properties_stand_in_the_order_of_the_parameters():
    order = ["color", "mode", "at", "address", "options", "names", "schema", "day"]
    assert list(draw.schema["properties"]) == order
    assert list(draw.validate(ARGUMENTS)) == order


def test_a_decorated_function_is_still_that_function():
    assert anyio.run(read_file, "a.py") == "a.py:1+100"
    assert draw.function(Color.RED, "fill", Point(1), None, {"deep": True}, []) == Point(1)


ARGUMENTS: dict[str, Any] = {
    "color": "blue",
    "mode": "line",
    "at": {"x": 1},
    "address": {"street": "Elm"},
    "options": {"deep": False},
    "names": [["a"], []],
    "day": "2026-11-23",
}


def test_arguments_become_what_the_annotations_say():
    jsonschema.validate(ARGUMENTS, draw.schema)
    assert draw.validate(ARGUMENTS) == {
        "color": Color.BLUE,
        "mode": "line",
        "at": Point(1, 0.0),
        "address": Address(street="Elm"),
        "options": {"deep": False},
        "names": [["a"], []],
        "schema": 3,
        "day": date(2026, 11, 23),
    }


def test_every_object_with_properties_is_closed_and_titles_are_gone():
    assert "title" in draw.schema["$defs"]["Address"]["properties"]
    for name in ("Address", "Options", "Point"):
        definition = draw.schema["$defs"][name]
        assert definition["additionalProperties"] is False
        assert not isinstance(definition.get("title"), str)


def test_cleaning_leaves_data_alone():
    schema = {"title": "T", "properties": {"title": {"title": "Title", "default": {"title": "kept"}}}}
    assert clean(schema) == {
        "properties": {"title": {"default": {"title": "kept"}}},
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"color": "green"}, "color: .*'red' or 'blue'"),
        ({"at": {"x": "one"}}, "at.x: "),
        ({"size": 1}, "size: "),
    ],
)
def test_wrong_arguments_are_named(changed, words):
    with pytest.raises(ToolError, match=words):
        draw.validate(ARGUMENTS | changed)


def test_all_missing_arguments_are_named():
    with pytest.raises(ToolError, match=r"color: .*mode: .*at: "):
        draw.validate({})


@settings(deadline=None)
@given(st.text(min_size=1), st.integers(), st.integers(min_value=1))
def test_valid_arguments_round_trip(path, start, count):
    arguments = {"path": path, "start_line": start, "num_lines": count}
    assert read_file.validate(arguments) == arguments


def test_the_context_is_injected_and_never_shown():
    @tool
    def who(context: RunContext[dict[str, str]], title: str) -> str:
        return f"{title} {context.deps['user']} {context.tool_name} {context.step}"

    assert list(who.schema["properties"]) == ["title"]
    assert call(who, {"title": "Ms"}, RunContext({"user": "Ada"}, "who", step=2)) == "Ms Ada who 2"
    with pytest.raises(ToolError, match="RunContext"):
        call(who, {"title": "Ms"})


def test_a_sync_function_runs_in_a_thread_and_an_async_one_does_not():
    @tool
    def sync() -> int:
        return threading.get_ident()

    @tool
    async def asynchronous() -> int:
        return threading.get_ident()

    assert int(call(sync, {})) != threading.get_ident()
    assert int(call(asynchronous, {})) == threading.get_ident()


def test_a_call_that_takes_too_long_is_ended():
    release = threading.Event()

    @tool(timeout=0.01)
    def sync() -> None:
        release.wait()

    @tool(timeout=0.01)
    async def asynchronous() -> None:
        await anyio.sleep_forever()

    try:
        for slow in (sync, asynchronous):
            with pytest.raises(TimeoutError, match=f"{slow.name} did not finish within 0.01 seconds"):
                call(slow, {})
    finally:
        release.set()


def test_what_the_function_raises_comes_through():
    @tool
    def fail() -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        call(fail, {})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as is\n", "as is\n"),
        (None, "null"),
        (Point(1, 2.5), '{"x": 1, "y": 2.5}'),
        ([Address(street="Ö")], '[{"street": "Ö", "title": "home"}]'),
        ({"day": date(2026, 1, 2), "ok": True}, '{"day": "2026-01-02", "ok": true}'),
    ],
)
def test_results_become_text(value, text):
    @tool
    def give() -> Any:
        return value

    assert call(give, {}) == text


def test_a_function_declared_to_return_none_is_done():
    @tool
    def act() -> None:
        pass

    assert call(act, {}) == "done"


@pytest.mark.parametrize("value", [Opaque(), b"\xff"])
def test_a_result_without_a_json_form_is_refused(value):
    @tool
    def give() -> Any:
        return value

    with pytest.raises(ToolError, match=f"give returned a {type(value).__name__}"):
        call(give, {})


def bare(path): ...
def variadic(*paths: str): ...
def keywords(**paths: str): ...
def positional(path: str, /): ...
def opaque(thing: Opaque): ...
def unknown(thing: Nowhere): ...  # noqa: F821  # pyright: ignore
def late(path: str, context: RunContext[None]): ...
def default(path: str = Field("a")): ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (bare, "path of bare has no type annotation.*`path: str`"),
        (variadic, r"variadic has \*paths"),
        (keywords, r"keywords has \*\*paths"),
        (positional, "path of positional is positional-only"),
        (opaque, "thing of opaque has a type that JSON cannot express"),
        (unknown, "'Nowhere' of parameter thing of unknown cannot be evaluated"),
        (late, "context of late is a RunContext"),
        (default, "path of default has Field"),
        (print, "is not a function"),
        (lambda: None, "'<lambda>' cannot be the name of a tool"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_with_its_reason(function, words):
    with pytest.raises(ToolError, match=words):
        tool(function)


def test_a_method_is_made_a_tool_when_it_is_bound():
    class Counter:
        total = 0

        def add(self, amount: int) -> int:
            self.total += amount
            return self.total

    with pytest.raises(ToolError, match="bound method"):
        tool(Counter.add)
    assert call(tool(Counter().add), {"amount": 2}) == "2"


def test_options_replace_what_the_function_says():
    @tool(name="docs.search", description="Find.", timeout=3)
    def search(query: str) -> str:
        """Other words."""
        return query

    assert (search.name, search.description, search.timeout) == ("docs.search", "Find.", 3)
    for name in ("", "1st", "a b", "é", "x" * 65, "a\n"):
        with pytest.raises(ToolError, match="cannot be the name"):
            tool(name=name)(search.function)
    with pytest.raises(ToolError, match="timeout"):
        tool(timeout=0)(search.function)


def test_a_toolset_takes_functions_and_refuses_two_of_one_name():
    def search(query: str) -> str:
        return query

    tools = toolset([read_file, search])
    assert list(tools) == ["read_file", "search"]
    assert tools["read_file"] is read_file
    with pytest.raises(ToolError, match="Two tools are called search"):
        toolset([search, tool(search)])


def test_docstrings_in_the_wild():
    parsed = parse_docstring(
        """First line
        goes on: with a colon.

        Args:
            a: one
                note: still a
              still a too
            b (dict[str, (int)], optional): two

            *rest: three
            c:
                four
        After: not an argument.

        Raises:
            ValueError: no.
        """
    )
    assert parsed.description == "First line\ngoes on: with a colon."
    assert parsed.parameters == {
        "a": "one note: still a still a too",
        "b": "two",
        "rest": "three",
        "c": "four",
    }
    assert parse_docstring(None).description == ""
    assert parse_docstring("Returns:\n    x: y").parameters == {}


@settings(deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]\w{0,8}", fullmatch=True),
        st.lists(st.text("abc:() ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_written_parameters_are_read_back(parameters):
    entries = [f"    {name}: " + "\n        ".join(lines) for name, lines in parameters.items()]
    parsed = parse_docstring("Do it.\n\nArgs:\n" + "\n".join(entries) + "\n\nReturns:\n    nothing: at all")
    assert parsed.description == "Do it."
    assert parsed.parameters == {name: " ".join(lines) for name, lines in parameters.items()}


def test_a_signature_is_one_short_line():
    assert signature(read_file.schema) == "path: str, start_line: int = 1, num_lines: int = 100"
    assert signature(draw.schema) == (
        'color: "red" | "blue", mode: "fill" | "line", at: {x: int, y: float = 0.0}, '
        'address: {street: str, title: str = "home"} | null, options: {deep: bool}, '
        "names: list[list[str]], schema: int = 3, day: str | null = null"
    )


def test_a_recursive_type_ends():
    @tool
    def grow(tree: Tree, weights: dict[str, float]) -> None: ...

    assert signature(grow.schema) == "tree: {value: int, children: list[Tree] = []}, weights: dict[str, float]"
    json.dumps(grow.schema)
