"""A local model at work: three tasks with tools, then records out of five text files.

    make demo                                  # the embedded model, 135 million parameters
    AGENTKIT_MODEL=PATH python examples/demo.py      # another one

The model chooses the tools' order and their arguments; the grammar sees to it that every call can be made. A model this
small would rather guess than call, so it is told to call in its first turns (`tool_choice`); larger ones need no such
help.
"""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import anyio
from pydantic import BaseModel, Field

from agentkit import (
    Agent,
    CallReady,
    Failed,
    Finished,
    Limits,
    OutputDelta,
    TextDelta,
    ToolFinished,
    Usage,
    extract,
    load,
    tool,
)

TEXTS = Path(__file__).parent / "texts"


@tool
def count_words(file: str) -> str:
    """Count the words in a text file."""
    return f"{file} has {len((TEXTS / file).read_text(encoding='utf-8').split())} words"


@tool
def first_line(file: str) -> str:
    """Read the first line of a text file."""
    return f'The first line of {file} is "{(TEXTS / file).read_text(encoding="utf-8").splitlines()[0]}"'


@tool
async def add(a: int, b: int) -> str:
    """Add two numbers."""
    return f"{a} + {b} = {a + b}"


@tool
async def multiply(a: int, b: int) -> str:
    """Multiply two numbers."""
    return f"{a} * {b} = {a * b}"


class FileFacts(BaseModel):
    words: Annotated[int, Field(ge=0, le=10_000)]
    first_line: Annotated[str, Field(max_length=80)]


class Numbers(BaseModel):
    sum: Annotated[int, Field(ge=0, le=1_000_000)]
    product: Annotated[int, Field(ge=0, le=1_000_000)]


class Bill(BaseModel):
    company: Annotated[str, Field(max_length=40)]
    date: date
    total: Annotated[float, Field(ge=0, le=100_000)]


TASKS: list[tuple[str, list[Any], type[BaseModel]]] = [
    ("How many words are in bakery.txt, and what is its first line?", [count_words, first_line], FileFacts),
    (
        "What is the first line of garage.txt, and how many words has it?",
        [first_line, count_words],
        FileFacts,
    ),
    ("What is the sum and the product of 17 and 25?", [add, multiply], Numbers),
]


async def answer(engine: Any, task: str, tools: list[Any], output: type[BaseModel]) -> Usage:
    """Run one task and print each event as it comes."""
    print(f"\n> {task}")
    agent = Agent(tools, output, model=engine, limits=Limits(steps=4, calls=1, turn_tokens=96))
    usage = Usage()
    async with agent.stream(task, tool_choice=["required", "required"]) as run:
        async for event in run:
            match event:
                case CallReady(_, name, arguments):
                    print(f"  call    {name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})")
                case ToolFinished(_, record):
                    print(f"  result  {record.result}")
                case TextDelta(text) | OutputDelta(text):
                    print(text, end="", flush=True)
                case Finished(result):
                    print(f"\n  answer  {result.output!r}")
                    usage = result.usage
                case _:
                    pass
    return usage


async def records(engine: Any) -> Usage:
    """One record out of each text file, all decoded together."""
    files = sorted(TEXTS.glob("*.txt"))
    print(f"\n> A record out of each of {len(files)} files")
    found = await extract(
        [file.read_text(encoding="utf-8") for file in files],
        Bill,
        model=engine,
        instructions="Extract company, date and total from the text. Answer with JSON.",
        max_tokens=96,
    )
    usage = Usage()
    for file, record in zip(files, found, strict=True):
        if isinstance(record, Failed):
            print(f"  {file.name:<14}failed: {record.error}")
        else:
            print(f"  {file.name:<14}{record.output!r}")
            usage += record.usage
    return usage


async def main() -> None:
    engine = load()
    print(f"model {engine.name}")
    begin = time.monotonic()
    usage = Usage()
    for task in TASKS:
        usage += await answer(engine, *task)
    usage += await records(engine)
    seconds = time.monotonic() - begin
    engine.close()
    out = usage.decoded + usage.forced
    print(
        f"\ntokens: {usage.prefilled} prefilled, {usage.cached} cached, {usage.decoded} decoded, {usage.forced} forced"
        f"\n{out} tokens put out in {seconds:.1f} s, tools and prefill included: {out / seconds:.0f} tok/s"
    )


if __name__ == "__main__":
    anyio.run(main)
