"""The forms in which the model keeps a matrix; that the whole is exact is shown in tests/e2e/test_exact.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from agentkit.runtime.model import Linear, _int4, _quantised
from agentkit.runtime.weights import BlockKind, Blocks

CPU = torch.device("cpu")


def blocks(kind: BlockKind, rows: int, columns: int, seed: int = 0) -> Blocks:
    weight = np.random.default_rng(seed).normal(0, 0.05, (rows, columns)).astype(np.float32)
    data = torch.from_numpy(quants.quantize(weight, GGMLQuantizationType[kind]))
    return Blocks(kind, (rows, columns), data)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantised_matrices_are_joined_without_being_widened(kind: BlockKind) -> None:
    parts = [blocks(kind, 48, 96, 1), blocks(kind, 16, 96, 2)]
    dense = torch.cat([part.dense(torch.float32) for part in parts])
    x, bias = torch.randn(3, 96), torch.randn(64)
    matrix = _quantised(parts, CPU)
    assert matrix is not None
    linear = Linear(matrix, bias)
    torch.testing.assert_close(linear(x), x @ dense.T + bias, rtol=1e-5, atol=1e-5)
    minimum = 2 * 64 * 3 if kind == "Q4_0" else 0  # fp16 for each group, where the file has only the rule for it
    assert linear.weight_bytes == sum(part.data.numel() for part in parts) + minimum


def test_matrices_of_different_forms_are_not_joined() -> None:
    assert _quantised([blocks("Q4_1", 16, 64), blocks("Q8_0", 16, 64)], CPU) is None
    assert _quantised([blocks("Q4_1", 16, 64), torch.ones(16, 64)], CPU) is None
    assert _int4([blocks("Q4_1", 16, 64), blocks("Q8_0", 16, 64)]) is None


@pytest.mark.parametrize("rows", [1, 4, 16, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_on_the_cpu_is_the_same_map(rows: int, dtype: torch.dtype) -> None:
    part = blocks("Q4_1", 64, 96)
    dense = part.dense(torch.float32)
    x, bias = torch.randn(rows, 96), torch.randn(64)
    exact = x.double() @ dense.double().T + bias.double()
    # bf16 keeps 8 bits of each factor; the sums stay below 4.
    for half, nibbles in ((False, None), (True, None), (True, _int4([part]))):
        linear = Linear(dense.to(dtype), bias.to(dtype), nibbles, half)
        error = (linear(x.to(dtype)).double() - exact).abs().max()
        assert error < (1e-5 if dtype is torch.float32 and not half else 4e-2), (half, nibbles is not None)
