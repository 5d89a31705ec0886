"""Extraction: lists, long texts, spans, confidence, on a scripted model and on a random one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field, field_validator

from agentkit import Agent, Extracted, Failed, Limits, OutputError, Sampling, SchemaError, extract, final, scripted
from agentkit.confidence import Confidence
from agentkit.document import Evidence, Leaf, Node, Written, evidence, plain, read
from agentkit.gather import gather
from agentkit.merge import lenient, merge
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import AgentError, CapacityError
from agentkit.runtime.generation import Generation
from agentkit.runtime.request import Request
from agentkit.spans import Finder
from agentkit.split import choose, split
from tests import tiny

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Item(BaseModel):
    number: int
    name: str


class Order(BaseModel):
    customer: str
    total: float
    items: list[Item]
    note: str | None = None


class Even(BaseModel):
    number: int

    @field_validator("number")
    @classmethod
    def _even(cls, number: int) -> int:
        if number % 2:
            raise ValueError("it must be even")
        return number


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A random model that is told of chat turns; a token is a byte."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write(folder, "llama")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    with tiny.engine(folder) as engine:
        yield engine


def one_at_a_time(engine: Engine) -> None:
    """Have a scripted engine's texts and parts take their turns in order."""
    engine.sizes = replace(engine.sizes, running=1)


# lists


@pytest.mark.anyio
async def test_a_list_keeps_its_order_and_one_failure_does_not_sink_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["first", "  ", "third", "fourth"]
    with scripted(final({"number": 2}), final({"number": 3}), final({"number": 5}), final({"number": 4})) as engine:
        one_at_a_time(engine)
        found = await extract(texts, Even, progress=True)
    assert "4/4" in capsys.readouterr().err
    assert isinstance(found[0], Extracted)
    assert found[0].output == Even(number=2)
    assert isinstance(found[1], Failed)
    assert "empty" in str(found[1].error)
    assert isinstance(found[2], Failed)  # refused twice
    assert isinstance(found[2].error, OutputError)
    assert isinstance(found[3], Extracted)
    assert found[3].output == Even(number=4)


@pytest.mark.anyio
async def test_a_refused_record_is_tried_once_more_and_the_model_is_told_why() -> None:
    with scripted(final({"number": 3}), final({"number": 4})):
        found = await extract("three, or four", Even)
    assert found.output == Even(number=4)
    told = "This answer is not accepted: number: Value error, it must be even. Answer again."
    assert found.usage.prefilled > len(told)  # a token is a byte, so the message alone has more
    with scripted(final({"number": 3}), final({"number": 5})), pytest.raises(OutputError, match="must be even"):
        await extract("three, or five", Even)


@pytest.mark.anyio
async def test_what_can_be_read_by_nobody_is_refused_before_a_text_is_read(engine: Engine) -> None:
    assert await extract([], Order, model=engine) == []
    with pytest.raises(SchemaError, match="cannot be an output type"):
        await extract([], object(), model=engine)  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="not valid"):
        await extract(["a", "b"], {"type": "no-such-type"}, model=engine)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text 1 is a PosixPath"):
        await extract(["a", Path("b")], Order, model=engine)  # type: ignore[list-item]
    with pytest.raises(CapacityError, match="instructions take"):
        await extract("a", Order, model=engine, instructions="long " * 200)
    with pytest.raises(ValueError, match="no list of objects"):
        await extract("a", Order, model=engine, keys={"/items": "colour"})
    with pytest.raises(ValueError, match="budget must be at least"):
        await extract("a", Order, model=engine, budget=1)


@pytest.mark.anyio
async def test_no_more_run_at_a_time_than_are_asked_for() -> None:
    running = most = 0

    async def work(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.001 * (item % 3))
        running -= 1
        if item == 99:
            raise KeyError(item)
        return -item

    assert await gather(work, range(30), 4) == [-item for item in range(30)]
    assert most == 4
    with pytest.raises(KeyError):
        await gather(work, range(90, 120), 4)


