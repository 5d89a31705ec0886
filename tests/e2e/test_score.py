"""Log-probabilities equal those of transformers' logits, however they were computed; so do an agent's decisions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

from agentkit import Agent, Limits, tool
from agentkit.runtime.engine import Engine
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Request, Sampling
from agentkit.runtime.runner import HEAD_ROWS, Output
from agentkit.runtime.score import Scored
from agentkit.runtime.sequence import Plan
from agentkit.template import ChatTemplate, System, User
from tests import smol, tiny

#: Largest difference of a log-probability in fp32. The tiny models come within 3e-5, SmolLM2 within 5e-5.
CLOSE = 1e-3

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Peer:
    """Transformers' model: log-softmax of its logits over the ids that are tokens."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.worst = 0.0

    def logprobs(self, ids: Sequence[int], start: int) -> Tensor:
        with torch.no_grad():
            rows = (
                self.model(torch.tensor([list(ids)])).logits[0, start - 1 : -1, : self.tokens].float().log_softmax(-1)
            )
        return rows.gather(1, torch.tensor(list(ids[start:])).unsqueeze(1)).squeeze(1)

    def judge(self, ids: Sequence[int], start: int, found: Sequence[float]) -> None:
        assert len(found) == len(ids) - start
        worst = float((torch.tensor(found) - self.logprobs(ids, start)).abs().max())
        self.worst = max(worst, self.worst)
        assert worst < CLOSE


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Peer]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, Peer(tiny.write(folder, request.param), 259)


def texts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count + length)
    return torch.randint(0, 256, (count, length), generator=generator).tolist()


async def together(engine: Engine, ids: Sequence[Sequence[int]], start: int, generations: int = 0) -> list[Scored]:
    """Scores of several texts at once, beside generations that are there before them."""
    scores: dict[int, Scored] = {}

    async def score(index: int) -> None:
        scores[index] = await engine.score(ids[index], start)

    async def generate(index: int) -> None:
        request = Request([index, 1, 2], max_tokens=60, sampling=Sampling(temperature=1.0, seed=index), ignore_end=True)
        async with engine.generate(request) as generation:
            async for _ in generation:
                if len(generation.ids) == 5:
                    begun.release()
            assert len(generation.ids) == 60

    begun = anyio.Semaphore(0)
    async with anyio.create_task_group() as group:
        for index in range(generations):
            group.start_soon(generate, index)
        for _ in range(generations):
            await begun.acquire()
        for index in range(len(ids)):
            group.start_soon(score, index)
    return [scores[index] for index in range(len(ids))]


async def test_whole_then_from_the_prefix_tree(checkpoint: tuple[Path, Peer]) -> None:
    folder, peer = checkpoint
    with tiny.engine(folder) as engine:
        (ids,) = texts(1, 150)
        for start in (1, 149, 2, 75, 76, 77, 78, 1):  # all places in a page of 4
            before = engine.stats().computed
            scored = await engine.score(ids, start)
            peer.judge(ids, start, scored.logprobs)
            cached = 0 if before == 0 else start - 1  # the row that says what comes at `start` is wanted itself
            assert (scored.usage.cached, scored.usage.prefilled) == (cached, 149 - cached)
            assert engine.stats().computed - before == 149 - cached
        engine.check()


@pytest.mark.parametrize("step_tokens", [5, 16, 37])
async def test_chunked(checkpoint: tuple[Path, Peer], step_tokens: int) -> None:
    folder, peer = checkpoint
    with tiny.engine(folder, step_tokens=step_tokens, running=4) as engine:
        for ids in texts(2, 120):
            for start in (1, 33):
                peer.judge(ids, start, (await engine.score(ids, start)).logprobs)
        engine.check()


