"""Several coroutines at once, in whose place one list of results or one error comes out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

Item = TypeVar("Item")
Result = TypeVar("Result")


async def gather(run: Callable[[Item], Awaitable[Result]], items: Sequence[Item], most: int) -> list[Result]:
    """Run a function on all items, so many at a time; results in the order of the items.

    The first error cancels the others and is raised as it is, not as a group of one.

    Args:
        run: called with each item, in their order.
        items: may be very many: there are tasks for no more than run at a time.
        most: how many run at a time.
    """
    results: dict[int, Result] = {}
    errors: list[Exception] = []
    left = iter(range(len(items)))

    async def work() -> None:
        try:
            for index in left:  # shared: each index goes to one worker
                results[index] = await run(items[index])
        except Exception as error:
            errors.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for _ in range(min(most, len(items))):
            group.start_soon(work)
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]
