"""One running request as its caller sees it: an asynchronous stream of chunks that can be left at any time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import anyio
from anyio.lowlevel import current_token

from agentkit.runtime.errors import EngineError
from agentkit.runtime.request import Chunk, Finish, Progress, Request

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine


class Generation:
    """A stream of `Chunk`; use it as ``async with engine.generate(request) as generation``.

    Leaving the block aborts what still runs and gives its pages back. The engine's thread writes, the caller's event
    loop reads; neither waits for the other. `watch` gives, beside the chunks, how far a long prompt has come.

    Attributes:
        request: what was asked.
        ids: every id so far, forced ones included.
        finish: set once the stream has ended.
        started: whether the engine has it; a fork runs from the moment it is made.
        progress: how far the prompt has come, as last reported; None until a step has ended within it.
    """

    def __init__(self, engine: Engine, rid: int, request: Request) -> None:
        self.request = request
        self.rid = rid
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.started = False
        self.progress: Progress | None = None
        self._watched = False
        self._engine = engine
        self._items: deque[Chunk | Finish | BaseException] = deque()
        self._arrived: anyio.Event | None = None
        self._bell: Bell | None = None

    def push(self, item: Chunk | Finish | BaseException) -> None:
        """Called by the engine's thread."""
        self._items.append(item)
        self._ring()

    def report(self, progress: Progress) -> None:
        """Called by the engine's thread. Only the newest report is kept, and only one who watches is woken."""
        self.progress = progress
        if self._watched:
            self._ring()

    def _ring(self) -> None:
        if self._bell is not None:
            try:
                self._bell.ring(self)
            except RuntimeError:  # the caller's event loop has closed: nobody reads any more
                self._engine.abort(self.rid)

    def wake(self) -> None:
        """Tell the reader that something has arrived; called on its event loop."""
        if self._arrived is not None:
            self._arrived.set()

    async def __aenter__(self) -> Self:
        self._arrived = anyio.Event()
        self._bell = self._engine.bell(current_token().native_token)
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

    async def watch(self) -> AsyncIterator[Progress | Chunk]:
        """The chunks, and before them each report of how far the prompt has come.

        There is one for a step that computed a part of it and not its end, so none where it fits one step. A reader
        slower than the steps gets the newest only. After a preemption reports come between the chunks.
        """
        self._watched = True
        seen: Progress | None = None
        while True:
            while not self._items and self.finish is None:
                news = self.progress
                if news is not None and news is not seen:
                    seen = news
                    yield news
                else:
                    await self._news()
            try:
                chunk = await anext(self)
            except StopAsyncIteration:
                return
            seen = self.progress  # older than the chunk
            yield chunk

    async def __anext__(self) -> Chunk:
        self._entered()
        while not self._items:
            if self.finish is not None:
                raise StopAsyncIteration
            await self._news()
        item = self._items.popleft()
        if isinstance(item, Chunk):
            self.ids.extend(item.ids)
            return item
        if isinstance(item, Finish):
            self.finish = item
            raise StopAsyncIteration
        self._items.append(item)  # a failed generation stays failed
        raise item

    async def _news(self) -> None:
        """Sleep until something has arrived."""
        await self._entered().wait()
        self._arrived = anyio.Event()

    def _entered(self) -> anyio.Event:
        if self._arrived is None:
            raise EngineError("a generation is used as `async with engine.generate(...) as generation`")
        return self._arrived


class Bell:
    """Wakes the readers on one event loop, by one call for all who have news: a call from another thread costs more
    than the rest of a step does for a request.

    Args:
        loop: asyncio's event loop, or trio's token.
    """

    def __init__(self, loop: object) -> None:
        # asyncio's closed loop drops what it was asked to call, so that must be looked for; trio's refuses each call.
        self._loop = loop if isinstance(loop, asyncio.AbstractEventLoop) else None
        name = "call_soon_threadsafe" if self._loop is not None else "run_sync_soon"
        self._call: Callable[[Callable[[], object]], object] = getattr(loop, name)
        self._rung: deque[Generation] = deque()
        self._called = False

    def ring(self, generation: Generation) -> None:
        """Have a generation's reader woken. RuntimeError if its event loop has closed."""
        self._rung.append(generation)
        if self._loop is None or not self._called or self._loop.is_closed():
            self._called = True
            self._call(self._answer)

    def _answer(self) -> None:
        self._called = False  # first: what is rung for from here on may be too late for the loop below
        while self._rung:
            self._rung.popleft().wake()
