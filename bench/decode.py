"""Prefill and decode of the embedded model: ours beside llama.cpp, transformers and the floor, in one run.

    python bench/decode.py [--quick] [--json FILE] [--model PATH.gguf] [--profile]

All read the same GGUF file, use the same threads and decode the same prompts greedily, in turn: a round measures each
once, and what is compared are medians over rounds of ratios within a round, because a shared machine's speed drifts.
Each is a process of its own, so that the threads of one cannot keep the cores from another.

The floor of a decode step is the bytes of weights it reads over the read bandwidth measured here, now; that of prefill
the operations over the rate of torch's own fp32 or bf16 product, whichever is faster here.

With ``--profile`` only ours runs, and what is printed is where a decode step's time goes, operator by operator.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Sequence as Items
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import anyio
import torch

from agentkit.models import resolve
from agentkit.runtime.load import Options, choose_dtype, load_engine
from agentkit.runtime.request import Request
from agentkit.runtime.sequence import Entry, Plan, Sequence

TEXT = (
    "The history of the city begins with a small harbour, where traders met twice a year to exchange salt for cloth. "
)
COLUMNS = ("prefill", "decode", "decode at 1K", "16 at once")
#: What a request of each size has in its context before the tokens that are counted.
EMPTY, LONG = 16, 1024


class Contestant(Protocol):
    """One that decodes."""

    def run(self, prompts: Items[list[int]], new: int) -> tuple[float, float]:
        """Decode ``new`` tokens after each prompt: seconds until all have their first, and seconds for the rest."""
        ...


class Ours:
    def __init__(self, path: Path) -> None:
        self.engine = load_engine(path, Options(drafts=False))

    def run(self, prompts: Items[list[int]], new: int) -> tuple[float, float]:
        return anyio.run(self._run, prompts, new)

    async def _run(self, prompts: Items[list[int]], new: int) -> tuple[float, float]:
        firsts: list[float] = []
        begin = time.perf_counter()

        async def one(ids: list[int]) -> None:
            async with self.engine.generate(Request(ids, max_tokens=new, ignore_end=True)) as generation:
                async for _ in generation:
                    if len(generation.ids) == 1:
                        firsts.append(time.perf_counter() - begin)

        async with anyio.create_task_group() as group:
            for ids in prompts:
                group.start_soon(one, ids)
        return max(firsts), time.perf_counter() - begin - max(firsts)


class LlamaCpp:
    def __init__(self, path: Path) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.model: Any = Llama(
            str(path), n_ctx=2 * LONG, n_batch=LONG, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def run(self, prompts: Items[list[int]], new: int) -> tuple[float, float]:
        (ids,) = prompts
        self.model.reset()
        begin = time.perf_counter()
        tokens = self.model.generate(ids, top_k=1, temp=0.0)
        next(tokens)
        first = time.perf_counter()
        for _ in range(new - 1):
            next(tokens)
        return first - begin, time.perf_counter() - first


class Transformers:
    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # Where a CPU does not multiply bfloat16, torch emulates it at a tenth of the speed: that would be no peer.
        dtype = choose_dtype(torch.device("cpu"))
        self.model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()

    def run(self, prompts: Items[list[int]], new: int) -> tuple[float, float]:
        times = _Times()
        inputs = torch.tensor([*prompts])
        with torch.inference_mode():
            self.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, min_new_tokens=new,
                max_new_tokens=new, pad_token_id=0, streamer=times,
            )  # fmt: skip
        begin, first, *rest = times.seen
        return first - begin, (rest or [first])[-1] - first


class _Times:
    """What transformers calls a streamer: told of the prompt and then of each token."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        pass


