"""Pins: what a caller asks the engine not to evict as long as there is anything else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Self

from agentkit.runtime.errors import EngineError
from agentkit.runtime.radix import Hold, PrefixTree


class Pin:
    """What was cached of some ids when it was made, until it is closed; see `Engine.pin`.

    A context manager. It may be made and closed on any thread and neither waits for the engine. Closed twice, or of an
    engine that has closed, it does nothing.

    Args:
        tree: touched on the engine's thread alone.
        command: has that thread do something, after all it was told before. EngineError if it has ended.
        ids: of the conversation.
        namespace: as of a `Request`.
    """

    def __init__(
        self, tree: PrefixTree, command: Callable[[Callable[[], None]], None], ids: Sequence[int], namespace: str
    ) -> None:
        self._tree, self._command = tree, command
        self._hold: Hold | None = None
        ids = tuple(ids)  # of now: a conversation goes on

        def take() -> None:
            self._hold = tree.pin(namespace, ids)

        with contextlib.suppress(EngineError):
            command(take)

    def close(self) -> None:
        """Let the pages be evicted like any others."""
        with contextlib.suppress(EngineError):
            self._command(self._release)

    def _release(self) -> None:
        if self._hold is not None:
            self._tree.unpin(self._hold)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
