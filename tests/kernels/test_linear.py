"""The 4-bit and fp16 products, the norm and the rotation, each against its definition."""

from __future__ import annotations

import pytest
import torch

from agentkit.kernels.linear import (
    dense_linear,
    half_linear,
    int4_linear,
    int4_linear_reference,
    pack_dense,
    pack_half,
    pack_int4,
)
from agentkit.kernels.norm import rms_norm, rms_norm_reference
from agentkit.kernels.rope import angles, rotate_, rotate_reference, whole
from tests.kernels.rule import assert_as_exact


@pytest.mark.parametrize("shape", [(16, 32), (64, 96), (960, 576), (48, 1536)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_int4_linear_equals_its_definition_up_to_bf16_scales(shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    q = torch.randint(0, 16, shape, dtype=torch.uint8)
    scale = (torch.rand(shape[0], shape[1] // 32) / 50).to(torch.bfloat16).float()  # exact in bf16, so only the
    minimum = -8 * scale  # products are rounded: Q4_0's form
    x = torch.randn(rows, shape[1]).to(torch.bfloat16).float()
    got = int4_linear(x, pack_int4(q, scale, minimum))
    want = int4_linear_reference(x, q, scale, minimum)
    assert got.dtype is torch.bfloat16
    assert (got - want).norm() / want.norm() < 4e-3  # half a unit in the last place of bf16


@pytest.mark.parametrize("shape", [(15, 32), (16, 40)])
def test_shapes_that_cannot_be_packed_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="^q:"):
        pack_int4(torch.zeros(shape, dtype=torch.uint8), torch.zeros(1, 1), torch.zeros(1, 1))


def test_scales_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="^scale, minimum:"):
        pack_int4(torch.zeros((16, 64), dtype=torch.uint8), torch.zeros(16, 1), torch.zeros(16, 1))


@pytest.mark.parametrize("rows", [1, 5, 16, 130])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_product_equals_the_product_of_the_matrix(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, offset = torch.randn(rows, 96).to(dtype), torch.randn(80, 96).to(dtype), torch.randn(80).to(dtype)
    with torch.inference_mode():
        got = dense_linear(x, pack_dense(weight), offset if bias else None)
        plain = dense_linear(x, weight, offset if bias else None)
    want = x.double() @ weight.double().T + (offset.double() if bias else 0)
    assert got.dtype is dtype
    assert (got - want).norm() <= 2 * (plain - want).norm() + 1e-6


HALF = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has the fp16 product on x86 only"
)


@HALF
@pytest.mark.parametrize("rows", [1, 5, 16, 130])
def test_half_product_loses_no_more_than_the_rounding_of_its_weights(rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 96), torch.randn(80, 96)
    packed = pack_half(weight)
    assert packed is not None
    got = half_linear(x, packed)
    assert got.dtype is torch.float32
    assert (got - x @ weight.half().float().T).abs().max() < 1e-4


def test_weights_beyond_the_range_of_fp16_are_not_packed_as_such() -> None:
    assert pack_half(torch.full((16, 32), 1e5)) is None
    assert pack_half(torch.full((16, 32), torch.nan)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_as_exact_as_its_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(5, 64) * 3).to(dtype), torch.randn(64).to(dtype)
    x[0] *= 1e-4  # where eps counts
    exact = rms_norm_reference(x.double(), weight.double(), 1e-6)
    assert_as_exact(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_in_place_is_as_exact_as_its_definition_far_into_the_context(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16).to(dtype)
    cos, sin = angles(torch.tensor([0, 1, 4096, 262_143]), 5e6 ** -(torch.arange(0, 16, 2) / 16))
    assert cos.dtype is torch.float32
    peer = rotate_reference(x, cos.to(dtype), sin.to(dtype))
    exact = rotate_reference(x.double(), cos.double(), sin.double())
    rotate_(x, *whole(cos, sin, dtype))
    assert_as_exact(x, peer, exact)
    assert torch.equal(x[0], peer[0])  # at position 0 nothing turns
