"""What an engine has done so far, and whether it still gets anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agentkit.runtime.errors import EngineError
from agentkit.runtime.request import Usage


@dataclass(frozen=True, slots=True)
class Stats:
    """A look at the engine between two steps. Counters only grow; rates are differences of two looks.

    Attributes:
        running: sequences that hold pages.
        waiting: sequences that do not yet, or no longer.
        pages_free: pages nobody holds.
        pages_cached: pages in the prefix tree.
        pages_private: pages of running sequences.
        pages_host: pages that have been evicted to the host's memory.
        steps: steps run so far.
        seconds: time these took, from plan to ids.
        computed: tokens sent through the model so far, drafted and recomputed ones included.
        requests: how many have ended, aborted and failed ones included.
        usage: tokens of all requests, ended and running.
    """

    running: int
    waiting: int
    pages_free: int
    pages_cached: int
    pages_private: int
    pages_host: int
    steps: int
    seconds: float
    computed: int
    requests: int
    usage: Usage


class Watchdog:
    """Ends an engine that works for nothing: its callers would wait forever.

    Nothing that is known leads there. It is for what is not.

    Args:
        patience: steps in a row that may compute nothing new. Sequences that were preempted compute again what they
            had, so it must be longer than that can take.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._idle = 0

    def step(self, new: bool, dump: Callable[[], str]) -> None:
        """Take note of a step.

        Args:
            new: whether it computed, or ended, something that no step before it did.
            dump: describes the state.

        Raises:
            EngineError: that was one too many.
        """
        self._idle = 0 if new else self._idle + 1
        if self._idle > self._patience:
            raise EngineError(f"{self._idle} steps in a row computed nothing new. Please report this state: {dump()}")