CONTESTANTS: dict[str, type[Ours] | type[LlamaCpp] | type[Transformers]] = {
    "ours": Ours,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


@cache
def contestant(name: str, path: Path) -> Contestant:
    """The only one of its process."""
    return CONTESTANTS[name](path)


def run(name: str, path: Path, prompts: Items[list[int]], new: int) -> tuple[float, float]:
    return contestant(name, path).run(prompts, new)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of our engine from outside a measurement."""

    prompt: list[int]
    weight_bytes: int
    operations: int


def facts(path: Path) -> Facts:
    """A prompt, the bytes a decode step reads and the operations a token of prefill takes."""
    engine = contestant("ours", path).engine  # pyright: ignore
    c = engine.runner.model.config
    linear = c.layers * c.hidden * ((c.heads * 2 + c.kv_heads * 2) * c.head_dim + 3 * c.intermediate)
    return Facts(engine.vocab.encode(TEXT * 100)[:LONG], engine.runner.weight_bytes, 2 * linear)


def median(run: Any, times: int) -> float:
    return statistics.median(run() for _ in range(times))


def bandwidth() -> float:
    """Bytes a second that a sum over 512 MB reads."""
    data = torch.zeros(128 << 20)

    def once() -> float:
        begin = time.perf_counter()
        data.sum()
        return data.numel() * 4 / (time.perf_counter() - begin)

    once()
    return median(once, 5)


def rate() -> tuple[float, str]:
    """Operations a second of a 2048-cube product, and in which dtype."""
    results: dict[str, float] = {}
    for dtype in {torch.float32, choose_dtype(torch.device("cpu"))}:
        a = torch.randn(2048, 2048).to(dtype)

        def once(a: torch.Tensor = a) -> float:
            begin = time.perf_counter()
            a @ a
            return 2 * 2048**3 / (time.perf_counter() - begin)

        once()
        results[str(dtype).removeprefix("torch.")] = median(once, 3)
    name = max(results, key=lambda key: results[key])
    return results[name], name


class Round:
    """Measures every contestant once."""

    def __init__(self, names: Items[str], path: Path, new: int) -> None:
        self.names, self.path, self.new = names, path, new
        spawn = get_context("spawn")
        self._processes = {name: ProcessPoolExecutor(1, spawn) for name in (*names, "floor")}
        self.facts = self._on("ours", facts, path)
        self._taken = 400
        for name in names:
            self._time(name, EMPTY, 8)

    def __call__(self) -> dict[str, dict[str, float]]:
        """Tokens a second, for each contestant and column."""
        figures: dict[str, dict[str, float]] = {name: {} for name in self.names}
        for name in self.names:
            first, rest = self._time(name, LONG, self.new)
            figures[name] |= {"prefill": LONG / first, "decode at 1K": (self.new - 1) / rest}
        for name in self.names:
            figures[name]["decode"] = (self.new - 1) / self._time(name, EMPTY, self.new)[1]
        figures["ours"]["16 at once"] = 16 * (self.new - 1) / self._time("ours", EMPTY, self.new, 16)[1]
        return figures

    def floor(self) -> tuple[float, tuple[float, str]]:
        return self._on("floor", bandwidth), self._on("floor", rate)

    def close(self) -> None:
        for process in self._processes.values():
            process.shutdown()

    def _time(self, name: str, length: int, new: int, count: int = 1) -> tuple[float, float]:
        prompts: list[list[int]] = []
        for _ in range(count):
            self._taken += 1  # a first token that no other prompt has, so that nothing is found in a cache
            prompts.append([self._taken, *self.facts.prompt[: length - 1]])
        return self._on(name, run, name, self.path, prompts, new)

    def _on(self, name: str, function: Any, *args: Any) -> Any:
        return self._processes[name].submit(function, *args).result()


def profile(path: Path, context: int, steps: int = 32) -> None:
    """Print the operators of a decode step behind a context: how often each is called, and its own time."""
    runner = load_engine(path, Options(drafts=False)).runner
    sequence = Sequence(0, [400 + i % 1000 for i in range(context)], "", 0, context + 3 * steps)
    for page in range(-(-(context + 3 * steps) // runner.page_size)):
        sequence.add_page(page)
    for start in range(0, context, 256):
        sequence.computed = start
        runner.step(Plan([Entry(sequence, start, min(256, context - start), True)], [], []))

    def decode() -> list[float]:
        times: list[float] = []
        for _ in range(steps):
            sequence.computed = len(sequence.ids)
            sequence.ids.append(500)
            begin = time.perf_counter()
            runner.step(Plan([Entry(sequence, sequence.computed, 1, True)], [], []))
            times.append(time.perf_counter() - begin)
        return times

    decode()
    step = statistics.median(decode())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        decode()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows) / steps
    print(f"behind {context} tokens a step takes {step * 1e3:.2f} ms, {total / 1e3:.2f} ms of it in operators:")
    print(f"{'operator':<48}{'calls':>8}{'µs':>10}{'µs a call':>12}")
    for row in rows[:14]:
        own = row.self_cpu_time_total
        print(f"{row.key:<48}{row.count / steps:>8.0f}{own / steps:>10.0f}{own / row.count:>12.1f}")
    calls = sum(row.count for row in rows) / steps
    print(f"{'all':<48}{calls:>8.0f}{total:>10.0f}{total / calls:>12.1f}\n")


def ratio(rounds: Items[dict[str, dict[str, float]]], column: str, peer: str, other: str | None = None) -> float:
    """Median of ours over a peer's within a round."""
    return statistics.median(r["ours"][column] / r[peer][other or column] for r in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, fewer tokens")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a .gguf file")
    parser.add_argument("--profile", action="store_true", help="print where our decode step's time goes, nothing else")
    args = parser.parse_args()
    path = resolve(args.model)
    if args.profile:
        with torch.inference_mode():
            for context in (EMPTY, LONG):
                profile(path, context)
        return
    llama = importlib.util.find_spec("llama_cpp") is not None
    names = [name for name in CONTESTANTS if llama or name != "llama.cpp"]
    measure = Round(names, path, 32 if args.quick else 64)
    rounds = [measure() for _ in range(1 if args.quick else 5)]
    read, (operations, dtype) = measure.floor()
    measure.close()
    figures = {n: {c: statistics.median(r[n][c] for r in rounds) for c in rounds[0][n]} for n in names}
    floor = {"prefill": operations / measure.facts.operations, "decode": read / measure.facts.weight_bytes}
    figures = {"ours": figures.pop("ours"), "floor": floor, **figures}
    if args.json:
        args.json.write_text(json.dumps({"medians": figures, "rounds": rounds}, indent=1))

    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{path.name} · torch {torch.__version__} · {capability} · {torch.get_num_threads()} threads")
    print(f"read {read / 1e9:.1f} GB/s · product {operations / 1e9:.0f} GFLOP/s ({dtype}, also transformers')\n")
    print(f"{'tok/s':<16}" + "".join(f"{c:>14}" for c in COLUMNS))
    for name, row in figures.items():
        print(f"{name:<16}" + "".join(f"{row[c]:>14,.0f}" if c in row else f"{'–':>14}" for c in COLUMNS))
    print(f"\ndecode at {figures['ours']['decode'] / floor['decode']:.0%} of the floor")
    if llama:
        print(
            f"llama.cpp: decode {ratio(rounds, 'decode', 'llama.cpp'):.2f}x (target 1.0, goal 1.2), "
            f"at 1K {ratio(rounds, 'decode at 1K', 'llama.cpp'):.2f}x (target 1.0), "
            f"prefill {ratio(rounds, 'prefill', 'llama.cpp'):.1f}x (target 3)"
        )
    else:
        print("llama.cpp: not compared, it is not installed: pip install llama-cpp-python (it is compiled for minutes)")
    print(
        f"transformers: decode {ratio(rounds, 'decode', 'transformers'):.1f}x (target 3), "
        f"prefill {ratio(rounds, 'prefill', 'transformers'):.2f}x (target 1) · "
        f"16 at once {ratio(rounds, '16 at once', 'ours', 'decode'):.1f}x batch 1 (target 5)"
    )


if __name__ == "__main__":
    main()
