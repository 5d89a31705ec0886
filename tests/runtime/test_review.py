"""Validate and back up: documents of schemas that the grammar is too wide for are valid all the same, or refused."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import jsonschema
import pytest

from agentkit.runtime.closing import Hints
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import CapacityError, DocumentError
from agentkit.runtime.generation import Generation
from agentkit.runtime.grammar import GrammarCompiler, JsonSpec, Judged, LarkSpec
from agentkit.runtime.request import Chunk, Request, Sampling
from agentkit.runtime.schema.front import inline
from agentkit.runtime.schema.judge import Fault, Judge
from agentkit.runtime.spelling import Spellings
from agentkit.runtime.text import Detokenizer
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import open_checkpoint
from agentkit.script import byte_vocabulary
from agentkit.template import Tag, Tags
from agentkit.turn import CallReady, TurnParser, turn_spec
from tests import tiny
from tests.smol import smol_path

pytestmark = pytest.mark.anyio

Json = dict[str, Any]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny.write(path, "qwen3")
    return path


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with tiny.engine(folder, step_tokens=32, running=16) as made:
        yield made
        made.check()
        assert made.stats().pages_private == 0


def judged(wide: Json, **more: Any) -> LarkSpec:
    """A document of `wide`, which the grammar enforces, and of keywords that nothing but the judge knows of."""
    front = inline(json.dumps(wide), "call")
    strict = Judged(json.dumps({**wide, **more}))
    return LarkSpec(f"start: doc\ndoc: %json {json.dumps(front.schema)}", hints=Hints(json=True), judged=(strict,))


COLOURS = {"type": "array", "items": {"enum": ["red", "green", "blue", "r", "re"]}, "minItems": 3, "maxItems": 4}
UNIQUE = {**COLOURS, "uniqueItems": True}


@dataclass(frozen=True)
class Tool:
    name: str
    schema: Json
    description: str = ""


NOTE: Json = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
WIDE: Json = {**NOTE, "properties": {"to": {"enum": ["a", "b", "c", "d"]}}, "required": ["to"]}
PICK: Json = {**WIDE, "not": {"properties": {"to": {"enum": ["a", "c"]}}}}


class Schemas:
    """Random schemas of which the grammar sees less than the judge."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def pair(self, depth: int = 2) -> tuple[Json, Json]:
        """What the grammar enforces, and the whole schema."""
        kinds = [self.word, self.number] if depth == 0 else [self.word, self.number, self.array, self.object]
        return self.rng.choice(kinds[-2:] if depth == 2 else kinds)(depth)

    def word(self, _: int) -> tuple[Json, Json]:
        if self.rng.random() < 0.5:
            wide: Json = {"enum": self.rng.sample(["red", "re", "r", "blue", "green", "", 1, None, True], 4)}
            return wide, {**wide, "not": {"const": self.rng.choice(wide["enum"])}}
        wide = {"type": "string", "maxLength": 6}
        return wide, {**wide, "not": {"pattern": self.rng.choice(["^[a-z]", "[^a-zA-Z]$"])}}

    def number(self, _: int) -> tuple[Json, Json]:
        wide: Json = {"type": "integer", "minimum": 0, "maximum": 99}
        low = self.rng.randrange(100)
        extra = [
            {"not": {"multipleOf": self.rng.choice([2, 3])}},
            {"oneOf": [{"minimum": low}, {"maximum": low + self.rng.randrange(40)}]},
        ]
        return wide, {**wide, **self.rng.choice(extra)}

    def array(self, depth: int) -> tuple[Json, Json]:
        (wide, strict), bounds = self.pair(depth - 1), {"minItems": self.rng.randrange(3), "maxItems": 4}
        extra = [{"uniqueItems": True}, {"contains": strict, "minContains": 2}]
        return (
            {"type": "array", "items": wide, **bounds},
            {"type": "array", "items": strict, **bounds, **self.rng.choice(extra)},
        )

    def object(self, depth: int) -> tuple[Json, Json]:
        names = ["a", "b", "c"]
        pairs = {name: self.pair(depth - 1) for name in names}
        base: Json = {"type": "object", "additionalProperties": False, "required": names[: self.rng.randrange(2)]}
        extra = [{"minProperties": 2}, {"dependentRequired": {"b": ["c"]}}, {"not": {"required": ["c"]}}]
        return (
            {**base, "properties": {name: wide for name, (wide, _) in pairs.items()}},
            {**base, "properties": {name: strict for name, (_, strict) in pairs.items()}, **self.rng.choice(extra)},
        )


