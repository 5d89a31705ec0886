"""How long a run may take. A limit never raises: it takes the tools away, and the model answers with what it has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

#: Of a run's token limit, the share kept back so that there is room to answer.
_RESERVE = 4
#: Of the context, the share kept back for the same; at most as much as a turn may take.
_CONTEXT_RESERVE = 32

LimitName = Literal["steps", "tokens", "seconds", "context"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one run.

    Attributes:
        steps: turns of the model; in the last one it must answer.
        tokens: tokens the model may put out over the whole run.
        seconds: wall-clock time; tools that still run then are cancelled, and the model answers.
        calls: how often one tool may be called over the whole run; then the model can no longer choose it.
        turn_tokens: tokens of one turn.
        result_tokens: tokens of one tool result; of a longer one, head and tail are kept.
    """

    steps: int = 10
    tokens: int | None = None
    seconds: float | None = None
    calls: int | None = None
    turn_tokens: int = 1024
    result_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "seconds", "calls", "turn_tokens", "result_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}; None means no limit where it is allowed")


@dataclass(slots=True)
class Meter:
    """What a run has used of its limits.

    Attributes:
        limits: of the run.
        context: most tokens the conversation may have.
        log: the conversation; it grows.
        tools: whether there are any to take away.
    """

    limits: Limits
    context: int
    log: Sequence[int]
    tools: bool
    step: int = 0
    tokens: int = 0
    calls: dict[str, int] = field(default_factory=dict[str, int])
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        """Time left, at least 0; None without a limit."""
        if self.limits.seconds is None:
            return None
        return max(0.0, self.limits.seconds - (time.monotonic() - self.started))

    @property
    def room(self) -> int:
        """Tokens that still fit the context."""
        return self.context - len(self.log)

    @property
    def reserve(self) -> int:
        """Tokens of the context that calls and results leave for the answer."""
        return min(self.limits.turn_tokens, self.context // _CONTEXT_RESERVE)

    @property
    def reached(self) -> LimitName | None:
        """The limit that leaves room for nothing but an answer."""
        if self.seconds_left == 0:
            return "seconds"
        if self.limits.tokens is not None and self._tokens_left <= self.limits.tokens // _RESERVE:
            return "tokens"
        if self.step >= self.limits.steps - 1:
            return "steps"
        return "context" if self.tools and self.room <= 4 * self.reserve else None

    def turn_tokens(self, answering: bool) -> int:
        """Tokens the next turn may take; unless it is to answer, it leaves room for an answer."""
        return max(1, min(self.limits.turn_tokens, self._budget(answering), self._space(answering)))

    @property
    def scarcest(self) -> LimitName | None:
        """The limit by which a turn gets less than `Limits.turn_tokens` to call; None if it gets all of them."""
        if self.turn_tokens(False) == self.limits.turn_tokens:
            return None
        return "context" if self._space(False) < self._budget(False) else "tokens"

    def _budget(self, answering: bool) -> int:
        """What the run's token limit leaves for the next turn."""
        if self.limits.tokens is None:
            return self.limits.turn_tokens
        return self._tokens_left - (0 if answering else self.limits.tokens // _RESERVE)

    def _space(self, answering: bool) -> int:
        """What the context leaves for it: after a turn of calls their results must fit, and after those an answer.

        A result cut down to nothing takes less than twice its call, so a third of the space is the turn's.
        """
        return self.room if answering or not self.tools else (self.room - self.reserve) // 3

    @property
    def _tokens_left(self) -> int:
        return (self.limits.tokens or 0) - self.tokens

    def usable(self, names: list[str]) -> frozenset[str]:
        """The tools that may still be called."""
        most = self.limits.calls
        return frozenset(n for n in names if most is None or self.calls.get(n, 0) < most)
