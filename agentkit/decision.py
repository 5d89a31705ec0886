"""A question with given answers: how likely the model is to say each of them, without a word of output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Generic, TypeVar

from agentkit.runtime.request import Usage

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine
    from agentkit.runtime.vocab import Vocabulary

C = TypeVar("C", bound=str | Enum)


@dataclass(frozen=True, slots=True)
class Decision(Generic[C]):
    """The answer of `Agent.decide`.

    Attributes:
        choice: the most likely one; None if its probability is below ``abstain``.
        probabilities: of each choice, together 1.
        logprobs: of each choice the natural log-probability that the model's turn is that text and nothing else. Where
            all are low, the model would have said something else, and the probabilities tell little.
        usage: tokens it cost; those of the choices count as prompt.
    """

    choice: C | None
    probabilities: Mapping[C, float]
    logprobs: Mapping[C, float]
    usage: Usage


def texts(choices: Iterable[C]) -> dict[C, str]:
    """What the model would say for each choice.

    Raises:
        ValueError: fewer than two, one that is empty, no text, or there twice.
    """
    if isinstance(choices, str):
        raise ValueError(f"choices is the text {choices!r}: give a list of texts, or an Enum of them")
    said: dict[C, str] = {}
    for choice in choices:
        text: object = choice.value if isinstance(choice, Enum) else choice
        if not isinstance(text, str) or not text:
            raise ValueError(f"choices holds {choice!r}: give texts that are not empty, or Enum members of such texts")
        if text in said.values():
            raise ValueError(f"choices holds {text!r} twice")
        said[choice] = text
    if len(said) < 2:
        raise ValueError(f"choices has {len(said)} of them: there is something to decide among two or more")
    return said


async def decide(engine: Engine, prompt: Sequence[int], said: Mapping[C, str], abstain: float) -> Decision[C]:
    """Weigh what the model may say next.

    A choice is scored as a whole turn, its text and the token that ends it, so that none is the beginning of another
    and "yes" is told from "yes, but". A choice's probability is its share of all choices' joint probabilities, with no
    correction for length.

    Args:
        engine: the model.
        prompt: ids of the conversation, up to where the model's turn begins.
        said: text of each choice, as from `texts`.
        abstain: probability that the choice must reach.

    Raises:
        ValueError: two choices are the same tokens.
        CapacityError: the question can never fit.
    """
    found = await engine.continuations(prompt, _turns(engine.vocab, list(said.values())))
    totals = dict(zip(said, found.totals, strict=True))
    best = max(totals, key=totals.__getitem__)
    weights = {choice: math.exp(total - totals[best]) for choice, total in totals.items()}
    sum_of_all = math.fsum(weights.values())
    probabilities = {choice: weight / sum_of_all for choice, weight in weights.items()}
    return Decision(best if probabilities[best] >= abstain else None, probabilities, totals, found.usage)


def _turns(vocab: Vocabulary, said: Sequence[str]) -> list[list[int]]:
    """Ids of each text as a whole turn. Texts are encoded as data: what looks like a control token in one is none."""
    turns = [[*vocab.encode(text), vocab.end_id] for text in said]
    for i, turn in enumerate(turns):
        if turn in turns[:i]:  # characters that the vocabulary lacks are written alike
            raise ValueError(f"choices {said[turns.index(turn)]!r} and {said[i]!r} are the same tokens to this model")
    return turns
