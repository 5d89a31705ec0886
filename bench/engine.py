"""What the engine itself costs: steps of a model that computes nothing, by batch and by length of the history.

    python bench/engine.py [--quick] [--json FILE]

A step plans, fills masks, samples and hands ids to an event loop. The vocabulary is of single bytes, so that sampling
costs next to nothing, and the logits are a constant. The floor is the same loop of an event loop and a thread that
hand one number back and forth and do nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import torch

from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.grammar import GrammarSpec, RegexSpec
from agentkit.runtime.request import Request
from agentkit.runtime.runner import Output
from agentkit.runtime.sequence import Plan
from agentkit.script import byte_vocabulary

BATCHES = (1, 8, 64)
HISTORIES = (16, 10_000, 100_000)
TARGETS = {1: 100.0, 64: 400.0}


class Nothing:
    """A model whose logits are one constant row."""

    weight_bytes = 0
    memory = None
    digest = "nothing"

    def __init__(self, vocab_size: int, favourite: int) -> None:
        self.vocab_size = vocab_size
        self._logits = torch.zeros(256, vocab_size)
        self._logits[:, favourite] = 1.0

    def step(self, plan: Plan) -> Output:
        return Output(self._logits[: sum(entry.sample for entry in plan.entries)].clone(), torch.empty(0))


async def generate(engine: Engine, history: int, count: int, new: int, grammar: GrammarSpec | None) -> float:
    """Seconds from the last prompt's first token to the end, for each token of one request."""
    started: list[float] = []

    async def one(index: int) -> None:
        ids = [index % 200 + 1, *[97] * (history - 1)]
        async with engine.generate(Request(ids, max_tokens=new, grammar=grammar, ignore_end=True)) as generation:
            async for _ in generation:
                if len(generation.ids) == 1:
                    started.append(time.perf_counter())

    async with anyio.create_task_group() as group:
        for index in range(count):
            group.start_soon(one, index)
    return (time.perf_counter() - max(started)) / (new - 1)


def microseconds(batch: int, history: int, new: int, times: int, grammar: GrammarSpec | None = None) -> float:
    """Median time of a step."""
    vocab = byte_vocabulary()
    pages = batch * -(-(history + new + 1) // 16) + 64
    sizes = Sizes(context=history + new + 1, pages=pages, step_tokens=1 << 16, running=max(batch, 64))
    with Engine(Nothing(vocab.size, 98), vocab, sizes, "nothing") as engine:
        anyio.run(generate, engine, 16, batch, 8, grammar)
        return statistics.median(anyio.run(generate, engine, history, batch, new, grammar) for _ in range(times)) * 1e6


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
    figures: dict[str, float] = {"floor: thread to event loop and back": floor(2000)}

    def measure(name: str, run: Callable[[], float]) -> None:
        figures[name] = run()
        print(f"{name:<44}{figures[name]:>8.0f}", flush=True)

    print(f"{'µs':<44}\n{'floor: thread to event loop and back':<44}{next(iter(figures.values())):>8.0f}")
    for batch in BATCHES:
        measure(f"batch {batch}", lambda b=batch: microseconds(b, 16, new, times))
    for history in HISTORIES[1:]:
        measure(f"batch 1, history {history:,}", lambda h=history: microseconds(1, h, new, times))
    measure("batch 1, under a grammar", lambda: microseconds(1, 16, new, times, RegexSpec("[a-z]*")))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    said = " · ".join(f"batch {b} {figures[f'batch {b}']:.0f} µs (target {t:.0f})" for b, t in TARGETS.items())
    growth = figures[f"batch 1, history {HISTORIES[-1]:,}"] / figures["batch 1"]
    print(f"\n{said} · {HISTORIES[-1]:,} tokens of history {growth:.2f}x (target 1)")


if __name__ == "__main__":
    main()
