"""Several coroutines at once, in whose place one result or one error comes out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

Item = TypeVar("Item")
Result = TypeVar("Result")


async def gather(run: Callable[[Item], Awaitable[Result]], items: Sequence[Item]) -> list[Result]:
    """Run a function on all items together; results in their order.

    The first error cancels the others and is raised as it is, not as a group of one.
    """
    results: dict[int, Result] = {}
    errors: list[Exception] = []

    async def one(index: int) -> None:
        try:
            results[index] = await run(items[index])
        except Exception as error:
            errors.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for index in range(len(items)):
            group.start_soon(one, index)
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(items))]
