"""Proofs of the products with quantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from agentkit.kernels import quant
from bench.gpu.card import Bench
from bench.gpu.correctness import Proof, as_exact, same_bits
from tests.kernels.scene import DEVICE

MAKE = {"int8": quant.quantize_int8, "int4": quant.quantize_int4, "fp8": quant.quantize_fp8}


def proofs(bench: Bench) -> Iterator[Proof]:
    toy = bench.rehearsal
    shape, rows = ((96, 160), (2,)) if toy else ((2560, 4096), (1, 17, 64))
    for kind in MAKE:
        for name, dtype in (("bf16", torch.bfloat16),) if toy else (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            for t in rows:
                yield f"product with {kind}, {t} rows of {name}", partial(_product, kind, shape, t, dtype)
        yield f"product with {kind}, odd shape, bias", partial(_product, kind, (70, 96), 3, torch.float32, True)
        yield f"widened {kind}", partial(_widened, kind)
    yield "a product's row depends on no other", partial(_alone, shape)


def _matrix(kind: str, shape: tuple[int, int]) -> quant.Quantised:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    return MAKE[kind](weight.to(DEVICE))


def _product(kind: str, shape: tuple[int, int], rows: int, dtype: torch.dtype, biased: bool = False) -> None:
    matrix = _matrix(kind, shape)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype).to(DEVICE)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(3)).to(dtype).to(DEVICE) if biased else None
    peer = F.linear(x, quant.dequantize_reference(matrix, dtype), bias)
    exact = quant.quant_linear_reference(x.double(), matrix, bias)
    as_exact(quant.launch_quant_linear(x, matrix, bias), peer, exact)


def _widened(kind: str) -> None:
    matrix = _matrix(kind, (5, 1056))
    for dtype in (torch.float32, torch.bfloat16):
        as_exact(
            quant.launch_dequantize(matrix, dtype),
            quant.dequantize_reference(matrix, dtype),
            quant.dequantize_reference(matrix, torch.float64),
        )


def _alone(shape: tuple[int, int]) -> None:
    matrix = _matrix("int4", shape)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).to(DEVICE)
    together, alone = quant.launch_quant_linear(x, matrix), quant.launch_quant_linear(x[3:4].clone(), matrix)
    same_bits(together[3:4], alone, "results differ")
