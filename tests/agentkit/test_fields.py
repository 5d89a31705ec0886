"""Documents as they grow: events against `json.loads`, partial values against pydantic."""

from __future__ import annotations

import datetime
import enum
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Annotated, Any, Literal, NotRequired

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel, TypeAdapter, field_validator
from typing_extensions import TypedDict

from agentkit.fields import Document, FieldDelta, FieldEvent, FieldReady, FieldStarted
from agentkit.partial import Draft

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def follow(text: str, size: int = 1) -> list[FieldEvent]:
    document, events = Document(), list[FieldEvent]()
    for at in range(0, len(text), size):
        assert document.feed(text[at : at + size], events) == len(text[at : at + size])
    document.end(events)
    assert document.complete
    return events


@given(VALUES, st.booleans(), st.sampled_from([None, 0, 2]), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_the_events_tell_the_whole_document_however_it_is_cut(value: Any, ascii: bool, indent: int | None, size: int):
    text = json.dumps(value, ensure_ascii=ascii, indent=indent)
    events = follow(text, size)
    assert json.dumps(events[-1].value) == json.dumps(json.loads(text))  # pyright: ignore
    open_fields: list[Any] = []
    grown: dict[Any, str] = {}
    for event in events:
        if isinstance(event, FieldStarted):
            assert event.path[:-1] == (open_fields[-1] if open_fields else ())
            open_fields.append(event.path)
            kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
            assert event.kind == kinds.get(type(at(value, event.path)), "number")
            grown[event.path] = ""
        elif isinstance(event, FieldDelta):
            assert event.text
            assert event.path == open_fields[-1]
            grown[event.path] += event.text
        else:
            assert event.path == open_fields.pop()
            if isinstance(event.value, str):
                assert grown[event.path] == event.value
            assert json.dumps(at(value, event.path)) == json.dumps(event.value)
    assert open_fields == []


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_a_document_ends_where_its_text_goes_on():
    document, events = Document(2), list[FieldEvent]()
    assert document.feed('{"a": "}"}}\n', events) == len('{"a": "}"}')
    assert events == [
        FieldStarted((), "object", 2),
        FieldStarted(("a",), "string", 2),
        FieldDelta(("a",), "}", 2),
        FieldReady(("a",), "}", 2),
        FieldReady((), {"a": "}"}, 2),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: ['{"text": "', *["word "] * n, '"}'],
        lambda n: ["[", *['{"a": [1, "x\\n"]}, '] * n, "0]"],
    ],
    ids=["one long string", "many items"],
)
def test_the_work_of_a_stream_is_linear_in_its_deltas(make: Callable[[int], list[str]]):
    """Counted are the lines that Python runs, in the parser and in the draft."""

    def lines(n: int) -> int:
        document, draft, count = Document(), Draft(dict), 0

        def trace(frame: FrameType, what: str, arg: object) -> Any:
            nonlocal count
            count += 1
            return trace

        longest = 0
        sys.settrace(trace)
        try:
            for delta in make(n):
                events: list[FieldEvent] = []
                document.feed(delta, events)
                longest = max(longest, len(events))
                for event in events:
                    draft.take(event)
        finally:
            sys.settrace(None)
        assert longest < 20
        return count

    lines(10)  # what is done once
    assert lines(4000) <= 2.05 * lines(2000)


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    label: str = "p"
    tags: list[str] = field(default_factory=list)


class Extra(TypedDict):
    a: str
    b: NotRequired[int]


class Item(BaseModel):
    name: str
    price: float
    when: datetime.date | None = None
    inner: Item | None = None


class Order(BaseModel):
    title: str = Field(alias="Title", min_length=3)
    colour: Colour
    items: list[Item]
    point: Point
    extra: Extra
    by_number: dict[int, str]
    pair: tuple[int, str]
    words: set[str]
    numbers: RootModel[list[int]]
    either: Item | Point
    kind: Literal["one", "two"]
    free: Any
    note: Annotated[str, Field(max_length=100)] = "none"


