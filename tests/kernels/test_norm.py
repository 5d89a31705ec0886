"""The norm with and without a residual: the kernel, interpreted, against fp64 and against torch's own error."""

from __future__ import annotations

import pytest
import torch

from agentkit.kernels.norm import (
    add_rms_norm_reference,
    launch_rms_norm,
    residual,
    residual_weight,
    rms_norm_reference,
)
from tests.kernels.rule import assert_as_exact

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (2, 576), (2, 1024), (1, 2560), (2, 3, 96)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_as_exact_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-6)
    assert_as_exact(launch_rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), exact)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_with_residual_is_as_exact_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(shape).to(dtype), (torch.randn(shape) * 3).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    total, peer = add_rms_norm_reference(x, residual, weight, 1e-6)
    _, exact = add_rms_norm_reference(x.double(), residual.double(), weight.double(), 1e-6)
    got = launch_rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(residual, total)
    assert_as_exact(got, peer, exact)


def test_norm_is_of_the_sum_as_it_was_stored() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(4, 576).bfloat16(), (torch.randn(4, 576) * 50).bfloat16()
    weight = torch.randn(576).bfloat16()
    got = launch_rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(got, launch_rms_norm(residual, weight, 1e-6))


def test_kernel_reads_rows_of_a_wider_tensor_where_they_lie() -> None:
    torch.manual_seed(0)
    wide, weight = torch.randn(5, 200), torch.randn(64)
    got = launch_rms_norm(wide[:, 100:164], weight, 1e-6)
    assert torch.equal(got, launch_rms_norm(wide[:, 100:164].clone(), weight, 1e-6))


def test_no_rows_give_no_rows() -> None:
    assert launch_rms_norm(torch.empty(0, 16), torch.ones(16), 1e-6).shape == (0, 16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])  # where eps counts, and where a mean could cancel badly
def test_stream_on_the_cpu_sums_in_fp32_and_is_as_exact_as_the_definition(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    x, weight = ((torch.randn(3, 576) + 2) * size).to(dtype), torch.randn(576).to(dtype)
    stream, exact, factor = residual(x), x.double(), residual_weight(weight)
    assert_as_exact(stream.norm(factor, 1e-6), *norms(exact, weight, dtype))
    for _ in range(3):
        added = torch.randn(3, 576).to(dtype)
        exact += added
        assert_as_exact(stream.add_norm(added, factor, 1e-6), *norms(exact, weight, dtype))
    torch.testing.assert_close(stream.plus(added), (exact + added).float())


def norms(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in fp32, rounded once, and in fp64."""
    return rms_norm_reference(x.float(), weight.float(), 1e-6).to(dtype), rms_norm_reference(x, weight.double(), 1e-6)


@pytest.mark.parametrize(
    ("x", "weight", "residual", "named"),
    [
        (torch.ones(2, 0), torch.ones(0), None, "x"),
        (torch.ones(2, 16385), torch.ones(16385), None, "x"),
        (torch.ones(2, 8), torch.ones(9), None, "weight"),
        (torch.ones(2, 8), torch.ones(8).bfloat16(), None, "weight"),
        (torch.ones(2, 8), torch.ones(16)[::2], None, "weight"),
        (torch.ones(2, 8), torch.ones(8), torch.ones(3, 8), "residual"),
        (torch.ones(2, 8), torch.ones(8), torch.ones(2, 8).bfloat16(), "residual"),
        (torch.ones(2, 8), torch.ones(8), torch.ones(2, 16)[:, :8], "residual"),
    ],
)
def test_what_does_not_fit_is_named(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, named: str
) -> None:
    with pytest.raises(ValueError, match=f"^{named}:"):
        launch_rms_norm(x, weight, 1e-6, residual)
