"""Quantised matrices: their error bounds, and the kernels, interpreted, against fp64 and against torch's own error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import gguf.quants
import pytest
import torch
import torch.nn.functional as F
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit.kernels import quant
from agentkit.kernels.quant import (
    BlockKind,
    Kind,
    Quantised,
    configure,
    dequantize,
    dequantize_reference,
    from_blocks,
    launch_dequantize,
    launch_quant_linear,
    quant_linear,
    quant_linear_reference,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    splits,
)
from tests.kernels.rule import assert_as_exact
from tests.kernels.scene import DEVICE

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
KINDS: tuple[Kind, ...] = get_args(Kind)
QUANTIZE: dict[Kind, Callable[[Tensor], Quantised]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "fp8": quantize_fp8,
}
#: Rows of a tile and one more or less; outputs that no tile divides; a group, and inputs with a part of a tile.
SHAPES = [(1, 576, 32), (2, 49, 96), (15, 130, 160), (16, 49, 256), (17, 49, 1536), (33, 7, 576), (64, 1, 160)]


def weights(n: int, k: int, seed: int = 0) -> Tensor:
    """Rows and groups of very different sizes, and some that hold one number only, or nothing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator)
    x[:, :32] *= 8
    x[n // 2, -32:] = 0.25
    x[1 : n // 3 : 4] = 0
    return x


def matrix(kind: Kind, n: int, k: int) -> Quantised:
    """A matrix that lies between rows of NaN, and integers that decode to large numbers."""
    q = QUANTIZE[kind](weights(n, k))

    def between(x: Tensor) -> Tensor:
        floating = x.is_floating_point()
        poison = torch.full((n + 2, *x.shape[1:]), torch.nan if floating else 127.0).to(x.dtype).to(DEVICE)
        poison[1:-1].copy_(x)
        return poison[1:-1]

    return mapped(q, between)


def mapped(q: Quantised, change: Callable[[Tensor], Tensor]) -> Quantised:
    return Quantised(q.kind, change(q.values), change(q.scale), q.minimum if q.minimum is None else change(q.minimum))


def rows(t: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of a wider tensor, with NaN around them."""
    wide = torch.full((t + 1, k + 24), torch.nan, dtype=dtype)
    wide[:t, 8 : k + 8] = torch.randn(t, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    return wide.to(DEVICE)[:t, 8 : k + 8]


def compare(got: Tensor, x: Tensor, q: Quantised, bias: Tensor | None) -> None:
    """The peer is torch's product with the matrix widened to the dtype of the activations."""
    x, q, bias = x.cpu(), mapped(q, Tensor.cpu), None if bias is None else bias.cpu()
    peer = F.linear(x, dequantize_reference(q, x.dtype), bias)
    exact = quant_linear_reference(x.double(), q, bias)
    assert_as_exact(got.cpu(), peer, exact)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_as_exact_as_torch(shape: tuple[int, int, int], kind: Kind, dtype: torch.dtype) -> None:
    t, n, k = shape
    q, x = matrix(kind, n, k), rows(t, k, dtype)
    bias = torch.linspace(-1, 1, n).to(dtype).to(DEVICE) if t % 2 else None
    compare(launch_quant_linear(x, q, bias), x, q, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9, 100])
def test_any_number_of_parts_gives_the_product_with_the_bias_added_once(parts: int, kind: Kind) -> None:
    q, x = matrix(kind, 40, 576), rows(3, 576, torch.bfloat16)
    bias = torch.full((40,), 50.0, dtype=torch.bfloat16, device=DEVICE)
    compare(launch_quant_linear(x, q, bias, parts), x, q, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_parts_give_the_same_bits_again(kind: Kind) -> None:
    q, x = matrix(kind, 40, 1536), rows(5, 1536, torch.bfloat16)
    assert splits(40, 1536, 132, configure("sm_90", kind, x.dtype, 16)) > 1
    assert torch.equal(launch_quant_linear(x, q), launch_quant_linear(x, q))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_order_of_a_sum_does_not_depend_on_the_rows_beside_it(arch: str, kind: Kind, dtype: torch.dtype) -> None:
    few, many = (configure(arch, kind, dtype, tile) for tile in (16, 32))
    assert (few.outputs, few.inputs) == (many.outputs, many.inputs)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_may_have_other_dtypes(kind: Kind, scale: torch.dtype) -> None:
    q, x = matrix(kind, 20, 160), rows(2, 160, torch.bfloat16)
    q = replace(q, scale=q.scale.to(scale), minimum=None if q.minimum is None else q.minimum.to(scale))
    compare(launch_quant_linear(x, q), x, q, None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (2, 1056), (2, 2560)])
def test_widened_matrix_is_its_definition_to_the_bit(shape: tuple[int, int], kind: Kind, dtype: torch.dtype) -> None:
    q = matrix(kind, *shape)
    got = launch_dequantize(q, dtype)
    assert got.dtype is dtype
    assert torch.equal(got.cpu(), dequantize_reference(mapped(q, Tensor.cpu), dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 64, 65])
def test_entry_takes_any_number_of_rows(t: int, kind: Kind, dtype: torch.dtype) -> None:
    q, x = matrix(kind, 24, 64), rows(t, 64, dtype)
    bias = torch.linspace(-1, 1, 24).to(dtype).to(DEVICE)
    got = quant_linear(x, q, bias)
    assert got.dtype is dtype
    compare(got, x, q, bias)


def test_no_rows_give_no_rows() -> None:
    q = matrix("int4", 24, 64)
    assert launch_quant_linear(rows(0, 64, torch.float32), q).shape == (0, 24)
    assert quant_linear(rows(0, 64, torch.float32), q).shape == (0, 24)


def test_columns_that_are_not_together_are_put_together() -> None:
    q = matrix("int8", 24, 64)
    x = rows(64, 40, torch.float32).T[:3]
    x = torch.cat([x, x], 1)[:, :64].T.contiguous().T
    assert x.stride(1) != 1
    assert torch.equal(launch_quant_linear(x, q), launch_quant_linear(x.contiguous(), q))


@pytest.mark.parametrize("kind", get_args(BlockKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_file_are_what_gguf_makes_of_them(kind: BlockKind, dtype: torch.dtype) -> None:
    kinds = GGMLQuantizationType[kind]
    data = gguf.quants.quantize(weights(17, 192).numpy(), kinds)
    wide = torch.from_numpy(gguf.quants.dequantize(data, kinds)).to(dtype)
    q = from_blocks(kind, torch.from_numpy(data))
    assert q.shape == (17, 192)
    assert torch.equal(dequantize(q, dtype), wide)
    exact = dequantize_reference(q, torch.float64)
    q = mapped(q, lambda x: x.to(DEVICE))
    assert torch.equal(launch_dequantize(q, dtype).cpu(), wide)
    x = rows(2, 192, dtype)
    got = launch_quant_linear(x, q)
    assert_as_exact(got.cpu(), F.linear(x.cpu(), wide), x.cpu().double() @ exact.T)


@given(st.integers(0, 2**32 - 1), st.floats(-14, 12), st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_no_weight_moves_further_than_promised(seed: int, size: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(6, 96, generator=generator) + offset) * 2.0**size
    w[seed % 6, : 1 + seed % 95] = w[0, 0]
    q = quantize_int8(w)
    moved = (dequantize_reference(q, torch.float64) - w.double()).abs().view(6, 3, 32)
    assert (moved <= q.scale.double().unsqueeze(-1) * (0.5 + 1e-5)).all()
    assert (q.scale <= w.view(6, 3, 32).abs().amax(-1) / 127 * 1.01 + 1e-6).all()
    # The group as a whole moves no further than it would by 15 steps over its range, the ends of which are in fp16.
    spread = w.view(6, 3, 32).amax(-1) - w.view(6, 3, 32).amin(-1)
    step = (spread / 15 * 1.01 + w.abs().max() / 2000 + 1e-6).double()
    moved = (dequantize_reference(quantize_int4(w), torch.float64) - w.double()).view(6, 3, 32)
    assert (moved.square().sum(-1) <= 32 * (step / 2) ** 2).all()
    q = quantize_fp8(w)
    moved = (dequantize_reference(q, torch.float64) - w.double()).abs()
    allowed = torch.maximum(w.abs() / 16, q.scale.unsqueeze(-1) / 1024).double() * (1 + 1e-5)
    assert (moved <= allowed).all()
    assert (q.values.float().abs().amax(-1) == 448).all()


@pytest.mark.parametrize("tails", [False, True])
def test_searched_ranges_leave_less_of_an_error_than_those_of_ggufs_own_quantiser(tails: bool) -> None:
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    w = w * w.abs() if tails else w
    kind = GGMLQuantizationType.Q4_1
    peer = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), kind), kind))
    ours = dequantize_reference(quantize_int4(w))
    assert (ours - w).square().sum() < 0.85 * (peer - w).square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_nothing_stay_nothing(kind: Kind) -> None:
    assert dequantize(QUANTIZE[kind](torch.zeros(2, 64)), torch.float32).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("w", [torch.ones(2, 40), torch.ones(32), torch.full((2, 32), torch.nan), torch.ones(0, 32)])
def test_what_cannot_be_quantised_is_refused(w: Tensor, kind: Kind) -> None:
    with pytest.raises(ValueError, match="^weight:"):
        QUANTIZE[kind](w)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_weights_beyond_fp16_scales_are_refused(quantize: Callable[[Tensor], Quantised]) -> None:
    with pytest.raises(ValueError, match="^weight:"):
        quantize(torch.linspace(-1e7, 1e7, 64).view(2, 32))


@pytest.mark.parametrize(
    ("n", "k", "parts"),
    # Programs of 128 outputs; two for each of the 132 processors are 264.
    [(6144, 2560, 5), (2560, 4096, 11), (19456, 2560, 3), (2560, 9728, 13), (151936, 2560, 1), (64, 96, 1)],
)
def test_small_matrices_are_cut_until_all_processors_have_work(n: int, k: int, parts: int) -> None:
    assert splits(n, k, 132, configure("sm_90", "int4", torch.bfloat16, 16)) == parts


INT4, INT8, FP8 = (QUANTIZE[kind](weights(4, 64)) for kind in ("int4", "int8", "fp8"))
X, BIAS = torch.ones(2, 64), torch.ones(4)


@pytest.mark.parametrize(
    ("x", "matrix", "bias", "named"),
    [
        (torch.ones(65, 64), INT4, None, "x"),
        (torch.ones(2, 32), INT4, None, "x"),
        (torch.ones(64), INT4, None, "x"),
        (X.double(), INT4, None, "x"),
        (torch.ones(2, 64, device="meta"), INT4, None, "x"),
        (X, INT4, torch.ones(5), "bias"),
        (X, INT4, BIAS.half(), "bias"),
        (X, INT4, torch.ones(8)[::2], "bias"),
        (X, INT4, torch.ones(4, device="meta"), "bias"),
        (X, replace(INT4, kind="int2"), None, "matrix"),
        (X, replace(INT4, values=INT4.values.view(torch.int8)), None, "matrix"),
        (X, replace(INT8, values=INT8.values[:, :40]), None, "matrix"),
        (X, replace(INT8, values=INT8.values.flatten()), None, "matrix"),
        (X, replace(INT8, values=INT8.values.T.contiguous().T), None, "matrix"),
        (X, replace(INT8, values=torch.zeros(258, dtype=torch.int8)[2:].view(4, 64)), None, "matrix"),
        (X, replace(INT8, scale=INT8.scale[:, :1]), None, "matrix"),
        (X, replace(INT8, scale=INT8.scale.double()), None, "matrix"),
        (X, replace(INT8, minimum=INT8.scale), None, "matrix"),
        (X, replace(INT4, minimum=None), None, "matrix"),
        (X, replace(INT4, minimum=INT4.scale.float()), None, "matrix"),
        (X, replace(INT4, minimum=INT4.scale[:2]), None, "matrix"),
        (X, replace(INT4, scale=INT4.scale.to("meta")), None, "matrix"),
        (X, replace(FP8, scale=FP8.scale.half()), None, "matrix"),
        (X, replace(FP8, scale=FP8.scale.unsqueeze(1)), None, "matrix"),
        (X, replace(FP8, values=FP8.values[:0], scale=FP8.scale[:0]), None, "matrix"),
    ],
)
def test_what_does_not_fit_is_named(x: Tensor, matrix: Quantised, bias: Tensor | None, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}:"):
        launch_quant_linear(x, matrix, bias)
    if named == "matrix":
        with pytest.raises(ValueError, match="^matrix:"):
            launch_dequantize(matrix, torch.float32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_87"])
def test_fp8_is_refused_where_there_is_none(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "architecture", lambda _: arch)
    with pytest.raises(ValueError, match=f"^matrix: .*{arch}"):
        launch_quant_linear(X, FP8)
    assert launch_quant_linear(X, INT8).shape == (2, 4)


def test_other_dtypes_are_not_widened_to() -> None:
    for widen in (dequantize, launch_dequantize):
        with pytest.raises(ValueError, match="^dtype:"):
            widen(INT8, torch.float64)


@pytest.mark.parametrize("data", [torch.zeros(2, 35).byte(), torch.zeros(34).byte(), torch.zeros(2, 34).char()])
def test_bytes_that_are_no_blocks_are_refused(data: Tensor) -> None:
    with pytest.raises(ValueError, match="^data:"):
        from_blocks("Q8_0", data)