@pytest.mark.anyio
async def test_a_single_value_is_a_record_too() -> None:
    with scripted(final('"Ann"'), final("red")):
        name = await extract("It is Ann.", str)
        color = await extract("a red thing", Literal["red", "green"])  # type: ignore[arg-type]
    assert (name.output, name.evidence[""].span) == ("Ann", (6, 9))
    assert (color.output, color.evidence[""].span) == ("red", (2, 5))
    with scripted(final("green"), final("red")) as engine:  # of a long text the most confident part says it
        one_at_a_time(engine)
        color = await extract("a text " * 6, Literal["red", "green"], part_tokens=30)  # type: ignore[arg-type]
    assert color.output in ("red", "green")
    assert len(color.parts) == 2


@pytest.mark.anyio
async def test_the_model_is_shown_what_fields_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    class Line(BaseModel):
        price: float = Field(description="with\n  tax")
        parts: list[Line] = []

    class Invoice(BaseModel):
        """No field."""

        number: int = Field(description="of the invoice")
        lines: list[Line] | None = Field(description="bought")

    prompts: list[str] = []
    generate = Engine.generate

    def listening(engine: Engine, request: Request) -> Generation:
        prompts.append(engine.vocab.decode(request.ids))
        return generate(engine, request)

    monkeypatch.setattr(Engine, "generate", listening)
    with scripted(final({"number": 1, "lines": None})):
        await extract("No. 1", Invoice, instructions="Read it.")
    described = "Read it.\n- number: of the invoice\n- lines: bought\n- lines.price: with tax<|im_end|>"
    assert prompts[0].startswith(f"<|im_start|>system\n{described}\n<|im_start|>user\nNo. 1<|im_end|>")


# long texts


@pytest.mark.anyio
async def test_parts_of_a_long_text_are_joined_into_one_record() -> None:
    text = (
        "# One\n"
        + "Ada ordered 7 lamps. " * 4
        + "\n\n# Two\n"
        + "Item 8 is a chair. " * 4
        + "\n\n# Three\nTotal 12.50."
    )
    parts = [
        {"customer": "Ada", "total": None, "items": [{"number": 7, "name": "lamp"}], "note": None},
        {"customer": None, "total": None, "items": [{"number": 7, "name": "Lamp"}, {"number": 8, "name": "chair"}]},
        {"customer": None, "total": 12.5, "items": None, "note": None},
    ]
    with scripted(*map(final, parts)) as engine:
        one_at_a_time(engine)
        found = await extract(text, Order, part_tokens=100)
    assert found.output == Order(
        customer="Ada", total=12.5, items=[Item(number=7, name="lamp"), Item(number=8, name="chair")]
    )
    assert [text[part.start :].split("\n")[0] for part in found.parts] == ["# One", "# Two", "# Three"]
    assert not any(part.unread for part in found.parts)
    at, end = found.evidence["/total"].span or (0, 0)
    assert text[at:end] == "12.50"
    assert at == text.index("12.50")


@pytest.mark.anyio
async def test_a_short_budget_goes_to_what_is_marked_and_says_what_was_not_read() -> None:
    sections = [f"# Part {i}\n" + f"Nothing of note in {i}. " * 3 for i in range(6)]
    sections[4] = "# [IMPORTANT] The order\n" + "Ada pays 5.00 for it. " * 3
    text = "\n\n".join(sections)
    said = {"customer": "Ada", "total": 5.0, "items": [], "note": None}
    with scripted(*[final(said)] * 5) as engine:
        one_at_a_time(engine)
        found = await extract(text, Order, budget=200)
    assert found.output.customer == "Ada"
    read = [text[part.start :].split("\n")[0] for part in found.parts if not part.unread]
    nothing, paid = "Nothing of note in 0. " * 2, "Ada pays 5.00 for it. " * 2
    assert read == ["# Part 0", nothing, "# Part 1", "# [IMPORTANT] The order", paid]
    unread = [part for part in found.parts if part.unread]
    assert len(unread) == 7
    assert all("budget of 200 tokens" in part.unread for part in unread)
    assert sum(part.tokens for part in found.parts if not part.unread) <= 200


