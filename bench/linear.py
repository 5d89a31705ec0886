"""One-step products on the CPU: why weights are stored transposed, and up to how many rows nibbles are multiplied.

    python bench/linear.py [--quick] [--json FILE]

Each row is a matrix of SmolLM2-135M. The floor is the bytes of the fp32 matrix over the read bandwidth measured here;
a matrix that stays in a cache between repetitions beats it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from agentkit.kernels.linear import MAX_ROWS, int4_linear, pack_int4

SHAPES = {"qkv": (960, 576), "out": (576, 576), "gate, up": (3072, 576), "down": (576, 1536)}
ROWS = (1, 4, 8, 16, 64)


def microseconds(run: Callable[[], object], repeats: int) -> float:
    """Best of five loops."""
    run()
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    repeats = 10 if args.quick else 100
    data = torch.zeros(64 << 20)
    bandwidth = data.numel() * 4 / (microseconds(data.sum, 1) * 1e-6)
    print(f"torch {torch.__version__} · {torch.get_num_threads()} threads · reads {bandwidth / 1e9:.1f} GB/s · µs\n")
    print(f"{'matrix':<12}{'rows':>5}{'floor':>8}{'x @ W.T':>10}{'x @ Wt':>10}{'int4':>8}")
    figures: dict[str, dict[str, float]] = {}
    totals = dict.fromkeys(ROWS, 0.0)
    for name, (outputs, inputs) in SHAPES.items():
        weight = torch.randn(outputs, inputs)
        transposed = weight.T.contiguous()
        q = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
        packed = pack_int4(q, torch.rand(outputs, inputs // 32), torch.rand(outputs, inputs // 32))
        floor = weight.numel() * 4 / bandwidth * 1e6
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            stored = microseconds(lambda x=x, w=weight: torch.nn.functional.linear(x, w), repeats)
            ours = microseconds(lambda x=x, w=transposed: x @ w, repeats)
            int4 = microseconds(lambda x=x, w=packed: int4_linear(x, w), repeats)
            figures[f"{name} {rows}"] = {"floor": floor, "x @ W.T": stored, "x @ Wt": ours, "int4": int4}
            totals[rows] += stored / ours / len(SHAPES)
            print(f"{name:<12}{rows:>5}{floor:>8.0f}{stored:>10.0f}{ours:>10.0f}{int4:>8.0f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    gains = ", ".join(f"{gain:.1f}x at {rows}" for rows, gain in totals.items())
    print(f"\ntransposed weights: {gains} rows (target 1 or more); nibbles are used up to {MAX_ROWS} rows")


if __name__ == "__main__":
    main()