async def run(engine: Engine, **fields: Any) -> Generation:
    async with engine.generate(Request(engine.vocab.encode("tell me"), **fields)) as generation:
        async for _ in generation:
            pass
    assert generation.finish is not None
    return generation


def text(engine: Engine, generation: Generation) -> str:
    return engine.vocab.decode(t for t in generation.ids if t not in engine.vocab.end_ids)


def faults(schema: Json, document: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [error.message for error in validator.iter_errors(json.loads(document))]


# --- what is excluded


@pytest.fixture(scope="module")
def spellings() -> tuple[Vocabulary, Spellings]:
    vocab = open_checkpoint(smol_path()).vocabulary()
    return vocab, Spellings(vocab)


@pytest.mark.parametrize(
    ("text", "string"),
    [(b'"red", 7]', False), (b're d", ', True), (b' \n"", "a"', False), (b"17", False), ('é\\n"'.encode(), True)],
)
def test_what_goes_along_with_a_text_is_every_token_that_may_lead_to_it(
    text: bytes, string: bool, spellings: tuple[Vocabulary, Spellings]
) -> None:
    vocab, made = spellings

    def plain(data: bytes) -> bytes:
        """Without blanks outside of strings; no token that goes along with these texts has one inside of one."""
        return data if string else bytes(byte for byte in data if byte not in b" \t\n\r")

    wanted = text if string else text.replace(b" \n", b"").replace(b", ", b",")
    control = set(vocab.control.values())
    expected = set[int]()
    for token in set(range(vocab.size)) - control:
        data = vocab.token_bytes(token)
        for form in {data, plain(data)}:
            if wanted.startswith(form) or form.startswith(wanted):
                expected.add(token)
    assert set(made.along(text, string)) == expected


def test_what_is_banned_is_legal_in_no_mask_draft_or_completion_until_the_place_is_left() -> None:
    vocab = byte_vocabulary()
    compiler = GrammarCompiler(vocab, vocab.size)
    grammar = compiler.submit(JsonSpec(json.dumps({"enum": ["red", "rose", "blue"]}))).result()
    matcher = grammar.matcher()
    assert matcher.advance(vocab.encode('"')[0])
    red, blue = vocab.encode('red"'), vocab.encode('blue"')
    assert matcher.ban(red[:1])
    assert matcher.validate(red) == 0
    assert not matcher.advance(red[0])
    assert matcher.forced() == []
    assert matcher.completion(20) == blue
    assert not matcher.fork().ban(blue[:1])  # nothing else is left
    assert matcher.validate(blue) == len(blue)
    for token in blue:
        assert matcher.advance(token)
    matcher.rollback(len(blue))
    assert matcher.validate(red) == 0  # at the same place it still holds
    matcher.rollback(1)
    assert matcher.validate(vocab.encode('"red"')) == 5
    compiler.close()


# --- one document


async def test_what_greedy_decoding_repeats_is_decoded_again_and_nothing_before_it(engine: Engine) -> None:
    plain = text(engine, await run(engine, grammar=judged(COLOURS), max_tokens=60))
    assert faults(UNIQUE, plain), "the test needs a model that repeats itself"
    done = await run(engine, grammar=judged(COLOURS, uniqueItems=True), max_tokens=60)
    assert faults(UNIQUE, text(engine, done)) == []
    items = json.loads(plain)
    twice = next(i for i, item in enumerate(items) if item in items[:i])
    assert json.loads(text(engine, done))[:twice] == items[:twice]
    usage = done.finish.usage
    assert usage.retried > 0
    assert usage.decoded + usage.forced == len(done.ids)
    again = await run(engine, grammar=judged(COLOURS, uniqueItems=True), max_tokens=60)
    assert (again.ids, again.finish.usage.retried) == (done.ids, usage.retried)


async def test_where_the_grammar_is_exact_nothing_is_judged(engine: Engine) -> None:
    assert engine.compiler.submit(JsonSpec(json.dumps(COLOURS))).result().review() is None
    branches = [{"type": "string", "pattern": "^[ab]{1,3}$"}, {"type": "string", "pattern": "^[^b]+$"}]
    spec = JsonSpec(json.dumps({"oneOf": branches}))
    assert engine.compiler.submit(spec).result().reports[0][1].status == "verified"
    for seed in range(4):
        done = await run(engine, grammar=spec, max_tokens=20, sampling=Sampling(temperature=2.0, seed=seed))
        assert faults({"oneOf": branches}, text(engine, done)) == []


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In order: ``valid`` and ``fault`` for what the judge says, ``chunk`` for what is handed out."""
    events: list[str] = []
    fault, push = Judge.fault, Generation.push

    def judging(self: Judge, document: str) -> Fault | None:
        found = fault(self, document)
        events.append("valid" if found is None else "fault")
        return found

    def pushing(self: Generation, item: Any) -> None:
        events.extend(["chunk"] * isinstance(item, Chunk))
        push(self, item)

    monkeypatch.setattr(Judge, "fault", judging)
    monkeypatch.setattr(Generation, "push", pushing)
    return events


async def test_nothing_of_a_document_is_handed_out_before_it_is_valid(engine: Engine, heard: list[str]) -> None:
    spec = judged(COLOURS, uniqueItems=True)
    engine.compiler.submit(spec).result()
    heard.clear()
    await run(engine, grammar=spec, max_tokens=60)
    attempts = heard.index("valid") + 1
    assert heard == ["fault"] * (attempts - 1) + ["valid"] + ["chunk"] * (len(heard) - attempts)
    assert attempts > 1 < len(heard) - attempts


async def test_calls_are_judged_where_they_stand_and_what_is_around_them_streams(
    engine: Engine, heard: list[str]
) -> None:
    tags = Tags(Tag("<tool_call>", None), Tag("</tool_call>", None))
    spec = turn_spec([Tool("pick", WIDE), Tool("note", NOTE)], None, tags, choice="required")
    assert isinstance(spec, LarkSpec)
    header = '<tool_call>\n{"name": "pick", "arguments": '
    spec = replace(spec, judged=(Judged(json.dumps(PICK), header),))
    engine.compiler.submit(spec).result()
    picked = noted = retried = 0
    for seed in range(24):
        heard.clear()
        done = await run(engine, grammar=spec, max_tokens=300, sampling=Sampling(temperature=4.0, seed=seed))
        parser = TurnParser(tags)
        events = [e for p in Detokenizer(engine.vocab).feed_many(done.ids) for e in parser.feed(p)]
        for call in (event for event in events if isinstance(event, CallReady)):
            schema = PICK if call.name == "pick" else NOTE
            assert faults(schema, json.dumps(call.arguments)) == []
            picked, noted = picked + (call.name == "pick"), noted + (call.name == "note")
        assert heard[0] == "chunk"
        assert heard.count("valid") == sum(isinstance(e, CallReady) and e.name == "pick" for e in events)
        retried += done.finish.usage.retried > 0
    assert min(picked, noted, retried) > 2


async def test_a_document_that_cannot_be_valid_ends_in_an_error_and_the_next_request_works(engine: Engine) -> None:
    never = judged({"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}, contains={"const": 3})
    with pytest.raises(DocumentError, match=r"the whole document: .* \(contains\)") as caught:
        await run(engine, grammar=never, max_tokens=30)
    assert caught.value.pointer == ""
    assert caught.value.whole
    document = engine.vocab.decode(t for t in caught.value.ids if t not in engine.vocab.end_ids)
    assert faults(never_schema := {"contains": {"const": 3}}, document), never_schema
    assert caught.value.usage.retried > 0
    engine.check()
    assert len((await run(engine, grammar=judged(COLOURS), max_tokens=60)).ids) > 3


async def test_from_the_least_budget_up_a_document_is_valid_and_its_budget_is_what_it_has_in_the_end(
    engine: Engine,
) -> None:
    spec = judged(COLOURS, uniqueItems=True)
    minimum = engine.compiler.submit(spec).result().minimum
    failed: list[str] = []  # where so little is left, a completion that exists is not always found
    for budget, seed in itertools.product((minimum, minimum + 1, minimum + 3, minimum + 20), range(6)):
        try:
            done = await run(engine, grammar=spec, max_tokens=budget, sampling=Sampling(temperature=2.0, seed=seed))
        except DocumentError as error:
            failed.append(str(error))
            continue
        assert faults(UNIQUE, text(engine, done)) == []
        assert len(done.ids) <= budget
    assert len(failed) <= 3
    assert all("uniqueItems" in error for error in failed)


async def test_drafts_log_probabilities_and_stop_texts_are_those_of_what_is_kept(folder: Path) -> None:
    wanted: list[tuple[list[int], list[int]]] = []
    for drafts in (0, 8):
        with tiny.engine(folder, drafts=drafts) as engine:
            spec = judged(COLOURS, uniqueItems=True)
            chunks: list[Chunk] = []
            ids = engine.vocab.encode('["red", "red", "red", "red", "green"]' * 2)
            async with engine.generate(Request(ids, 60, spec, Sampling(logprobs=2), stop=("nowhere",))) as generation:
                chunks = [chunk async for chunk in generation]
            assert faults(UNIQUE, text(engine, generation)) == []
            assert generation.finish.usage.retried > 0
            scored = [chunk for chunk in chunks if chunk.score is not None]
            assert all(chunk.score.token == chunk.ids[0] for chunk in scored)
            assert len(scored) == generation.finish.usage.decoded
            whole = [*ids, *generation.ids]
            exact = (await engine.score(whole, len(ids))).logprobs
            at = 0
            for chunk in chunks:
                if chunk.score is not None:
                    assert chunk.score.logprob == pytest.approx(exact[at], abs=1e-3)
                at += len(chunk.ids)
            wanted.append((generation.ids, [len(chunk.ids) for chunk in chunks]))
            engine.check()
    assert wanted[0] == wanted[1]


# --- what may happen in the middle of a document that is held back


async def _held(engine: Engine, generation: Generation, count: int) -> None:
    """Wait until so many ids are held back."""
    with anyio.fail_after(30):
        while True:
            live = engine._live.get(generation.rid)
            if live is not None and live._review is not None and sum(live._review.counts) >= count:
                return
            await anyio.lowlevel.checkpoint()


@pytest.fixture
def unhurried(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take long enough for a test to meet them in the middle of an output."""
    step = engine.runner.step

    def slowly(plan: Any) -> Any:
        time.sleep(0.002)
        return step(plan)

    monkeypatch.setattr(engine.runner, "step", slowly)


@pytest.mark.usefixtures("unhurried")
async def test_a_fork_takes_what_is_held_back_along_and_goes_its_own_way(engine: Engine) -> None:
    spec = judged(COLOURS, uniqueItems=True)
    prompt = engine.vocab.encode("tell me")
    for count in (2, 9, 16):
        async with engine.generate(Request(prompt, max_tokens=60, grammar=spec)) as parent:
            await _held(engine, parent, count)
            async with engine.fork(parent) as child:
                async for _ in child:
                    pass
            async for _ in parent:
                pass
        assert list(child.request.ids) == prompt
        assert child.ids == parent.ids
        assert faults(UNIQUE, text(engine, child)) == []
        usage = child.finish.usage
        assert usage.decoded + usage.forced == len(child.ids)


@pytest.mark.usefixtures("unhurried")
async def test_preemption_hurry_and_abort_in_a_document_that_is_held_back(engine: Engine) -> None:
    spec = judged(COLOURS, uniqueItems=True)
    whole = await run(engine, grammar=spec, max_tokens=60)
    for count in (3, 12):
        async with engine.generate(Request(engine.vocab.encode("tell me"), max_tokens=60, grammar=spec)) as generation:
            await _held(engine, generation, count)
            engine.preempt(generation.rid)
            async for _ in generation:
                pass
        assert generation.ids == whole.ids
        async with engine.generate(Request(engine.vocab.encode("tell me"), max_tokens=60, grammar=spec)) as generation:
            await _held(engine, generation, count)
            engine.hasten(generation)
            async for _ in generation:
                pass
        assert faults(UNIQUE, text(engine, generation)) == []
        async with engine.generate(Request(engine.vocab.encode("tell me"), max_tokens=60, grammar=spec)) as generation:
            await _held(engine, generation, count)
        engine.check()
        assert generation.ids == []
    assert engine.stats().pages_private == 0


# --- many documents


async def test_random_schemas_at_a_high_temperature_give_valid_documents_or_an_error(engine: Engine) -> None:
    failed: list[str] = []
    retried = [0]

    async def one(seed: int, gate: anyio.Semaphore) -> None:
        wide, strict = Schemas(seed).pair()
        spec = LarkSpec(judged(wide).text, hints=Hints(json=True), judged=(Judged(json.dumps(strict)),))
        budget = random.Random(seed).choice([40, 80, 200])
        async with gate:
            try:
                done = await run(engine, grammar=spec, max_tokens=budget, sampling=Sampling(temperature=2.0, seed=seed))
            except (DocumentError, CapacityError) as error:
                failed.append(f"{seed} {budget} {json.dumps(strict)}: {error}")
                return
        assert faults(strict, text(engine, done)) == [], (seed, strict)
        assert done.finish.usage.decoded + done.finish.usage.forced == len(done.ids) <= budget
        retried[0] += done.finish.usage.retried > 0

    gate = anyio.Semaphore(16)
    async with anyio.create_task_group() as tasks:
        for seed in range(200):
            tasks.start_soon(one, seed, gate)
    assert retried[0] > 50
    assert len(failed) < 20, "\n".join(failed)
