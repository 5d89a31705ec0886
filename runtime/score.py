"""Log-probabilities of given tokens: of several continuations of one prompt, or of one text.

The continuations are a tree of tokens. What follows a node is known from one row of logits, however many options go
through it, so only the inner nodes are computed, each once: the longest option together with the prompt, then the
others as branches that find the prompt in the prefix tree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from agentkit.runtime.generation import Generation
from agentkit.runtime.request import Finish, Request, Usage
from agentkit.runtime.sequence import Targets


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens under the model's own distribution: before temperature and grammar, over every id that is a token.

    Attributes:
        logprobs: natural log-probability of each token, given all before it.
        usage: tokens it cost; the scored ones count as prompt.
    """

    logprobs: tuple[float, ...]
    usage: Usage

    @property
    def total(self) -> float:
        """Log-probability of all of them together."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True, slots=True)
class Continuations:
    """Several continuations of one prompt; see `Scored`.

    Attributes:
        logprobs: for each option, natural log-probabilities of its tokens.
        usage: tokens that all of them cost together.
    """

    logprobs: tuple[tuple[float, ...], ...]
    usage: Usage

    @property
    def totals(self) -> tuple[float, ...]:
        """Log-probability of each whole option."""
        return tuple(map(math.fsum, self.logprobs))


@dataclass(slots=True, eq=False)
class _Node:
    """A place in the tree. Its row of logits says what may follow: the log-probabilities of its children."""

    children: dict[int, _Node] = field(default_factory=dict[int, "_Node"])
    logprob: float = math.nan
    asked: bool = False


@dataclass(frozen=True, slots=True)
class Branch:
    """One sequence to compute: ``tokens`` behind the prompt, whose last rows answer for ``nodes``."""

    tokens: tuple[int, ...]
    nodes: tuple[_Node, ...]

    def request(self, prompt: Sequence[int], namespace: str) -> Request:
        """The request that computes it."""
        ids = (*prompt, *self.tokens)
        targets = Targets(len(ids) - len(self.nodes), tuple(tuple(node.children) for node in self.nodes))
        return Request(ids, namespace=namespace, targets=targets)

    def take(self, logprobs: Sequence[float]) -> None:
        """Enter the answers of that request."""
        children = [child for node in self.nodes for child in node.children.values()]
        for child, logprob in zip(children, logprobs, strict=True):
            child.logprob = logprob


class Options:
    """Token sequences, as a tree.

    Args:
        options: at least one; each has at least one token, and they may begin alike or be equal.
    """

    def __init__(self, options: Sequence[Sequence[int]]) -> None:
        self._options = [tuple(option) for option in options]
        self._root = _Node()
        for option in self._options:
            node = self._root
            for token in option:
                node = node.children.setdefault(token, _Node())

    def branches(self) -> list[Branch]:
        """What to compute, the longest first: each inner node is in one branch."""
        branches: list[Branch] = []
        for option in sorted(self._options, key=len, reverse=True):
            path = [self._root, *self._path(option[:-1])]
            fresh = tuple(node for node in path if not node.asked)  # the end of the path: a child is never asked first
            for node in fresh:
                node.asked = True
            if fresh:
                branches.append(Branch(option[:-1], fresh))
        return branches

    def logprobs(self) -> tuple[tuple[float, ...], ...]:
        """Log-probabilities of each option's tokens, once every branch has its answers."""
        return tuple(tuple(node.logprob for node in self._path(option)) for option in self._options)

    def _path(self, tokens: Sequence[int]) -> list[_Node]:
        nodes: list[_Node] = []
        node = self._root
        for token in tokens:
            node = node.children[token]
            nodes.append(node)
        return nodes


async def finishes(generations: Sequence[Generation]) -> list[Finish]:
    """Run generations together and read each to its end; the first error ends all of them."""
    ends: list[Finish] = []
    async with AsyncExitStack() as stack:
        for generation in generations:
            await stack.enter_async_context(generation)
        for generation in generations:
            async for _ in generation:
                pass
            assert generation.finish is not None
            ends.append(generation.finish)
    return ends
