"""A request inside the engine: its grammar state, its budget, and what its next ids are."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from agentkit.kernels.sample import log_probabilities, penalize_
from agentkit.runtime.closing import Closer
from agentkit.runtime.draft import Drafter
from agentkit.runtime.errors import AgentError, CapacityError
from agentkit.runtime.generation import Generation
from agentkit.runtime.grammar import Grammar, Matcher
from agentkit.runtime.radix import common_prefix
from agentkit.runtime.request import Chunk, Progress, Sampling, Score, Usage
from agentkit.runtime.review import Review
from agentkit.runtime.sequence import Sequence
from agentkit.runtime.text import Detokenizer, StopStrings
from agentkit.runtime.vocab import Vocabulary

Reason = Literal["stop", "length"]

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine


class Live:
    """State of one running request; touched by the engine's thread alone.

    Args:
        generation: where ids go.
        sequence: the planner's view of the same request.
        vocab: the tokens.
        grammar: being compiled, or None for free text.
        room: tokens the context leaves for the output.

    Attributes:
        parked: logits that wait for the grammar to be compiled.
        matcher: the grammar's state, once compiled and used.
        hastened: end as soon as the output can be complete.
        refused: why the grammar cannot be used; it ends the request at its next token.
        logprobs: of the request's targets so far.
        draft: what the step in flight verifies.
        rows: logits of the step in flight, or of the next one: one, and one for each drafted id.
        ended: why the output has ended.
        rewound: how many ids the sequence is to be cut to, as a document failed its schema.
        looks: whether more is done with its logits than to draw from them.
    """

    def __init__(
        self,
        generation: Generation,
        sequence: Sequence,
        vocab: Vocabulary,
        grammar: Future[Grammar] | None,
        room: int,
    ) -> None:
        request = generation.request
        self.generation, self.sequence, self.vocab, self.grammar = generation, sequence, vocab, grammar
        self.left = room if request.max_tokens is None else min(request.max_tokens, room)
        self.parked: Tensor | None = None
        self.hastened = False
        self.matcher: Matcher | None = None
        self.refused: AgentError | None = None
        self.logprobs: list[float] = []
        self.rows = 1
        self.ended: Reason | None = None
        self.draft: tuple[int, ...] = ()
        self._drafter: Drafter | None = None
        self._closer: Closer | None = None
        self._review: Review | None = None
        self.rewound: int | None = None
        self._reserve = self._prompt = 0  # the latter: ids before the output, once there is a matcher
        self._decoded = self._forced = self._drafted = self._accepted = self._retried = 0
        self._seen: set[int] = set(request.ids) if request.sampling.repetition_penalty != 1 else set()
        self._stops = StopStrings(request.stop) if request.stop else None
        self._text = Detokenizer(vocab)
        self.looks = request.sampling.repetition_penalty != 1 or request.sampling.logprobs is not None

    @property
    def ready(self) -> bool:
        """Whether its next token can be chosen now."""
        return self.grammar is None or self.grammar.done()

    @property
    def unmasked(self) -> bool:
        """Whether it has a grammar that no mask has been filled from yet."""
        return self.grammar is not None and self.matcher is None and self.refused is None

    @property
    def runnable(self) -> bool:
        """Whether a step could move it on."""
        return self.parked is None or self.ready

    def fork(self, engine: Engine, rid: int, sampling: Sampling) -> Live:
        """The same state for a child request; the caller gives it its sequence. What is held back is the child's
        output as well: each of the two hands it out, or what comes in its place, when it has been found valid."""
        chosen, others = self._review.counts if self._review is not None else (0, 0)
        held = chosen + others
        ids = tuple(self.sequence.ids[: len(self.sequence.ids) - held])
        request = replace(self.generation.request, ids=ids, sampling=sampling, max_tokens=max(self.left + held, 1))
        child = Live(Generation(engine, rid, request), self.sequence, self.vocab, self.grammar, self.left)
        child._seen = self._seen.copy()
        if self._review is not None:
            child._review, child._decoded, child._forced = self._review.fork(), chosen, others
        if self.matcher is not None:
            child._reserve, child._prompt = self._reserve, self._prompt
            child.matcher = self.matcher.fork()
            child._closer = Closer(child.matcher, self._reserve)
        child._stops = self._stops.fork() if self._stops is not None else None
        child._text = self._text.fork()
        child._drafter = self._drafter.fork() if self._drafter is not None else None
        child.parked = None if self.parked is None else self.parked.clone()
        return child

    def propose(self, most: int) -> list[int]:
        """Up to ``most`` ids that may follow and are worth verifying; the grammar allows them one after the other."""
        if self.unmasked or self.hastened:
            return []
        if self._drafter is None:
            self._drafter = Drafter(self.sequence.ids)
        draft = self._drafter.propose(min(most, self.left - 1))
        control = self.vocab.end_ids if self.matcher is not None else self._control
        draft = draft[: next((i for i, token in enumerate(draft) if token in control), len(draft))]
        return draft[: self.matcher.validate(draft)] if self.matcher is not None and draft else draft

    @cached_property
    def _control(self) -> frozenset[int]:
        """Ids that are no part of a text: free text holds none, and at an end there is nothing to save."""
        return frozenset(self.vocab.control.values()) | self.vocab.end_ids

    def verify(self, draft: tuple[int, ...]) -> None:
        """The step that begins now has these ids behind the sequence's own."""
        self.draft, self.rows = draft, 1 + len(draft)
        self._drafted += len(draft)

    def fill(self, masks: Tensor) -> None:
        """Write what may come next, and after each drafted id, into ``masks``, ``[rows, words]`` int32, which hold
        the free-text mask.

        Raises:
            SchemaError: the grammar could not be compiled.
            CapacityError: its shortest document needs more tokens than are left.
        """
        if self.grammar is None or not self.grammar.done():
            return
        if self.matcher is None:
            self._begin(self.grammar.result())
        assert self.matcher is not None
        first, *others = masks.numpy()
        self.matcher.fill(first)
        taken = filled = 0
        try:
            for token, row in zip(self.draft, others, strict=True):
                taken += self.matcher.advance(token)
                self.matcher.fill(row)
                filled += 1
        except AgentError:  # where a wrong guess leads is no matter of the output
            self.draft = self.draft[:filled]
        finally:
            self.matcher.rollback(taken)

    def _begin(self, grammar: Grammar) -> None:
        if grammar.minimum > self.left:
            raise CapacityError(
                f"the shortest output of this grammar takes about {grammar.minimum} tokens, {self.left} are left: "
                "raise max_tokens, or shorten the prompt"
            )
        self.matcher, self._reserve = grammar.matcher(), grammar.reserve + 2 * grammar.minimum
        self._review, self._prompt = grammar.review(), len(self.sequence.ids)
        self._closer = Closer(self.matcher, self._reserve)

    def penalize(self, logits: Tensor) -> Tensor:
        """Apply the repetition penalty to ``[rows, v]`` fp32 in place.

        Returns:
            The logits as the model gave them, for log-probabilities.
        """
        sampling = self.generation.request.sampling
        raw = logits
        if self._seen:
            raw = logits.clone() if sampling.logprobs is not None else logits
            for at, row in enumerate(logits):
                seen = sorted(self._seen.union(self.draft[:at]))
                penalize_(row, torch.tensor(seen, device=row.device), sampling.repetition_penalty)
        return raw

    def advance(self, tokens: Ids[int], raw: Tensor | None, chunks: list[Chunk]) -> None:
        """Take the id sampled first, then, as long as the output is what was drafted, those sampled behind it.

        Each gives a chunk, as if it had come in a step of its own. When all are taken, `ended` says whether and why
        the output has ended, or `rewound` that it goes on from an earlier place, because a document is not valid.

        Args:
            tokens: what was sampled in each row; negative if nothing could be.
            raw: ``[rows, v]`` fp32, the model's logits, if it `looks` at them.
            chunks: where they go, each as soon as it is there: an error takes none of them back. They belong to the
                sequence; what the caller may see of them says `release`.

        Raises:
            DocumentError: a document is not valid, and there is nothing more to try.
        """
        draft, self.draft, self.rows = self.draft, (), 1
        at = 0
        while True:
            chunk = self._take(tokens[at], raw, at)
            chunks.append(chunk)
            if self._review is not None:
                self._review.hold(chunk)
                if not self._review.hear(chunk.ids, self.ended is not None):
                    self._back_up(self._review)
                    return
            if not draft:
                return
            right = common_prefix(draft[at:], chunk.ids)
            self._accepted += right
            at += len(chunk.ids)
            if self.ended is not None or right < len(chunk.ids):
                return

    def release(self, chunks: list[Chunk]) -> list[Chunk]:
        """What the caller may see, now that `chunks` have been taken: all but what a document that is not yet complete
        has begun with, and what was held back before."""
        return chunks if self._review is None else self._review.release(self.ended is not None)

    def _back_up(self, review: Review) -> None:
        """Take the output back to where an invalid document is to go on otherwise."""
        assert self.matcher is not None
        before, taken = review.counts, len(self.matcher.ids)
        self.ended = None
        if not review.back(self.matcher, self.left, self._reserve):
            raise review.error(self.usage())
        ids, after = self.matcher.ids, review.counts
        gone = taken - len(ids)
        self._decoded -= before[0] - after[0]
        self._forced -= before[1] - after[1]
        self._retried += gone
        self.left += gone
        self.rewound = self._prompt + len(ids)
        self._closer, self._drafter = Closer(self.matcher, self._reserve), None
        if self._seen:
            self._seen = {*self.sequence.ids[: self._prompt], *ids}
        if self._stops is not None:
            self._stops, self._text = StopStrings(self.generation.request.stop), Detokenizer(self.vocab)
            for token in ids:
                self._ends(token)

    def _take(self, token: int, raw: Tensor | None, row: int) -> Chunk:
        """A sampled id and what the grammar forces after it."""
        if token < 0:
            raise ValueError("no token is allowed here, or the logits are not numbers")
        ids, self.ended = self._follow(token)
        taken = len(ids) > 0 and ids[0] == token  # not where the budget has no room for it
        self._decoded += taken
        self._forced += len(ids) - taken
        if self._seen:
            self._seen.update(ids)
        if self._drafter is not None and ids:
            self._drafter.observe(ids)
        score, alternatives = None, self.generation.request.sampling.logprobs
        if taken and alternatives is not None:
            assert raw is not None
            logprob, top = log_probabilities(raw[row, : self.vocab.size], token, alternatives)
            score = Score(token, logprob, tuple(top))
        return Chunk(ids, score, not taken)

    def _follow(self, token: int) -> tuple[tuple[int, ...], Reason | None]:
        """The sampled id and those that certainly come after it, cut where the output ends.

        Where the budget leaves no room for the sampled id, the way to a complete output is taken in its place.
        """
        if self.matcher is None:
            self.left -= 1
            if self._ends(token):
                return (token,), "stop"
            return (token,), "length" if self.left <= 0 or self.hastened else None
        closing = self._closing(token)
        certain, reason = ([token], None) if closing is None else (closing, "length")
        ids: list[int] = []
        while certain:
            for t in certain:
                if not self.matcher.advance(t):
                    raise RuntimeError(f"the grammar refuses token {t}, which it allowed or forced itself")
                ids.append(t)
                self.left -= 1
                if self._ends(t):
                    return tuple(ids), reason or "stop"
            if reason is not None:
                break
            if self.matcher.finished():
                return tuple(ids), "stop"
            certain = self.matcher.forced()
        return tuple(ids), reason or ("length" if self.left <= 0 or self.hastened else None)

    def _closing(self, token: int) -> list[int] | None:
        """None if the token may be taken, else the ids that complete the output without it."""
        assert self.matcher is not None
        assert self._closer is not None
        if self.hastened:
            return self.matcher.completion(self.left)
        return self._closer.admit(token, self.left)

    def _ends(self, token: int) -> bool:
        if self._stops is not None:
            text = "".join(piece.text for piece in self._text.feed(token) if piece.control is None)
            if self._stops.push(text).stop is not None:
                return True
        return token in self.vocab.end_ids and not self.generation.request.ignore_end

    def report(self) -> None:
        """Tell the caller how far the prompt has come, if that is news."""
        s = self.sequence
        progress = Progress(min(s.reached, s.prompt), s.prompt, s.recomputed)
        if progress != self.generation.progress:
            self.generation.report(progress)

    def usage(self) -> Usage:
        """Counts so far."""
        s = self.sequence
        counts = self._decoded, self._forced, s.recomputed, self._drafted, self._accepted, self._retried
        return Usage(s.cached, s.prefilled, *counts)
