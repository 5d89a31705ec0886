"""One running request as its caller sees it: an asynchronous stream of chunks that can be left at any time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import anyio
from anyio.lowlevel import current_token

from agentkit.runtime.errors import EngineError
from agentkit.runtime.request import Chunk, Finish, Request

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine


class Generation:
    """A stream of `Chunk`; use it as ``async with engine.generate(request) as generation``.

    Leaving the block aborts what still runs and gives its pages back. The engine's thread writes, the caller's event
    loop reads; neither waits for the other.

    Attributes:
        request: what was asked.
        ids: every id so far, forced ones included.
        finish: set once the stream has ended.
        started: whether the engine has it; a fork runs from the moment it is made.
    """

    def __init__(self, engine: Engine, rid: int, request: Request) -> None:
        self.request = request
        self.rid = rid
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.started = False
        self._engine = engine
        self._items: deque[Chunk | Finish | BaseException] = deque()
        self._arrived: anyio.Event | None = None
        self._wake: Callable[[Callable[[], object]], object] | None = None

    def push(self, item: Chunk | Finish | BaseException) -> None:
        """Called by the engine's thread."""
        self._items.append(item)
        if self._wake is not None:
            try:
                self._wake(self._set)
            except RuntimeError:  # the caller's event loop has closed: nobody reads any more
                self._engine.abort(self.rid)

    def _set(self) -> None:
        if self._arrived is not None:
            self._arrived.set()

    async def __aenter__(self) -> Self:
        self._arrived = anyio.Event()
        self._wake = _thread_safe_call()
        if not self.started:
            self.started = True
            self._engine.start(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.finish is None:
            self._engine.abort(self.rid)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._arrived is None:
            raise EngineError("a generation is used as `async with engine.generate(...) as generation`")
        while not self._items:
            if self.finish is not None:
                raise StopAsyncIteration
            await self._arrived.wait()
            self._arrived = anyio.Event()
        item = self._items.popleft()
        if isinstance(item, Chunk):
            self.ids.extend(item.ids)
            return item
        if isinstance(item, Finish):
            self.finish = item
            raise StopAsyncIteration
        self._items.append(item)  # a failed generation stays failed
        raise item


def _thread_safe_call() -> Callable[[Callable[[], object]], object]:
    """How another thread schedules a call on this event loop without waiting for it."""
    native = current_token().native_token
    name = "call_soon_threadsafe" if isinstance(native, asyncio.AbstractEventLoop) else "run_sync_soon"  # or trio's
    return getattr(native, name)
