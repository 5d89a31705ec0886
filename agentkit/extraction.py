"""Typed records out of text: one constrained document for each text, many texts as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from agentkit.agent import Agent
from agentkit.gather import gather
from agentkit.limits import Limits
from agentkit.runtime.request import Sampling, Usage
from agentkit.turn import OutputDelta

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine

Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class Extracted(Generic[Out]):
    """One record and what it cost."""

    output: Out
    usage: Usage


@overload
async def extract(
    text: str,
    output: type[Out],
    *,
    instructions: str = ...,
    model: str | Path | Engine | None = ...,
    max_tokens: int = ...,
    sampling: Sampling | None = ...,
    watch: Callable[[int, str], None] | None = ...,
) -> Extracted[Out]: ...


@overload
async def extract(
    text: Sequence[str],
    output: type[Out],
    *,
    instructions: str = ...,
    model: str | Path | Engine | None = ...,
    max_tokens: int = ...,
    sampling: Sampling | None = ...,
    watch: Callable[[int, str], None] | None = ...,
) -> list[Extracted[Out]]: ...


async def extract(
    text: str | Sequence[str],
    output: type[Out],
    *,
    instructions: str = "Extract the data from the text.",
    model: str | Path | Engine | None = None,
    max_tokens: int = 1024,
    sampling: Sampling | None = None,
    watch: Callable[[int, str], None] | None = None,
) -> Extracted[Out] | list[Extracted[Out]]:
    """Read a record out of a text, or one out of each of several, in their order.

    The result is always a complete document that matches the type; its fields are decoded in the order the type
    declares them. Texts are decoded together, and share the pages of the instructions.

    Args:
        text: one text, or several.
        output: a pydantic model, dataclass, TypedDict, list of these, or a JSON schema as a dict.
        instructions: what to look for, before the text.
        model: as for `Agent`.
        max_tokens: of one record.
        sampling: how tokens are chosen; greedy by default.
        watch: called with a text's index and what its record has grown by, as it is decoded.

    Raises:
        SchemaError: the type has no schema, or one that cannot be decoded.
        CapacityError: a text does not fit the context, or no record fits ``max_tokens``.
    """
    agent = Agent(
        output=output,
        instructions=instructions,
        model=model,
        limits=Limits(steps=1, turn_tokens=max_tokens),
        sampling=sampling or Sampling(),
    )
    await agent.load()
    texts = [text] if isinstance(text, str) else list(text)

    async def one(index: int) -> Extracted[Out]:
        async with agent.stream(texts[index]) as run:
            async for event in run:
                if watch is not None and isinstance(event, OutputDelta):
                    watch(index, event.text)
        return Extracted(run.result.output, run.result.usage)

    results = await gather(one, range(len(texts)))
    return results[0] if isinstance(text, str) else results
