"""What the engine itself costs: steps of a model that computes nothing, by batch and by length of the history.

    python bench/engine.py [--quick] [--json FILE]

A step plans, fills masks, samples and hands ids on. The vocabulary is of single bytes, so that sampling costs next to
nothing, and the logits are a constant. ``alone`` is the engine's thread while nobody reads: what a step takes longer
than its forward pass. With ``readers``, an event loop in the same process awaits each id as it comes; Python runs one
of the two threads at a time, and no forward pass is there in which the readers could run, so both add up. The floor of
that is a thread and an event loop that hand a number back and forth and do nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time
from functools import partial
from pathlib import Path

import anyio
import torch

from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.grammar import GrammarSpec, RegexSpec
from agentkit.runtime.request import Chunk, Finish, Request
from agentkit.runtime.runner import Output
from agentkit.runtime.sequence import Plan
from agentkit.script import byte_vocabulary

BATCHES = (1, 8, 64)
HISTORIES = (16, 10_000, 100_000)
TARGETS = {1: 100.0, 64: 400.0}


class Nothing:
    """A model whose logits are one constant row."""

    weight_bytes = 0
    asynchronous = False
    memory = None
    digest = "nothing"

    def __init__(self, vocab_size: int, favourite: int) -> None:
        self.vocab_size = vocab_size
        self._logits = torch.zeros(256, vocab_size)
        self._logits[:, favourite] = 1.0

    def step(self, plan: Plan) -> Output:
        return Output(self._logits[: sum(entry.sample for entry in plan.entries)].clone(), torch.empty(0))


def alone(engine: Engine, history: int, count: int, new: int, grammar: GrammarSpec | None) -> float:
    """Seconds from the last prompt's first token to the end, for each token of one request; nobody reads them."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    done = threading.Semaphore(0)

    def push(rid: int, item: Chunk | Finish | BaseException) -> None:
        if isinstance(item, Chunk):
            if rid not in first:
                first[rid] = time.perf_counter()
            return
        last[rid] = time.perf_counter()
        done.release()

    for request in requests(history, count, new, grammar):
        generation = engine.generate(request)
        generation.push = partial(push, generation.rid)
        engine.start(generation)
    for _ in range(count):
        done.acquire()
    return (max(last.values()) - max(first.values())) / (new - 1)


def requests(history: int, count: int, new: int, grammar: GrammarSpec | None) -> list[Request]:
    prompts = [[index % 200 + 1, *[97] * (history - 1)] for index in range(count)]
    return [Request(ids, max_tokens=new, grammar=grammar, ignore_end=True) for ids in prompts]


async def read(engine: Engine, history: int, count: int, new: int, grammar: GrammarSpec | None) -> float:
    """The same with a reader for each."""
    started: list[float] = []

    async def one(request: Request) -> None:
        async with engine.generate(request) as generation:
            async for _ in generation:
                if len(generation.ids) == 1:
                    started.append(time.perf_counter())

    async with anyio.create_task_group() as group:
        for request in requests(history, count, new, grammar):
            group.start_soon(one, request)
    return (time.perf_counter() - max(started)) / (new - 1)


def microseconds(
    batch: int, history: int, new: int, times: int, grammar: GrammarSpec | None = None
) -> tuple[float, float]:
    """Median time of a step, alone and with readers."""
    vocab = byte_vocabulary()
    pages = batch * -(-(history + new + 1) // 16) + 64
    sizes = Sizes(context=history + new + 1, pages=pages, step_tokens=1 << 16, running=max(batch, 64))
    with Engine(Nothing(vocab.size, 98), vocab, sizes, "nothing") as engine:
        anyio.run(read, engine, 16, batch, 8, grammar)
        pairs = [
            (alone(engine, history, batch, new, grammar), anyio.run(read, engine, history, batch, new, grammar))
            for _ in range(times)
        ]
    one, two = zip(*pairs, strict=True)
    return statistics.median(one) * 1e6, statistics.median(two) * 1e6


def floor(rounds: int) -> float:
    """Microseconds in which a thread hands a number to an event loop and waits for the answer."""

    async def main() -> float:
        loop, answered = asyncio.get_running_loop(), threading.Semaphore(0)
        done = asyncio.Event()

        def work() -> None:
            for _ in range(rounds):
                loop.call_soon_threadsafe(answered.release)
                answered.acquire()
            loop.call_soon_threadsafe(done.set)

        begin = time.perf_counter()
        thread = threading.Thread(target=work)
        thread.start()
        await done.wait()
        thread.join()
        return (time.perf_counter() - begin) / rounds * 1e6

    return asyncio.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repetitions")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    new, times = (200, 1) if args.quick else (1000, 5)
    figures = {"floor of reading": (0.0, floor(2000))}
    print(f"{'µs a step':<36}{'alone':>8}{'readers':>10}\n{'floor':<36}{'':>8}{figures['floor of reading'][1]:>10.0f}")

    def measure(name: str, *shape: int, grammar: GrammarSpec | None = None) -> None:
        figures[name] = microseconds(*shape, new, times, grammar)
        print(f"{name:<36}{figures[name][0]:>8.0f}{figures[name][1]:>10.0f}", flush=True)

    for batch in BATCHES:
        measure(f"batch {batch}", batch, 16)
    for history in HISTORIES[1:]:
        measure(f"batch 1, history {history:,}", 1, history)
    measure("batch 1, under a grammar", 1, 16, grammar=RegexSpec("[a-z]*"))
    if args.json:
        args.json.write_text(json.dumps({k: {"alone": a, "readers": r} for k, (a, r) in figures.items()}, indent=1))
    said = " · ".join(f"batch {b} {figures[f'batch {b}'][0]:.0f} µs (target {t:.0f})" for b, t in TARGETS.items())
    growth = figures[f"batch 1, history {HISTORIES[-1]:,}"][0] / figures["batch 1"][0]
    print(f"\n{said} · {HISTORIES[-1]:,} tokens of history {growth:.2f}x (target 1)")


if __name__ == "__main__":
    main()