@pytest.mark.anyio
async def test_what_no_part_says_is_an_error_that_names_it() -> None:
    text = "Nothing is said. " * 8
    nothing = {"customer": "Ada", "total": None, "items": []}
    with scripted(final(nothing), final(nothing)) as engine:
        one_at_a_time(engine)
        with pytest.raises(OutputError, match="requires: /total"):
            await extract(text, Order, part_tokens=80)


@pytest.mark.anyio
async def test_a_text_longer_than_the_context_is_read_by_a_real_engine(engine: Engine) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}}}
    text = "word and more words. " * 40
    found = await extract([text, "short"], schema, model=engine, max_tokens=40)  # type: ignore[arg-type]
    assert isinstance(found[0], Extracted)
    assert isinstance(found[1], Extracted)
    assert len(found[0].parts) > 2
    assert len(found[1].parts) == 1
    assert found[0].parts[-1].end == len(text)
    for record in found:
        Draft202012Validator(schema).validate(record.output)  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["# H\n", "## h\n", "word ", "end. ", "\n", "\n\n", "é", "x" * 30]), min_size=1, max_size=60
    ),
    st.integers(16, 60),
)
def test_parts_cover_a_text_and_fit(pieces: list[str], size: int) -> None:
    text = "".join(pieces)
    starts = [i for i, char in enumerate(text) for _ in char.encode()]  # a token is a byte
    parts = split(text, starts, size, size // 8, lambda part: len(part.encode()))
    assert parts[0].start == 0
    assert parts[-1].end == len(text)
    for part in parts:
        assert part.tokens == len(text[part.start : part.end].encode()) <= size
    for before, after in pairwise(parts):
        assert before.start < after.start <= before.end < after.end
        assert len(text[after.start : before.end].encode()) <= size // 8


def test_parts_are_cut_at_joints_and_begin_with_a_line_of_the_part_before() -> None:
    text = "A first line.\nA second one.\nA third, and the end.\nOf four lines, the last.\n"
    starts = list(range(len(text)))
    parts = split(text, starts, 56, 28, len)
    assert [text[part.start : part.end] for part in parts] == [
        "A first line.\nA second one.\nA third, and the end.\n",
        "A third, and the end.\nOf four lines, the last.\n",
    ]


def test_marks_are_seen_where_they_stand_first_and_nowhere_else() -> None:
    text = "an [IMPORTANT] word\n\n[important] lower\n\n[IMPORTANT] a line\nand the next\n\nanother\n"
    text += "## [IMPORTANT] head\n\nits text\n\n### deeper\n\nmore\n\n## other\n\nrest\n"
    parts = split(text, list(range(len(text))), 16, 0, len)
    told = "".join(text[part.start : part.end] for part in parts if part.important)
    assert "word" not in told
    assert "lower" not in told
    assert "rest" not in told
    assert "and the" in told
    assert "its text" in told
    assert "more" in told
    chosen = choose(parts, sum(part.tokens for part in parts if part.important))
    assert [part.important for part in chosen] == [not part.unread for part in chosen]


# merging


def node(value: Any, confidence: float = 0.5) -> Node:
    return read(json.dumps(value), lambda written: Leaf(written.value, Evidence(None, confidence)))


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
RECORD = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1},
        "owner": {"$ref": "#/$defs/person"},
        "guest": {"anyOf": [{"$ref": "#/$defs/person"}, {"type": "null"}]},
        "people": {"type": "array", "items": {"$ref": "#/$defs/person"}, "minItems": 1},
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "integer"}], "minItems": 2},
    },
    "required": ["title", "owner", "guest", "people"],
    "additionalProperties": False,
    "minProperties": 4,
    "$defs": {"person": PERSON},
}


