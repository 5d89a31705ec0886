"""How sure a model was of each value it wrote, from the log-probabilities of its tokens."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate


class Confidence:
    """The probabilities of a text's tokens, by place in the text.

    A stretch of text is as probable as its tokens together: the product over every token of which at least one byte
    lies in it. What the grammar forced has probability 1. What was sampled has the model's own probability, before
    temperature and grammar: where the model would rather have written what the grammar does not allow, that counts
    against the value, as it is a doubt of the model as well. It is a joint probability and not a mean over the tokens:
    it answers "how often would the model write exactly this here", and one doubtful digit is not averaged away.

    Args:
        text: of the tokens; one more token behind it, which ends it, takes the place of one character.
        sizes: bytes of each token.
        logprobs: natural log-probability of each token.
    """

    def __init__(self, text: str, sizes: Sequence[int], logprobs: Sequence[float]) -> None:
        if len(sizes) != len(logprobs):
            raise ValueError(f"{len(sizes)} tokens have {len(logprobs)} log-probabilities")
        self._ends = list(accumulate(sizes))
        self._logprobs = logprobs
        # Where each character begins, in bytes; of ASCII text where it is.
        self._bytes = None if text.isascii() else [0, *accumulate(len(char.encode()) for char in text + "\0")]

    def of(self, start: int, end: int) -> float:
        """The probability of a stretch of characters, between 0 and 1."""
        if self._bytes is not None:
            start, end = self._bytes[start], self._bytes[end]
        first = bisect_right(self._ends, start)  # the first token that ends behind the start
        last = bisect_left(self._ends, end) + 1  # the first that begins at or behind the end
        return math.exp(min(0.0, math.fsum(self._logprobs[first:last])))
