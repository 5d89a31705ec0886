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
    """Random blocks; those of Q4_K, which gguf does not quantise to, of random codes under small factors."""
    random = np.random.default_rng(seed)
    if kind == "Q4_K":
        raw = random.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
        raw[..., :4] = random.uniform(1e-4, 3e-4, (rows, columns // 256, 2)).astype(np.float16).view(np.uint8)
        return Blocks(kind, (rows, columns), torch.from_numpy(raw).flatten(1))
    weight = random.normal(0, 0.05, (rows, columns)).astype(np.float32)
    data = torch.from_numpy(quants.quantize(weight, GGMLQuantizationType[kind]))
    return Blocks(kind, (rows, columns), data)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 5), ("Q4_1", 5), ("Q4_K", 5), ("Q8_0", 8.5)])
def test_quantised_matrices_are_joined_without_being_widened(kind: BlockKind, bits: float) -> None:
    parts = [blocks(kind, 48, 512, 1), blocks(kind, 16, 512, 2)]
    dense = torch.cat([part.dense(torch.float32) for part in parts])
    x, bias = torch.randn(3, 512), torch.randn(64)
    matrix = _quantised(parts, CPU)
    assert matrix is not None
    linear = Linear(matrix, bias)
    close = 1e-3 if kind == "Q4_K" else 1e-5  # the products of its factors are rounded to fp16
    torch.testing.assert_close(linear(x), x @ dense.T + bias, rtol=close, atol=close)
    assert linear.weight_bytes == 64 * 512 * bits / 8


def test_matrices_of_different_forms_are_not_joined() -> None:
    assert _quantised([blocks("Q4_1", 16, 64), blocks("Q8_0", 16, 64)], CPU) is None
    assert _quantised([blocks("Q4_1", 16, 64), torch.ones(16, 64)], CPU) is None
    assert _int4([blocks("Q4_1", 16, 64), blocks("Q8_0", 16, 64)]) is None


@pytest.mark.parametrize("rows", [1, 4, 16, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_every_form_on_the_cpu_is_the_same_map(kind: BlockKind, rows: int, dtype: torch.dtype) -> None:
    part = blocks(kind, 64, 256)
    dense = part.dense(torch.float32)
    x, bias = torch.randn(rows, 256), torch.randn(64)
    exact = x.double() @ dense.double().T + bias.double()
    # bf16 keeps 8 bits of each factor; the sums stay below 4.
    for half, nibbles in ((False, None), (True, None), (True, _int4([part]))):
        linear = Linear(dense.to(dtype), bias.to(dtype), nibbles, half)
        error = (linear(x.to(dtype)).double() - exact).abs().max()
        assert error < (1e-5 if dtype is torch.float32 and not half else 4e-2), (half, nibbles is not None)