def test_a_part_may_leave_every_field_open_but_not_those_of_an_item() -> None:
    wide = Draft202012Validator(lenient(RECORD))
    assert wide.is_valid({"title": None, "owner": None, "guest": None, "people": None, "pair": None})
    assert wide.is_valid({"title": "t", "owner": {"name": None, "age": 3}, "guest": {"name": None}, "people": []})
    assert not wide.is_valid({"title": "", "owner": None, "guest": None, "people": None})
    assert not wide.is_valid({"title": None, "owner": None, "guest": None, "people": [{"name": None}]})
    assert not wide.is_valid({"title": None, "owner": None, "guest": None, "people": None, "pair": [1]})


def test_records_are_joined_field_by_field() -> None:
    ann, bob = {"name": "Ann", "age": 30}, {"name": "Bob"}
    records = [
        node(
            {"title": "early", "owner": {"name": None, "age": 4}, "guest": None, "people": [ann, ann], "pair": [1, 2]}
        ),
        node({"title": "sure", "owner": None, "guest": {"name": None, "age": 5}, "people": None}, 0.9),
        node({"title": None, "owner": {"name": "Eve"}, "guest": None, "people": [{**ann, "name": "ANN "}, bob]}, 0.2),
    ]
    merged = merge(RECORD, records, {})
    assert merged.missing == []
    assert merged.node is not None
    assert plain(merged.node) == {
        "title": "sure",
        "owner": {"name": "Eve", "age": 4},
        "guest": None,  # nobody has its name
        "people": [ann, ann, bob],
        "pair": [1, 2],
    }
    Draft202012Validator(RECORD).validate(plain(merged.node))


def test_items_with_the_same_key_are_one() -> None:
    records = [
        node({"title": "t", "owner": {"name": "o"}, "people": [{"name": "Ann"}, {"name": "Bob", "age": 1}]}),
        node({"title": None, "owner": None, "people": [{"name": "ann", "age": 30}, {"name": "Bob", "age": 2}]}, 0.9),
    ]
    merged = merge(RECORD, records, {"/people": "name"})
    assert merged.node is not None
    assert plain(merged.node)["people"] == [{"name": "ann", "age": 30}, {"name": "Bob", "age": 2}]


def test_what_is_required_and_nowhere_is_named() -> None:
    records = [node({"title": None, "owner": {"name": None, "age": 3}, "guest": None, "people": []})] * 2
    assert merge(RECORD, records, {}).missing == ["/title", "/owner/name"]


# spans


@pytest.mark.parametrize(
    ("text", "value", "place"),
    [
        ("Ann, Annual report of Ann", "Ann", "Ann"),
        ("NO.53 55,57 & 59,\nJALAN SAGU 18", "No.53 55,57 & 59, Jalan Sagu 18", "NO.53 55,57 & 59,\nJALAN SAGU 18"),
        ("27,JALAN DEDAP", "27, JALAN DEDAP", "27,JALAN DEDAP"),
        ("STRASSE 5", "straße 5", "STRASSE 5"),
        ("RM12.50 in 2018", "12.50", "12.50"),
        ("rooms 112 and 12", "12", "12"),
        ("TOTAL 1,234.50 at once", 1234.5, "1,234.50"),
        ("TOTAL 9.00", 9, "9.00"),
        ("from -5 to 5", -5, "-5"),
        ("5 and 15", 15, "15"),
        ("a text", "nowhere", None),
        ("a text", 5, None),
        ("true 1 null", True, None),
        ("a text", "  ", None),
    ],
)
def test_a_value_is_found_where_the_text_has_it(text: str, value: str | float, place: str | None) -> None:
    found = Finder(text).find(value, json.dumps(value))
    assert (None if found is None else text[slice(*found)]) == place


def test_equal_values_take_their_places_one_after_the_other() -> None:
    text = "An Ann, and 9.00, Ann, Anna 9.00"
    finder = Finder(text, 8)
    assert [finder.find(9.0, "9.0") for _ in range(3)] == [(12, 16), (28, 32), (28, 32)]
    assert Finder(text).find("Ann", '"Ann"') == (3, 6)
    assert finder.find("Ann", '"Ann"') == (18, 21)
    assert Finder(text).find("12", '"12"') is None


