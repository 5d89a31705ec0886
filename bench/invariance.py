"""What invariance costs: prefill and decode with `Options(invariant=True)` and without, in one run.

    python bench/invariance.py [--quick] [--json FILE] [--model PATH.gguf]

The two take turns, each loaded anew: two engines at once would have more threads than there are cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import anyio
import torch
from decode import TEXT, ours

from agentkit.models import resolve
from agentkit.runtime.invariant import InvariantRunner
from agentkit.runtime.load import Options, load_engine

COLUMNS = ("prefill", "decode", "decode at 1K", "16 at once")


def measure(path: Path, invariant: bool, new: int, seed: int) -> tuple[dict[str, float], str]:
    """Tokens a second of each column, and the heights of pieces where there are some."""
    with load_engine(path, Options(drafts=False, invariant=invariant)) as engine:
        prompt = engine.vocab.encode(TEXT * 100)[:1024]
        empty, far = [400 + seed, *prompt[:16]], [500 + seed, *prompt]
        anyio.run(ours, engine, empty, 4)
        first, rest = anyio.run(ours, engine, far, new)
        row = {
            "prefill": (len(far) + 1) / first,
            "decode": (new - 1) / anyio.run(ours, engine, empty, new)[1],
            "decode at 1K": (new - 1) / rest,
            "16 at once": 16 * (new - 1) / anyio.run(ours, engine, empty, new, 16)[1],
        }
        runner = engine.runner
        heights = ", ".join(map(str, runner.heights)) if isinstance(runner, InvariantRunner) else ""
        return row, heights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repetition, fewer tokens")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a .gguf file")
    args = parser.parse_args()
    times, new = (1, 24) if args.quick else (3, 64)
    path = resolve(args.model)
    rounds: dict[str, list[dict[str, float]]] = {"as it is": [], "invariant": []}
    heights = ""
    for seed in range(times):
        rounds["as it is"].append(measure(path, False, new, seed)[0])
        row, heights = measure(path, True, new, seed)
        rounds["invariant"].append(row)
    figures = {name: {c: statistics.median(row[c] for row in rows) for c in COLUMNS} for name, rows in rounds.items()}
    price = {
        c: statistics.median(a[c] / b[c] for a, b in zip(rounds["as it is"], rounds["invariant"], strict=True))
        for c in COLUMNS
    }

    print(f"{path.name} · torch {torch.__version__} · {torch.get_num_threads()} threads · pieces of {heights} rows\n")
    print(f"{'tok/s':<12}" + "".join(f"{c:>14}" for c in COLUMNS))
    for name, row in figures.items():
        print(f"{name:<12}" + "".join(f"{row[c]:>14,.0f}" for c in COLUMNS))
    print(f"{'times as long':<12}" + "".join(f"{price[c]:>14.2f}" for c in COLUMNS)[1:])
    if args.json:
        args.json.write_text(json.dumps({**figures, "times as long": price}, indent=1))
    print(
        f"\ninvariance: prefill takes {price['prefill']:.2f}x as long, decode {price['decode']:.2f}x (no target: it is "
        "for replay and tests)"
    )


if __name__ == "__main__":
    main()