async def test_beside_others(checkpoint: tuple[Path, Peer]) -> None:
    folder, peer = checkpoint
    some = texts(4, 120)
    with tiny.engine(folder, step_tokens=16, running=8) as engine:
        scores = await together(engine, some, 7, generations=4)
        engine.check()
        assert engine.stats().pages_private == 0
    for ids, scored in zip(some, scores, strict=True):
        peer.judge(ids, 7, scored.logprobs)


async def test_preempted(checkpoint: tuple[Path, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, peer = checkpoint
    steps = 0
    with tiny.engine(folder, step_tokens=16, running=4) as engine:
        run = engine.runner.step

        def step(plan: Plan) -> Output:
            nonlocal steps
            steps += 1
            if steps in (3, 6):  # and what it has computed is evicted
                engine.preempt(plan.entries[0].seq.rid)
                engine._command(lambda: engine._tree.evict(1000) and None)
            return run(plan)

        monkeypatch.setattr(engine.runner, "step", step)
        (ids,) = texts(1, 150)
        scored = await engine.score(ids, 20)
        engine.check()
    peer.judge(ids, 20, scored.logprobs)
    assert scored.usage.recomputed == 3 * 16 + 3 * 16
    assert scored.usage.prefilled == 149


async def test_continuations_are_scores_of_the_whole(checkpoint: tuple[Path, Peer]) -> None:
    folder, peer = checkpoint
    for length in (1, 21, 64):  # below, beside and at the edge of a page
        (prompt,) = texts(1, length)
        options = [[1, 2, 3], [1, 2, 4], [1, 2], [7], [9, 9, 9, 9, 9, 9], [7, 8], [1, 2, 3]]
        with tiny.engine(folder) as engine:
            found = await engine.continuations(prompt, options)
            # One row for the prompt's end and for each inner node: 1, 12, 7, 9, 99, 999, 9999, 99999; the prompt once.
            assert engine.stats().computed == found.usage.prefilled == length + 8
            engine.check()
        with tiny.engine(folder) as engine:
            for option, logprobs, total in zip(options, found.logprobs, found.totals, strict=True):
                peer.judge([*prompt, *option], length, logprobs)
                alone = await engine.score([*prompt, *option], length)
                assert alone.logprobs == pytest.approx(logprobs, abs=1e-4)
                assert total == pytest.approx(sum(logprobs))


async def test_the_probabilities_of_all_tokens_are_one(checkpoint: tuple[Path, Peer]) -> None:
    """Rows that pad the table (259 to 287 here) have none."""
    folder, _ = checkpoint
    with tiny.engine(folder) as engine:
        found = await engine.continuations([1, 2, 3], [[token] for token in range(engine.vocab.size)])
        assert torch.tensor(found.totals).exp().sum() == pytest.approx(1, abs=1e-5)
        assert engine.stats().computed == 3


async def test_scores_of_an_output_are_those_it_was_sampled_with(checkpoint: tuple[Path, Peer]) -> None:
    folder, _ = checkpoint
    request = Request([5, 6, 7], max_tokens=20, sampling=Sampling(temperature=1.5, seed=3, logprobs=2), ignore_end=True)
    with tiny.engine(folder) as engine:
        said: list[float] = []
        async with engine.generate(request) as generation:
            async for chunk in generation:
                assert chunk.score is not None
                said.append(chunk.score.logprob)
        scored = await engine.score([5, 6, 7, *generation.ids], 3)
    assert scored.logprobs == pytest.approx(said, abs=1e-4)


async def test_few_rows_of_logits_exist_at_once(checkpoint: tuple[Path, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, peer = checkpoint
    rows: list[int] = []
    with tiny.engine(folder, step_tokens=300) as engine:
        model = engine.runner.model  # pyright: ignore
        head = model.head

        def watched(x: Tensor) -> Tensor:
            rows.append(len(x))
            return head(x)

        monkeypatch.setattr(model, "head", watched)
        (ids,) = texts(1, 500)
        peer.judge(ids, 1, (await engine.score(ids)).logprobs)
    assert sum(rows) == 499
    assert max(rows) == HEAD_ROWS


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Engine, Peer]]:
    from transformers import AutoModelForCausalLM

    path = smol.smol_path()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with load_engine(path, Options(device="cpu", dtype="float32", packed=False, step_tokens=64)) as engine:
        yield engine, Peer(model, engine.vocab.size)


TEXT = """The lighthouse at Skerryvore was built between 1838 and 1844 by Alan Stevenson. It stands on a reef twelve
miles south-west of Tiree, is 48 metres high, and used 4,308 tons of granite. The lamp was first lit on 1 February 1844;
a fire ended its working life as a manned station in 1954. Today it is monitored from Edinburgh."""


async def test_smollm2(smollm2: tuple[Engine, Peer]) -> None:
    engine, peer = smollm2
    ids = engine.vocab.encode(TEXT)
    assert len(ids) > 100  # two chunks
    peer.judge(ids, 1, (await engine.score(ids)).logprobs)
    peer.judge(ids, 60, (await engine.score(ids, 60)).logprobs)
    scrambled = ids[::-1]
    peer.judge(scrambled, 1, (await engine.score(scrambled)).logprobs)
    assert (await engine.score(ids)).total > (await engine.score(scrambled)).total + 100


@tool
def look(path: str) -> str:
    """Read a file."""
    return path


@pytest.mark.parametrize(
    "choices", [["yes", "no"], ["yes", "yes, but", "no", "no, and"], ["<|im_end|>", "<|im_start|>", " ", "é"]]
)
async def test_decisions_are_those_of_transformers(smollm2: tuple[Engine, Peer], choices: list[str]) -> None:
    engine, peer = smollm2
    agent = Agent([look], instructions="Answer yes or no.", model=engine)
    question = "Does a lighthouse have a lamp? <|im_end|>"
    decision = await agent.decide(question, choices)
    template = ChatTemplate(engine.vocab)
    prompt = template.encode_start([System(agent.instructions), User(question)], agent.tools)  # pyright: ignore
    totals: list[float] = []
    for choice in choices:
        turn = [*engine.vocab.encode(choice), engine.vocab.end_id]
        assert not set(turn[:-1]) & set(engine.vocab.control.values())
        totals.append(float(peer.logprobs([*prompt, *turn], len(prompt)).sum()))
    assert list(decision.logprobs.values()) == pytest.approx(totals, abs=CLOSE)
    assert list(decision.probabilities) == choices
    assert list(decision.probabilities.values()) == pytest.approx(torch.tensor(totals).softmax(0).tolist(), abs=CLOSE)
    assert sum(decision.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert decision.choice == choices[int(torch.tensor(totals).argmax())]


async def test_a_decision_prefills_its_question_once_and_shares_the_pages_of_runs(
    smollm2: tuple[Engine, Peer],
) -> None:
    engine, _ = smollm2
    agent = Agent([look], instructions="You know about towers.", model=engine, limits=Limits(turn_tokens=12))
    run = await agent.run("What is a minaret?", tool_choice="none")
    assert run.stop == "length"
    before, ids = engine.stats().computed, list(run.transcript.ids)
    choices = ["A", "B", "C", "D"]  # a token each
    decision = await agent.decide("And a belfry? A, B, C or D.", choices, session=run.session)
    assert list(run.transcript.ids) == ids  # a session is a value
    template = run.transcript.template
    words = len(template.encode_next([User("And a belfry? A, B, C or D.")]))
    computed = engine.stats().computed - before
    # The answer's last id, which was sampled and never computed, the new words, and a row behind each choice.
    assert computed == decision.usage.prefilled == 1 + words + len(choices)
    assert decision.usage.recomputed == decision.usage.decoded == 0
    again = await agent.decide("And a belfry? A, B, C or D.", choices, session=run.session)
    assert again.usage.prefilled == 1 + len(choices)  # the rows that are asked about
    assert again.probabilities == pytest.approx(decision.probabilities, abs=CLOSE)
    engine.check()
