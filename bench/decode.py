"""Prefill and decode of the embedded model: ours beside transformers' ``generate`` and the floor, in one run.

    python bench/decode.py [--quick] [--json FILE] [--model PATH.gguf]

The floor of a decode step is the bytes of weights it reads over the read bandwidth measured here, now; that of prefill
the operations over the rate of torch's own fp32 or bf16 product, whichever is faster here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import torch

from agentkit.models import resolve
from agentkit.runtime.engine import Engine
from agentkit.runtime.load import Options, choose_dtype, load_engine
from agentkit.runtime.request import Request

TEXT = (
    "The history of the city begins with a small harbour, where traders met twice a year to exchange salt for cloth. "
)


def best(run: Callable[[], float], times: int) -> float:
    """Median of a few runs; machines are shared, a single run says little."""
    return statistics.median(run() for _ in range(times))


def bandwidth() -> float:
    """Bytes a second that a sum over 512 MB reads."""
    data = torch.zeros(128 << 20)
    data.sum()

    def run() -> float:
        begin = time.perf_counter()
        data.sum()
        return data.numel() * 4 / (time.perf_counter() - begin)

    return best(run, 5)


def rate() -> tuple[float, str]:
    """Operations a second of a 2048-cube product, and in which dtype."""
    results: dict[str, float] = {}
    for dtype in {torch.float32, choose_dtype(torch.device("cpu"))}:
        a = torch.randn(2048, 2048).to(dtype)
        a @ a

        def run(a: torch.Tensor = a) -> float:
            begin = time.perf_counter()
            a @ a
            return 2 * 2048**3 / (time.perf_counter() - begin)

        results[str(dtype).removeprefix("torch.")] = best(run, 3)
    name = max(results, key=lambda key: results[key])
    return results[name], name


async def ours(engine: Engine, prompt: list[int], tokens: int, count: int = 1) -> tuple[float, float]:
    """Seconds to the first token and seconds for the rest, of ``count`` requests at once."""
    firsts: list[float] = []
    begin = time.perf_counter()

    async def one(index: int) -> None:
        ids = [index + 300, *prompt]  # each its own first token, so that nothing is shared
        async with engine.generate(Request(ids, max_tokens=tokens, ignore_end=True)) as generation:
            async for _ in generation:
                if len(generation.ids) == 1:
                    firsts.append(time.perf_counter() - begin)

    async with anyio.create_task_group() as group:
        for index in range(count):
            group.start_soon(one, index + 20 * len(prompt) % 1000)
    return max(firsts), time.perf_counter() - begin - max(firsts)


def measure_ours(engine: Engine, prompt: list[int], new: int, times: int) -> dict[str, float]:
    empty, seed = prompt[:16], iter(range(10_000))

    def fresh(ids: list[int]) -> list[int]:
        return [400 + next(seed), *ids]  # never in the prefix tree

    anyio.run(ours, engine, fresh(empty), 8)
    prefill = best(lambda: len(prompt) / anyio.run(ours, engine, fresh(prompt), 1)[0], times)
    decode = best(lambda: (new - 1) / anyio.run(ours, engine, fresh(empty), new)[1], times)
    far = best(lambda: (new - 1) / anyio.run(ours, engine, fresh(prompt), new)[1], times)
    batch = best(lambda: 16 * (new - 1) / anyio.run(ours, engine, fresh(empty), new, 16)[1], times)
    return {"prefill": prefill, "decode": decode, "decode at 1K": far, "16 at once": batch}


def measure_transformers(path: Path, dtype: torch.dtype, prompt: list[int], new: int, times: int) -> dict[str, float]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()

    def generate(ids: list[int], tokens: int) -> float:
        inputs = torch.tensor([ids])
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
        return time.perf_counter() - begin

    generate(prompt[:16], 4)
    first = best(lambda: generate(prompt, 1), times)
    small = best(lambda: generate(prompt[:16], 1), times)
    return {
        "prefill": len(prompt) / first,
        "decode": best(lambda: (new - 1) / (generate(prompt[:16], new) - small), times),
        "decode at 1K": best(lambda: (new - 1) / (generate(prompt, new) - first), times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition, fewer tokens")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a .gguf file")
    args = parser.parse_args()
    times, new = (1, 32) if args.quick else (5, 128)
    path = resolve(args.model)
    engine = load_engine(
        path, Options(drafts=False)
    )  # first: a team of OpenMP threads on this thread would slow the engine's
    prompt = engine.vocab.encode(TEXT * 100)[:1024]
    config = engine.runner.model.config  # pyright: ignore
    linear = config.layers * config.hidden * (
        (config.heads * 2 + config.kv_heads * 2) * config.head_dim + 3 * config.intermediate
    )  # fmt: skip
    figures = {"ours": measure_ours(engine, prompt, new, times)}
    engine.close()
    read, (operations, fastest) = bandwidth(), rate()
    floor = {"prefill": operations / (2 * linear), "decode": read / engine.runner.weight_bytes}
    figures["floor"] = floor
    # Where a CPU does not multiply bfloat16, torch emulates it at a tenth of the speed: no peer, and minutes long.
    for dtype in (torch.float32, torch.bfloat16) if fastest == "bfloat16" else (torch.float32,):
        name = f"transformers {str(dtype).removeprefix('torch.')}"
        figures[name] = measure_transformers(path, dtype, prompt, new, times)

    print(f"{path.name} · torch {torch.__version__} · {torch.get_num_threads()} threads")
    print(f"read {read / 1e9:.1f} GB/s · product {operations / 1e9:.0f} GFLOP/s ({fastest})\n")
    columns = ["prefill", "decode", "decode at 1K", "16 at once"]
    print(f"{'tok/s':<24}" + "".join(f"{c:>14}" for c in columns))
    for name, row in figures.items():
        print(f"{name:<24}" + "".join(f"{row[c]:>14,.0f}" if c in row else f"{'–':>14}" for c in columns))
    peer = {c: max(row[c] for name, row in figures.items() if name.startswith("transformers")) for c in columns[:3]}
    mine = figures["ours"]
    gigabytes = mine["decode"] * engine.runner.weight_bytes / 1e9
    print(f"\ndecode reads {gigabytes:.1f} GB/s, {mine['decode'] / floor['decode']:.0%} of the floor")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print(
        f"decode {mine['decode'] / peer['decode']:.1f}x transformers (target 2) · prefill "
        f"{mine['prefill'] / peer['prefill']:.2f}x (target 1) · 16 at once {mine['16 at once'] / mine['decode']:.1f}x "
        "batch 1 (target 4)"
    )


if __name__ == "__main__":
    main()
