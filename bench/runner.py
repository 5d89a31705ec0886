"""What the runner does on the host before a forward pass: numbers, page tables and the plan of attention, by batch.

    python bench/runner.py [--quick] [--json FILE]

Sequences decode one token a step under the scheduler, and only the making of the batch is timed: no model runs.
"lists" is a GPU's plan of page lists with the sizes of Qwen3-4B, planned for 132 multiprocessors and copied within the
host; "runs" is the CPU's layout. Beside the median of a step stands that of steps in which everything is made anew, as
when a sequence has come or gone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentkit.kernels.plan import Capacity, Shape
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.runtime.config import ModelConfig
from agentkit.runtime.inputs import Inputs
from agentkit.runtime.model import Model
from agentkit.runtime.pages import PagePool
from agentkit.runtime.plan import Scheduler
from agentkit.runtime.radix import PrefixTree
from agentkit.runtime.runner import TorchRunner
from bench.gpu.qwen import TOY, RandomCheckpoint

CASES = ((1, 1_000), (64, 1_000), (1, 262_144 - 600))
PAGE = 16
TARGET = 150.0


def microseconds(model: Model, batch: int, context: int, lists: bool, steps: int) -> tuple[float, float]:
    """Median time of a step, and of one that has nothing in common with the last."""
    pages = batch * (-(-(context + steps + 1) // PAGE) + 8)
    runner = TorchRunner(model, pages, PAGE, 1024, batch)
    if lists:
        capacity = Capacity(rows=4096, pages=pages)
        runner._attention = AttentionPlan(Shape(32, 8, 128, PAGE, pages), capacity, model.device, 132)  # pyright: ignore[reportPrivateUsage]
    pool = PagePool(pages)
    scheduler = Scheduler(pool, PrefixTree(pool, PAGE), PAGE, batch * context, batch, context + steps + 1)
    for rid in range(batch):
        scheduler.submit(rid, [rid + 1, *[7] * (context - 2 - rid % PAGE)])  # they begin pages in different steps
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(steps):
        plan = scheduler.plan()
        anew = step % 8 == 0
        if anew:
            runner._inputs = Inputs(1024, PAGE, model.device)  # pyright: ignore[reportPrivateUsage]
        if step:
            begin = time.perf_counter()
            runner._batch(plan)  # pyright: ignore[reportPrivateUsage]
            times[anew].append(time.perf_counter() - begin)
        scheduler.complete(plan)
        for entry in plan.entries:
            scheduler.append(entry.seq.rid, [1])
    return statistics.median(times[False]) * 1e6, statistics.median(times[True]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # small copies: a team of threads would only be waited for
    cpu = torch.device("cpu")
    config = ModelConfig.from_json(TOY | {"max_position_embeddings": 262_144})
    model = Model(RandomCheckpoint(config, cpu, torch.float32), cpu, torch.float32, packed=False)
    figures: dict[str, float] = {}
    print(f"{'µs':<36}{'next step':>10}{'anew':>10}")
    for batch, context in CASES:
        for lists in (True, False):
            name = f"{'lists' if lists else 'runs'}, batch {batch}, {context:,} tokens"
            figures[name], figures[f"{name}, anew"] = microseconds(
                model, batch, context, lists, 64 if args.quick else 400
            )
            print(f"{name:<36}{figures[name]:>10.0f}{figures[f'{name}, anew']:>10.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print(f"\nbatch 64 {figures['lists, batch 64, 1,000 tokens']:.0f} µs (target {TARGET:.0f})")


if __name__ == "__main__":
    main()
