"""Decisions on a scripted model: what they choose, what they leave alone, what they refuse."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Any

import anyio
import pytest

from agentkit import Agent, AgentError, CapacityError, Usage, call, final, scripted, tool
from agentkit.runtime.vocab import Vocabulary
from agentkit.script import ScriptError
from agentkit.template import User
from tests import qwen

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Mood(Enum):
    GOOD = "good"
    BAD = "bad"


class Level(StrEnum):
    LOW = "low"
    HIGH = "high"


@pytest.mark.parametrize(
    ("choices", "said", "chosen"),
    [
        (["yes", "no"], "no", "no"),
        (("yes", "yes, but", "yes, but no"), "yes", "yes"),  # none is a beginning of another
        (("yes", "yes, but", "yes, but no"), "yes, but", "yes, but"),
        (("yes, but no", "yes, but", "yes"), "yes, but no", "yes, but no"),
        (Mood, "bad", Mood.BAD),
        ([Level.HIGH, Level.LOW], "low", Level.LOW),
        (iter(["<|im_end|>", "<tool_call>"]), "<|im_end|>", "<|im_end|>"),
        (["ja", "naïve 🙂"], "naïve 🙂", "naïve 🙂"),
    ],
)
async def test_the_choice_of_the_script_has_a_probability_of_nearly_one(choices: Any, said: str, chosen: Any) -> None:
    with scripted(final(said)) as engine:
        decision = await Agent([add]).decide("Well?", choices)
        engine.check()
        assert engine.stats().pages_private == 0
    assert decision.choice is chosen or decision.choice == chosen
    assert type(decision.choice) is type(chosen)
    assert decision.probabilities[chosen] > 0.999
    assert sum(decision.probabilities.values()) == pytest.approx(1)
    assert list(decision.probabilities) == list(decision.logprobs)
    assert decision.logprobs[chosen] == pytest.approx(0, abs=1e-6)
    assert (decision.usage.decoded, decision.usage.forced) == (0, 0)


async def test_below_the_threshold_there_is_no_choice() -> None:
    agent = Agent()
    with scripted(final("a"), final("a"), final("a")):
        assert (await agent.decide("?", ["a", "b"], abstain=0.999)).choice == "a"
        assert (await agent.decide("?", ["a", "b"], abstain=0.0)).choice == "a"
        # Nothing is quite certain: the others have a little.
        decision = await agent.decide("?", [*"abcdefgh"], abstain=1.0)
    assert decision.probabilities["a"] < 1
    assert decision.choice is None


async def test_a_decision_continues_a_session_and_leaves_it_alone() -> None:
    agent = Agent([add], instructions="Be brief.")
    with scripted(call("add", a=1, b=2), final("3"), final("yes"), final("Because.")) as engine:
        first = await agent.run("1 + 2?")
        ids, before = list(first.transcript.ids), engine.stats().computed
        decision = await agent.decide("Sure?", ["yes", "no"], session=first.session)
        assert list(first.transcript.ids) == ids
        words = len(first.transcript.template.encode_next([User("Sure?")]))
        assert engine.stats().computed - before == words + len("yes") + len("no")  # a token for each byte
        assert decision.usage == Usage(cached=2 * len(ids) + words, prefilled=words + 5)
        second = await agent.run("Why?", session=first.session)
        assert list(second.transcript.ids[: len(ids)]) == ids
        assert "Sure?" not in engine.vocab.decode(second.transcript.ids)
        with pytest.raises(AgentError, match="other tools"):
            await Agent().decide("?", ["yes", "no"], session=first.session)


async def test_decisions_beside_each_other_keep_to_their_own_lines() -> None:
    answers = [*"abcdefgh"]
    found: dict[str, str | None] = {}

    async def one(answer: str) -> None:
        decision = await Agent().decide(f"{answer}?", answers)
        found[answer] = decision.choice

    with scripted(*map(final, answers)):
        async with anyio.create_task_group() as group:
            for answer in answers:
                group.start_soon(one, answer)
    assert sorted(str(choice) for choice in found.values()) == answers


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ([], "has 0 of them"),
        (["yes"], "has 1 of them"),
        ("yes", "is the text 'yes'"),
        (["yes", ""], "holds ''"),
        (["yes", "no", "yes"], "'yes' twice"),
        ([Mood.GOOD, "good"], "'good' twice"),
        (["yes", True], "holds True"),
        ([1, 2], "holds 1"),
        ([Enum("Size", {"S": 1}).S, "a"], "holds <Size.S: 1>"),  # pyright: ignore
        (["\ud800", "\ud801"], "the same tokens"),  # neither can be encoded
    ],
)
async def test_choices_that_are_none_are_refused_and_the_next_ones_work(choices: Any, named: str) -> None:
    with scripted(final("yes")):
        with pytest.raises(ValueError, match=named):
            await Agent().decide("?", choices)
        assert (await Agent().decide("?", ["yes", "no"])).choice == "yes"


async def test_what_cannot_be_asked_is_refused_and_the_next_question_works() -> None:
    with scripted(final("yes")):
        for abstain in (-0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match="abstain must lie between 0 and 1"):
                await Agent().decide("?", ["yes", "no"], abstain=abstain)
        with pytest.raises(CapacityError, match="Shorten"):
            await Agent().decide("x" * 300_000, ["yes", "no"])
        assert (await Agent().decide("?", ["yes", "no"])).choice == "yes"


async def test_a_script_must_choose_one_of_the_choices() -> None:
    named = "'maybe', which is none of the choices 'yes' and 'no'"
    with pytest.raises(ScriptError, match=named), scripted(final("maybe")):
        await Agent().decide("?", ["yes", "no"])
    with pytest.raises(ScriptError, match="none of the choices"), scripted(call("add", a=1, b=2)):
        await Agent([add]).decide("?", ["yes", "no"])
    with pytest.raises(ScriptError, match="one more turn"), scripted():
        await Agent().decide("?", ["yes", "no"])
    with pytest.raises(ScriptError, match="not used"), scripted(final("yes"), final("no")):
        await Agent().decide("?", ["yes", "no"])


async def test_on_the_qwen3_tokenizer_choices_share_their_first_tokens() -> None:
    vocab = Vocabulary.from_folder(qwen.qwen_folder())
    choices = ["a bug in the cache", "a bug in the tree", "no bug"]
    tokens = [vocab.encode(choice) for choice in choices]
    inner = {tuple(ids[:size]) for ids in tokens for size in range(1, len(ids) + 1)}
    with scripted(final(choices[1]), vocab=vocab) as engine:
        decision = await Agent([add]).decide("What is it?", choices)
        computed = engine.stats().computed
    assert decision.choice == choices[1]
    assert computed == decision.usage.prefilled
    prompt = computed - len(inner)
    assert decision.usage.cached == 2 * prompt + 4  # "a bug in the" has been computed with the longest
