"""Drafts: guesses beside a brute-force search, and outputs that are the same with them as without."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from agentkit.runtime.draft import Drafter
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import SchemaError
from agentkit.runtime.generation import Generation
from agentkit.runtime.grammar import JsonSpec, Matcher
from agentkit.runtime.live import Live
from agentkit.runtime.request import Chunk, Request, Sampling
from agentkit.template import Tag, Tags
from agentkit.turn import turn_spec
from tests import tiny

pytestmark = pytest.mark.anyio

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
SEEDED = Sampling(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=11)


# guesses


def longest(ids: list[int]) -> int:
    """The most ids at the end that also stand before some earlier place, by comparing all."""
    best = 0
    for place in range(1, len(ids)):
        length = 0
        while length < place and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        best = max(best, length)
    return best


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=14),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_a_guess_goes_on_from_an_earlier_match(prompt: list[int], chunks: list[list[int]]) -> None:
    drafter, ids = Drafter(prompt), list(prompt)
    for chunk in [None, *chunks]:
        if chunk is not None:
            drafter.observe(tuple(chunk))
            ids += chunk
        drafter.propose(4)
        guess = drafter.guess(5)
        if longest(ids) < 2 or (len(chunks) and len(ids) < 2):
            continue
        assert guess
        # Some earlier place goes on as guessed, and what stands before it matches in at least two ids.
        again = [*ids, *guess]
        assert any(
            ids[place - 2 : place] == ids[-2:] and again[place : place + 5] == guess for place in range(2, len(ids))
        )


def test_drafts_begin_where_guesses_are_right_and_end_where_they_are_not() -> None:
    text = list(range(100, 160))
    drafter = Drafter([*text, 1, 2, 3])
    for token in text[:12]:
        drafter.observe((token,))
    assert drafter.propose(8) == text[12:20]
    rng = random.Random(1)
    wrong = Drafter([*(pair for i in range(40) for pair in (7, 8, 200 + i)), 7])
    drafts = 0
    for i in range(60):
        wrong.observe((8 if i % 3 == 0 else 300 + rng.randrange(10_000) if i % 3 == 1 else 7,))
        drafts += bool(wrong.propose(8)) if i > 20 else 0
    assert drafts <= 12


def test_a_fork_of_a_drafter_is_its_own() -> None:
    drafter = Drafter([1, 2, 3, 4, 1, 2])
    fork = drafter.fork()
    fork.observe((9,))
    fork.propose(4)
    assert drafter.guess(2) == [3, 4]
    assert fork.guess(2) == []


def test_a_long_prompt_is_indexed_at_once() -> None:
    rng = random.Random(0)
    ids = [rng.randrange(150_000) for _ in range(100_000)]
    assert Drafter([*ids, *ids[500:503]]).guess(4) == ids[503:507]


# outputs


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """One that never drafts, one that may."""
    folder = tmp_path_factory.mktemp("qwen3")
    tiny.write(folder, "qwen3")
    with tiny.engine(folder, drafts=False) as plain, tiny.engine(folder, running=8, step_tokens=16) as drafting:
        yield plain, drafting
        for engine in (plain, drafting):
            engine.check()
            assert engine.stats().pages_private == 0


async def run(engine: Engine, request: Request) -> tuple[list[Chunk], Generation]:
    async with engine.generate(request) as generation:
        chunks = [chunk async for chunk in generation]
    return chunks, generation


def oracle(monkeypatch: pytest.MonkeyPatch, whole: list[int], seed: int) -> None:
    """Let drafts be what will come, or wrong from some place on."""
    rng = random.Random(seed)

    def propose(self: Drafter, most: int) -> list[int]:
        done = len(self._ids) + sum(map(len, self._news))
        draft = whole[done : done + rng.randint(0, max(most, 0))]
        if draft and rng.random() < 0.5:
            draft[rng.randrange(len(draft))] = rng.randrange(97, 123)
        return draft

    monkeypatch.setattr(Drafter, "propose", propose)


async def same(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch, request: Request) -> Generation:
    plain, drafting = engines
    want, expected = await run(plain, request)
    oracle(monkeypatch, [*request.ids, *expected.ids], len(expected.ids))
    # Ids of an earlier run are cached; another namespace counts the prompt anew.
    got, generation = await run(drafting, replace(request, namespace=str(random.random())))
    assert generation.ids == expected.ids
    assert [(c.ids, c.closing) for c in got] == [(c.ids, c.closing) for c in want]
    for one, other in zip(got, want, strict=True):
        assert (one.score is None) == (other.score is None)
        if one.score is not None and other.score is not None:
            assert one.score.token == other.score.token
            assert one.score.logprob == pytest.approx(other.score.logprob, abs=1e-3)
    assert generation.finish is not None
    assert expected.finish is not None
    usage, bare = generation.finish.usage, expected.finish.usage
    assert (generation.finish.reason, usage.decoded, usage.forced) == (
        expected.finish.reason,
        bare.decoded,
        bare.forced,
    )
    assert (bare.drafted, bare.accepted) == (0, 0)
    assert 0 <= usage.accepted <= usage.drafted
    return generation


@pytest.mark.parametrize("sampling", [Sampling(), SEEDED, Sampling(logprobs=2), replace(SEEDED, logprobs=2)])
async def test_text_is_the_same(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    request = Request(engines[0].vocab.encode("hello"), max_tokens=60, ignore_end=True, sampling=sampling)
    usage = (await same(engines, monkeypatch, request)).finish.usage  # pyright: ignore
    assert usage.accepted > 10
    assert usage.drafted > usage.accepted
    assert usage.decoded == 60


@pytest.mark.parametrize("tokens", [*range(1, 14)])
async def test_every_limit_is_kept(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    request = Request(engines[0].vocab.encode("abc"), max_tokens=tokens, ignore_end=True, sampling=SEEDED)
    assert len((await same(engines, monkeypatch, request)).ids) == tokens


async def test_a_stop_text_ends_the_output_within_a_draft(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = engines[0]
    request = Request(plain.vocab.encode("hello"), max_tokens=60, ignore_end=True, sampling=SEEDED)
    _, whole = await run(plain, request)
    texts = [plain.vocab.decode(whole.ids[at : at + 3]) for at in range(12, 50)]
    stops = [text for text in texts if text.isascii()][::6]
    assert stops  # half a character decodes to what no output holds
    for stop in stops:
        assert len((await same(engines, monkeypatch, replace(request, stop=(stop,)))).ids) < 60


@pytest.mark.parametrize("budget", [20, 24, 31, 45, 80])
@pytest.mark.parametrize("sampling", [Sampling(), SEEDED])
async def test_documents_are_the_same_and_close_in_the_same_place(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch, budget: int, sampling: Sampling
) -> None:
    request = Request(engines[0].vocab.encode("x"), max_tokens=budget + 10, grammar=JsonSpec(SCHEMA), sampling=sampling)
    generation = await same(engines, monkeypatch, request)
    ids = [t for t in generation.ids if t not in engines[0].vocab.end_ids]
    json.loads(engines[0].vocab.decode(ids))


class Look:
    name, description, schema = "look", "", json.loads(SCHEMA)


async def test_turns_are_the_same(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    tags = Tags(Tag("<call>", None), Tag("</call>", None))
    spec = turn_spec([Look()], None, tags, choice="required", parallel=False)  # pyright: ignore
    for sampling in (Sampling(), SEEDED):
        request = Request(engines[0].vocab.encode("go"), max_tokens=140, grammar=spec, sampling=sampling)
        generation = await same(engines, monkeypatch, request)
        assert generation.finish.usage.accepted > 0  # pyright: ignore


async def test_a_fork_midway_goes_on_as_its_parent(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, drafting = engines
    request = Request(plain.vocab.encode("hello"), max_tokens=60, ignore_end=True, sampling=SEEDED)
    _, whole = await run(plain, request)
    oracle(monkeypatch, [*request.ids, *whole.ids], 5)
    children: list[Generation] = []
    async with drafting.generate(request) as parent:
        async for _ in parent:
            if len(parent.ids) in (5, 18):
                children.append(drafting.fork(parent))
            if len(parent.ids) == 12:
                drafting.preempt(parent.rid)
    assert parent.ids == whole.ids
    for child in children:
        async with child:
            async for _ in child:
                pass
        assert [*child.request.ids, *child.ids] == [*request.ids, *whole.ids]


async def test_a_grammar_that_fails_where_a_wrong_guess_leads_ends_nothing(
    engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks can be filled up to one drafted id; from there on they raise."""
    fill_rows, fill = Live.fill, Matcher.fill
    known: dict[int, int] = {}
    raised: list[int] = []

    def noted(self: Live, masks: Tensor) -> None:
        if self.matcher is not None:
            known[id(self.matcher)] = len(self.matcher._ids)
        fill_rows(self, masks)

    def failing(self: Matcher, row: NDArray[np.int32]) -> None:
        if len(self._ids) > known.get(id(self), 1 << 30) + 1:
            raised.append(len(self._ids))
            raise SchemaError("the grammar became too complex")
        fill(self, row)

    monkeypatch.setattr(Live, "fill", noted)
    monkeypatch.setattr(Matcher, "fill", failing)
    request = Request(engines[0].vocab.encode("x"), max_tokens=60, grammar=JsonSpec(SCHEMA), sampling=SEEDED)
    with anyio.fail_after(60):
        generation = await same(engines, monkeypatch, request)
    assert raised
    assert generation.finish is not None
    assert generation.finish.usage.accepted > 0


class Broken:
    """llguidance's state once a grammar has become too complex: nothing goes on from there."""

    def is_error(self) -> bool:
        return True

    def rollback(self, n: int) -> bool:
        raise AssertionError("no way back from an error")


def test_the_journal_leads_out_of_an_error(engines: tuple[Engine, Engine]) -> None:
    engine = engines[0]
    matcher = engine.compiler.submit(JsonSpec(SCHEMA)).result().matcher()
    ids = engine.vocab.encode('{"name": "ab')
    assert all(map(matcher.advance, ids))
    before, after = (np.zeros(-(-engine.runner.vocab_size // 32), dtype=np.int32) for _ in range(2))
    matcher.fill(before)
    assert all(map(matcher.advance, engine.vocab.encode('c", "a')))
    matcher._llm = Broken()  # pyright: ignore
    matcher.rollback(6)
    matcher.fill(after)
    assert np.array_equal(before, after)
    assert matcher.advance(engine.vocab.encode("z")[0])
