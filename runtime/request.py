"""What goes into the engine and what comes out: token ids and plain values, nothing of messages or tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from agentkit.kernels.sample import Filter
from agentkit.runtime.errors import CapacityError
from agentkit.runtime.grammar import GrammarSpec
from agentkit.runtime.sequence import Targets


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. The default is greedy.

    Attributes:
        temperature: 0 for greedy.
        top_k: keep the k most likely tokens; 0 for all.
        top_p: keep the most likely tokens up to this mass.
        min_p: keep tokens at least this fraction as likely as the best.
        repetition_penalty: above 1 makes tokens of the context less likely.
        seed: the same seed and the same ids give the same output, whatever else runs beside it.
        logprobs: list this many alternatives at each sampled token; None reports no log-probabilities.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature, 0.0, 100.0),
            "top_k": (self.top_k, 0, 2**31),
            "top_p": (self.top_p, 1e-9, 1.0),
            "min_p": (self.min_p, 0.0, 1.0),
            "repetition_penalty": (self.repetition_penalty, 1e-3, 1e3),
            "logprobs": (self.logprobs or 0, 0, 100),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} must lie between {low} and {high}, not {value}")

    @property
    def filter(self) -> Filter:
        return Filter(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation.

    Attributes:
        ids: the prompt, at least one id.
        max_tokens: how many ids may follow, forced ones counted; None for what the context leaves.
        grammar: what the output must match; it is then always complete, however small ``max_tokens``.
        sampling: how tokens are chosen.
        stop: texts that end the output.
        ignore_end: go on after an end token (for benchmarks).
        namespace: requests of different namespaces never share pages.
        attention: ``sparse`` for sparse prefill (`agentkit.runtime.sparse`), which never shares pages with ``dense``;
            None for what the engine was loaded with.
        targets: of the prompt, whose log-probabilities are wanted: then nothing is generated, and they come with
            `Finish`.
    """

    ids: Sequence[int]
    max_tokens: int | None = None
    grammar: GrammarSpec | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    namespace: str = ""
    attention: Literal["dense", "sparse"] | None = None
    targets: Targets | None = None

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("ids is empty: a request needs at least one token")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise CapacityError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty text: it would end every output at once")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted exactly.

    Attributes:
        cached: prompt tokens whose KV was already in the prefix tree.
        prefilled: prompt tokens computed.
        decoded: output tokens the model chose.
        forced: output tokens the grammar left no choice about; they cost no decision.
        recomputed: tokens computed a second time after a preemption, or where an output was taken back.
        drafted: tokens guessed and verified.
        accepted: of those, the right ones; they are among the decoded, forced and retried.
        retried: output tokens thrown away because a document with them failed its schema.
    """

    cached: int = 0
    prefilled: int = 0
    decoded: int = 0
    forced: int = 0
    recomputed: int = 0
    drafted: int = 0
    accepted: int = 0
    retried: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.cached + other.cached,
            self.prefilled + other.prefilled,
            self.decoded + other.decoded,
            self.forced + other.forced,
            self.recomputed + other.recomputed,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            self.retried + other.retried,
        )


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of a sampled token under the model's own distribution, and its best alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Chunk(NamedTuple):  # one is made for each token: a third of what a frozen dataclass takes
    """A sampled id and what the grammar forced after it; one step gives several where it verified a draft.

    Attributes:
        ids: in order, at least one.
        score: of the sampled one, where the request asked for log-probabilities.
        closing: nothing here was chosen: the budget is at its end, and this is the shortest way to a complete output.
    """

    ids: tuple[int, ...]
    score: Score | None = None
    closing: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a prompt has come that takes more than one step.

    Attributes:
        done: tokens of it whose KV has been computed or was cached; it never falls.
        total: tokens of it.
        recomputed: tokens computed a second time so far, after a preemption: while they are, ``done`` stands still.
    """

    done: int
    total: int
    recomputed: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """How a generation ended.

    Attributes:
        reason: ``stop`` at an end token, a stop text or the end of the grammar; ``length`` at ``max_tokens`` or the
            end of the context, with constrained output completed all the same.
        usage: tokens counted.
        logprobs: natural log-probabilities of the request's targets, in order.
    """

    reason: Literal["stop", "length"]
    usage: Usage
    logprobs: tuple[float, ...] = ()
