"""Products with weights of 8 and 4 bits, for the matrices of Qwen3-4B: bytes beside the copy, time beside bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit.kernels import quant
from agentkit.kernels.quant import Quantised
from bench.gpu.card import Bench
from bench.gpu.pools import filled
from bench.gpu.report import Item
from bench.gpu.timing import cache_bytes

#: Outputs and inputs of a layer's products.
SHAPES = {"qkv": (6144, 2560), "out": (2560, 4096), "gate, up": (19456, 2560), "down": (2560, 9728)}
MAKE = {"int8": quant.quantize_int8, "int4": quant.quantize_int4, "fp8": quant.quantize_fp8}
Form = Callable[[Tensor], Tensor]


def run(bench: Bench) -> Iterator[Item]:
    shapes = {"toy": (96, 160)} if bench.rehearsal else SHAPES
    counts = (2,) if bench.rehearsal else (1, 64) if bench.quick else (1, 8, 64)
    totals: dict[tuple[str, int], float] = {}
    for name, shape in shapes.items():
        dense = filled(shape, torch.bfloat16, bench.device).mul_(0.02)
        for kind in ("bf16", *MAKE):
            forms, size = _forms(bench, dense, kind)
            for rows in counts:
                x = filled((rows, shape[1]), torch.bfloat16, bench.device)
                seconds = bench.clock.graph([partial(form, x) for form in forms])
                totals[kind, rows] = totals.get((kind, rows), 0.0) + seconds
                label, role = ("torch bf16", "peer") if kind == "bf16" else (kind, "ours")
                yield bench.bytes(f"{name}, {rows} rows, {label}", size, seconds, role=role)
    for (kind, rows), seconds in totals.items():
        if kind != "bf16":
            gain = totals["bf16", rows] / seconds
            yield bench.figure(f"a layer's products, {rows} rows, {kind} over bf16", gain, "×")


def _forms(bench: Bench, dense: Tensor, kind: str) -> tuple[list[Form], int]:
    """Products with so many copies of a matrix that none stays in the cache, and the bytes of one."""
    if kind == "bf16":
        size = dense.numel() * dense.element_size()
        copies = [dense.clone() for _ in range(_count(bench, size))]
        return [partial(F.linear, weight=copy) for copy in copies], size
    matrix = MAKE[kind](dense)
    size = sum(x.numel() * x.element_size() for x in (matrix.values, matrix.scale, matrix.minimum) if x is not None)
    matrices = [_clone(matrix) for _ in range(_count(bench, size))]
    return [partial(quant.launch_quant_linear, matrix=copy) for copy in matrices], size


def _count(bench: Bench, size: int) -> int:
    return 1 if bench.rehearsal else max(2, -(-5 * cache_bytes(bench.device) // size))


def _clone(matrix: Quantised) -> Quantised:
    minimum = matrix.minimum.clone() if matrix.minimum is not None else None
    return replace(matrix, values=matrix.values.clone(), scale=matrix.scale.clone(), minimum=minimum)
