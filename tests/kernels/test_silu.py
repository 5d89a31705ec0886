"""The gate: the kernel, interpreted, against fp64 and against torch's own error."""

from __future__ import annotations

import pytest
import torch

from agentkit.kernels.silu import launch_silu_mul, silu_mul, silu_mul_reference
from tests.kernels.rule import assert_as_exact

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1024), (2, 1536), (1, 9728)])
def test_kernel_is_as_exact_as_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(shape[0], 2 * shape[1]) * 5).to(dtype)
    exact = silu_mul_reference(gate_up.double())
    assert_as_exact(launch_silu_mul(gate_up), silu_mul_reference(gate_up), exact)


def test_large_gates_neither_overflow_nor_become_nan() -> None:
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 1e4]])
    got = launch_silu_mul(torch.cat([gate, torch.ones_like(gate)], 1))
    assert torch.equal(got, gate.clamp(min=0.0))


def test_no_rows_give_no_rows() -> None:
    assert launch_silu_mul(torch.empty(0, 16)).shape == (0, 8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_entry_equals_its_definition_and_leaves_its_input(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(3, 64).to(dtype)
    before = gate_up.clone()
    assert torch.equal(silu_mul(gate_up), silu_mul_reference(before))
    assert torch.equal(gate_up, before)


def test_a_row_without_two_halves_is_refused() -> None:
    with pytest.raises(ValueError, match="^gate_up:"):
        silu_mul(torch.zeros(2, 3))
