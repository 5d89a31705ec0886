"""One-step products on the CPU: the form in which each matrix of a model is kept, and up to how many rows.

    python bench/linear.py [--quick] [--json FILE]

Each row is a matrix of SmolLM2-135M. The floor is the bytes of the fp32 matrix over the read bandwidth measured here;
a matrix that stays in a cache between repetitions beats it, so that small forms look alike here and differ in a model
(`bench/decode.py`). "plain" is torch's own product of the matrix as checkpoints store it. "only int4" and "only int8"
are what `Options(weights=...)` runs: for many rows they widen the matrix piece by piece.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from agentkit.kernels.compact import INT4_ROWS, INT8_ROWS, compact_linear, quantize_rows
from agentkit.kernels.linear import dense_linear, half_linear, int4_linear, int4_rows, pack_dense, pack_half, pack_int4

SHAPES = {"qkv": (960, 576), "out": (576, 576), "gate, up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
ROWS = (1, 4, 8, 16, 64, 512)


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
    columns = ("floor", "plain", "packed", "bf16 plain", "bf16 packed", "fp16", "int4", "only int4", "only int8")
    print(f"{'matrix':<12}{'rows':>5}" + "".join(f"{c:>12}" for c in columns))
    figures: dict[str, dict[str, float]] = {}
    gains: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for name, (outputs, inputs) in SHAPES.items():
        weight = torch.randn(outputs, inputs)
        small = weight.to(torch.bfloat16)
        packed, small_packed, half = pack_dense(weight), pack_dense(small), pack_half(weight)
        q = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
        nibbles = pack_int4(q, torch.rand(outputs, inputs // 32), torch.rand(outputs, inputs // 32))
        rounded = quantize_rows(weight)
        for rows in ROWS:
            repeated = max(1, repeats // (50 if name == "head" else 1) // max(1, rows // 8))
            x = torch.randn(rows, inputs)
            y = x.to(torch.bfloat16)
            forms: dict[str, Callable[[], object]] = {
                "plain": lambda x=x, w=weight: F.linear(x, w),
                "packed": lambda x=x, w=packed: dense_linear(x, w),
                "bf16 plain": lambda x=y, w=small: F.linear(x, w),
                "bf16 packed": lambda x=y, w=small_packed: dense_linear(x, w),
                "int4": lambda x=y, w=nibbles: int4_linear(x, w),
                "only int4": lambda x=y, w=nibbles: compact_linear(x, w),
                "only int8": lambda x=y, w=rounded: compact_linear(x, w),
            }
            if half is not None:
                forms["fp16"] = lambda x=x, w=half: half_linear(x, w)
            row = {"floor": weight.numel() * 4 / bandwidth * 1e6}
            row |= {form: microseconds(run, repeated) for form, run in forms.items()}
            figures[f"{name} {rows}"] = row
            gains[rows].append(row["plain"] / row["packed"])
            print(f"{name:<12}{rows:>5}" + "".join(f"{row[c]:>12.0f}" if c in row else f"{'–':>12}" for c in columns))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    said = ", ".join(f"{statistics.mean(gain):.1f}x at {rows}" for rows, gain in gains.items())
    limits = f"{int4_rows(torch.bfloat16)} (bf16) and {int4_rows(torch.float32)} (fp32)"
    print(
        f"\npacked over plain in fp32: {said} rows (target 1 or more); nibbles are used up to {limits} rows, "
        f"where they are alone up to {INT4_ROWS}, int8 up to {INT8_ROWS}"
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