DOCUMENT = {
    "Title": "hi 🫨 there",
    "colour": "red",
    "items": [{"name": "n", "price": 3, "when": "2026-01-01", "inner": {"name": "q", "price": 1.5}}],
    "point": {"x": 4},
    "extra": {"a": "text"},
    "by_number": {"1": "one"},
    "pair": [1, "two"],
    "words": ["a", "b"],
    "numbers": [1, 2],
    "either": {"name": "u", "price": 2},
    "kind": "two",
    "free": {"y": [1, {"z": None}]},
}


def partials(output: Any, text: str) -> list[Any]:
    """The partial values after each character."""
    document, draft, found = Document(), Draft(output), list[Any]()
    for char in text:
        events: list[FieldEvent] = []
        document.feed(char, events)
        for event in events:
            draft.take(event)
        found.append(draft.value())
    events = []
    document.end(events)
    for event in events:
        draft.take(event)
    return [*found, draft.value()]


@pytest.mark.parametrize(
    ("output", "value"),
    [
        (Order, DOCUMENT),
        (list[Item], DOCUMENT["items"]),
        (Item | None, None),
        (dict[str, list[Point]], {"a": [{"x": 1}], "b": []}),
        (float, 3),
        (datetime.date | int, "2026-01-01"),
        (tuple[int, ...], [1, 2]),
        (RootModel[str], "text"),
        (Item | Point, {"x": 3}),
        (Item | list[Item] | str, DOCUMENT["items"]),
    ],
)
def test_a_complete_draft_is_what_pydantic_makes_of_the_document(output: Any, value: Any):
    assert partials(output, json.dumps(value))[-1] == TypeAdapter(output).validate_json(json.dumps(value))


def test_a_partial_has_the_type_of_the_output_and_only_grows():
    found = [one for one in partials(Order, json.dumps(DOCUMENT)) if one is not None]
    assert all(type(one) is Order for one in found)
    assert found[0] == Order.model_construct(**dict.fromkeys(Order.model_fields))
    assert any(one.title == "hi 🫨 th" for one in found)
    sizes = [len(one.model_fields_set) for one in found]
    assert sizes == sorted(sizes)
    growing = next(one for one in found if one.items and one.items[0].inner is not None)
    assert type(growing.items[0].inner) is Item
    assert growing.items[0].when == datetime.date(2026, 1, 1)
    assert (growing.point, growing.either) == (None, None)
    assert not any(type(one.items[0].when) is str for one in found if one.items)
    point = next(one.point for one in found if one.point is not None)
    assert (point.x, point.label) == (None, None)


def test_a_union_is_told_by_the_kind_of_value_or_else_at_its_end():
    """``null`` in particular never looks like the beginning of an object."""
    assert partials(Item | None, "null") == [None] * 5
    assert partials(Point | str | int, '"ab"')[:3] == ["", "a", "ab"]
    assert type(partials(Point | list[str], '{"x": 1')[2]) is Point
    assert partials(Point | Item, '{"x": 1')[-1] is None


def test_a_partial_is_a_copy():
    found = partials(list[Item], '[{"name": "ab", "price": 1}]')
    assert [one[0].name for one in found if one and one[0].name][:2] == ["a", "ab"]
    assert len({id(one) for one in found if one is not None}) > 20


def test_no_validator_sees_a_partial():
    seen: list[Any] = []

    class Checked(BaseModel):
        name: str = Field(min_length=3)
        total: int = Field(gt=10)
        secret: Literal["a"] | datetime.date

        @field_validator("name")
        @classmethod
        def check(cls, value: str) -> str:
            seen.append(value)
            raise ValueError(value)

        def model_post_init(self, context: Any) -> None:
            raise AssertionError

    found = partials(Checked, '{"name": "x", "total": 3, "secret": "no date"}')
    assert (found[-1].name, found[-1].total, found[-1].secret) == ("x", 3, None)
    assert seen == []
