"""Typed records out of text: one constrained document for each text, many texts as one batch, long texts in parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

import anyio
import anyio.to_thread

from agentkit.agent import override
from agentkit.extractor import INSTRUCTIONS, Extracted, Extractor
from agentkit.gather import gather
from agentkit.loading import load
from agentkit.runtime.request import Sampling

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine

Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class Failed:
    """What stands in the place of a record in a list of results.

    Attributes:
        error: what went wrong with this text: mostly an `AgentError`; or what a validator raised, if no ValueError.
    """

    error: Exception


@overload
async def extract(
    text: str,
    output: type[Out],
    *,
    instructions: str = ...,
    model: str | Path | Engine | None = ...,
    max_tokens: int = ...,
    sampling: Sampling | None = ...,
    part_tokens: int | None = ...,
    budget: int | None = ...,
    keys: Mapping[str, str] | None = ...,
    progress: bool = ...,
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
    part_tokens: int | None = ...,
    budget: int | None = ...,
    keys: Mapping[str, str] | None = ...,
    progress: bool = ...,
    watch: Callable[[int, str], None] | None = ...,
) -> list[Extracted[Out] | Failed]: ...


async def extract(
    text: str | Sequence[str],
    output: type[Out],
    *,
    instructions: str = INSTRUCTIONS,
    model: str | Path | Engine | None = None,
    max_tokens: int = 1024,
    sampling: Sampling | None = None,
    part_tokens: int | None = None,
    budget: int | None = None,
    keys: Mapping[str, str] | None = None,
    progress: bool = False,
    watch: Callable[[int, str], None] | None = None,
) -> Extracted[Out] | list[Extracted[Out] | Failed]:
    """Read a record out of a text, or one out of each of several, in their order.

    The result is always a complete document that matches the type; its fields are decoded in the order the type
    declares them. Where a validator of the type refuses it, the model is told why and tries once more.

    Texts are decoded together, as many at a time as the engine runs, and share the pages of the instructions. One that
    fails has a `Failed` in its place, and the others go on.

    A text longer than the context is cut at headings and paragraphs into parts that overlap. Each gives a record in
    which what it does not say is null, and these are joined (`agentkit.merge`); validators see the joined record only.

    Args:
        text: one text, or several.
        output: a pydantic model, dataclass, TypedDict, list of these, or a JSON schema as a dict.
        instructions: what to look for, before the text.
        model: as for `Agent`. One that is not an engine is loaded for this call and closed after it.
        max_tokens: of one record.
        sampling: how tokens are chosen; greedy by default.
        part_tokens: most tokens of a part; what the context has room for by default.
        budget: most tokens of a text that are read. Of a longer one the parts come first that have ``[IMPORTANT]`` at
            the beginning of a line, or of a heading, which means the section below it; then the others in their order.
        keys: for long texts: ``{"/items": "number"}`` says that items of that list with the same number are the same,
            and are joined field by field. Without it, items are the same that are equal.
        progress: show a progress bar on standard error while a list is worked on.
        watch: called with a text's index and what its record has grown by, as it is decoded; not for texts in parts.

    Returns:
        For one text its record. For several a list of records and failures; an empty one for none.

    Raises:
        SchemaError: the type has no schema, or one that cannot be decoded; before any text is read.
        ModelError: the model cannot be loaded.
        ValueError: ``part_tokens``, ``budget`` or ``keys`` make no sense.
        CapacityError: for one text: no record fits ``max_tokens``, or the instructions leave no room for a text.
        OutputError: for one text: a validator refused the second record as well, or no part of a long text says
            something that the type requires.
    """
    texts = [text] if isinstance(text, str) else list(text)
    for index, one in enumerate(texts):
        if not isinstance(one, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"text {index} is a {type(one).__name__}: give str, such as from path.read_text('utf-8')")
    extractor = Extractor(
        output,
        instructions=instructions,
        max_tokens=max_tokens,
        sampling=sampling or Sampling(),
        part_tokens=part_tokens,
        budget=budget,
        keys=keys or {},
    )
    if not texts:
        return []
    async with _opened(model) as engine:
        await extractor.load(engine)
        if isinstance(text, str):
            return await extractor.read(text, watch and partial(watch, 0))
        return await _several(extractor, texts, progress, watch)


async def _several(
    extractor: Extractor[Out], texts: Sequence[str], progress: bool, watch: Callable[[int, str], None] | None
) -> list[Extracted[Out] | Failed]:
    from tqdm import tqdm

    with tqdm(total=len(texts), unit="text", disable=not progress) as bar:

        async def one(index: int) -> Extracted[Out] | Failed:
            try:
                return await extractor.read(texts[index], watch and partial(watch, index))
            except Exception as error:
                return Failed(error)
            finally:
                bar.update()

        return await gather(one, range(len(texts)), extractor.most)


@asynccontextmanager
async def _opened(model: str | Path | Engine | None) -> AsyncGenerator[Engine | None]:
    """The engine to use, closed afterwards if it was loaded here; None in a `scripted` block, which has its own."""
    if override.get() is not None:
        yield None
    elif model is None or isinstance(model, str | Path):
        engine = await anyio.to_thread.run_sync(load, model)
        try:
            yield engine
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(engine.close)
    else:
        yield model