def test_a_document_is_read_with_the_place_of_every_leaf() -> None:
    text = '{"a~/é": [1.50, {"b": "x\\n\\u00e9", "c": []}],\n  "d": null, "e": {}, "f": true}'
    seen: list[Written] = []

    def leaf(written: Written) -> Leaf:
        seen.append(written)
        return Leaf(written.value, Evidence((written.start, written.end), 1.0))

    tree = read(text, leaf)
    assert plain(tree) == json.loads(text)
    assert [text[w.start : w.end] for w in seen] == ["1.50", '"x\\n\\u00e9"', "null", "true"]
    assert list(evidence(tree)) == ["/a~0~1é/0", "/a~0~1é/1/b", "/d", "/f"]


# confidence


def test_a_stretch_is_as_probable_as_the_tokens_that_reach_into_it() -> None:
    text = '{"a": "né", "b": 12}'
    pieces = ['{"a": "', "n", "é", '", "', 'b": ', "1", "2}"]
    probabilities = [0.5, 0.9, 0.8, 0.7, 1.0, 0.6, 0.25]
    found = Confidence(text, [len(p.encode()) for p in pieces], [math.log(p) for p in probabilities])
    assert found.of(6, 10) == pytest.approx(0.5 * 0.9 * 0.8 * 0.7)  # "né" with its quotes
    assert found.of(17, 19) == pytest.approx(0.6 * 0.25)
    assert found.of(7, 8) == pytest.approx(0.9)


@pytest.mark.anyio
async def test_confidence_is_the_models_own_probability_as_engine_score_gives_it(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 9},
            "kind": {"enum": ["red", "green"]},
            "n": {"type": "integer"},
        },
        "required": ["name", "kind", "n"],
        "additionalProperties": False,
    }
    agent: Agent[Any] = Agent(
        output=schema,  # type: ignore[arg-type]
        instructions="Read.",
        model=engine,
        limits=Limits(turn_tokens=120),
        sampling=Sampling(temperature=1.5, seed=3, logprobs=0),
    )
    result = await agent.run("a red thing")
    turn = result.transcript.spans[-1]
    own = await engine.score(result.transcript.ids[: turn.end], turn.start)
    sampled = [i for i, logprob in enumerate(result.logprobs) if logprob != 0]
    assert len(sampled) == result.usage.decoded
    assert result.usage.forced == len(result.logprobs) - len(sampled) > 20  # keys and punctuation
    for i in sampled:  # before temperature and grammar
        assert result.logprobs[i] == pytest.approx(own.logprobs[i], abs=2e-3)

    found = await extract(
        "a red thing",
        schema,  # type: ignore[arg-type]
        model=engine,
        instructions="Read.",
        max_tokens=120,
        sampling=Sampling(temperature=1.5, seed=3),
    )
    assert found.output == result.output
    document = b"".join(map(engine.vocab.token_bytes, result.transcript.ids[turn.start : turn.end]))
    value = json.dumps(result.output["kind"]).encode()
    start = document.index(value, document.index(b'"kind"') + 6)  # a token is a byte
    kind = math.fsum(result.logprobs[start : start + len(value)])
    assert found.evidence["/kind"].confidence == pytest.approx(math.exp(kind), rel=1e-2)


@pytest.mark.anyio
async def test_what_the_end_of_the_budget_wrote_has_no_confidence(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"s": {"type": "string"}},
        "required": ["s"],
        "additionalProperties": False,
    }
    found = await extract("a", schema, model=engine, max_tokens=24)  # type: ignore[arg-type]
    assert found.evidence["/s"].confidence == 0.0
    with pytest.raises(AgentError):
        await extract("a", schema, model=engine, max_tokens=3)  # type: ignore[arg-type]
    assert (await extract("a", schema, model=engine, max_tokens=24)).output == found.output  # type: ignore[arg-type]
