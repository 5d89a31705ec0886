"""Products on the CPU whose weights exist in 4 or 8 bits only, at any number of rows, against fp64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit.kernels import compact
from agentkit.kernels.compact import Int8, compact_linear, int8_linear_reference, outputs_together, quantize_rows
from agentkit.kernels.linear import Int4, pack_int4
from tests.kernels.rule import assert_as_exact


def four_bits(n: int, k: int) -> tuple[Int4, Tensor]:
    """A matrix and what it stands for, in fp64; scales and zeros are of bf16, so that packing rounds nothing."""
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale, zero = torch.rand(n, k // 32).to(torch.bfloat16), torch.randn(n, k // 32).to(torch.bfloat16)
    wide, least = scale.double(), zero.double() - 8 * scale.double()
    exact = q.double() * wide.repeat_interleave(32, 1) + least.repeat_interleave(32, 1)
    return pack_int4(q, scale, (zero.float() - 8 * scale.float())), exact


def eight_bits(n: int, k: int) -> tuple[Int8, Tensor]:
    weight = quantize_rows(torch.randn(n, k) * torch.rand(n, 1))
    return weight, weight.values.double() * weight.scale.double().unsqueeze(1)


FORMS = {"int4": four_bits, "int8": eight_bits}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 130])
@pytest.mark.parametrize("shape", [(64, 32), (48, 96), (1088, 64), (192, 576)])
@pytest.mark.parametrize("form", FORMS)
def test_product_is_as_exact_as_torchs_in_bf16(
    form: str, shape: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, wide = FORMS[form](*shape)
    x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    exact = F.linear(x.double(), wide, bias.double())
    peer = F.linear(x.to(torch.bfloat16), wide.to(torch.bfloat16), bias.to(torch.bfloat16)).to(dtype)
    got = compact_linear(x, weight, bias)
    assert got.dtype is dtype
    assert_as_exact(got, peer, exact)
    if isinstance(weight, Int8):
        torch.testing.assert_close(int8_linear_reference(x.double(), weight) + bias.double(), exact)


@pytest.mark.parametrize("form", FORMS)
def test_many_rows_of_fp32_are_multiplied_in_fp32(form: str) -> None:
    torch.manual_seed(0)
    weight, wide = FORMS[form](128, 576)
    x = torch.randn(65, 576)
    assert_as_exact(compact_linear(x, weight), F.linear(x, wide.float()), F.linear(x.double(), wide))


@pytest.mark.skipif(sys.platform != "linux", reason="torch's choice of instructions is overridden on Linux")
@pytest.mark.parametrize(("capability", "block"), [("avx2", 32), ("default", 0)])
def test_layouts_of_other_processors_are_recognised(capability: str, block: int) -> None:
    """Where a layout is not known, many rows take the product of nibbles: the result is the same."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no such vectors")
    code = f"""
import torch, torch.nn.functional as F
from tests.kernels.test_compact import compact_linear, four_bits, outputs_together
assert outputs_together() == {block}, outputs_together()
weight, wide = four_bits(128, 96)
x = torch.randn(65, 96)
assert (compact_linear(x, weight).double() - F.linear(x.double(), wide)).abs().max() < {1e-3 if block else 1.0}
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_this_processors_layout_is_one_that_is_known() -> None:
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert outputs_together() in (32, 64)


@given(st.integers(0, 2**32 - 1), st.floats(-100, 100))
@settings(max_examples=40, deadline=None)
def test_no_weight_moves_by_more_than_half_of_its_rows_scale(seed: int, size: float) -> None:
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    q = quantize_rows(w)
    moved = (q.values.double() * q.scale.double().unsqueeze(1) - w.double()).abs()
    assert (moved <= q.scale.double().unsqueeze(1) * (0.5 + 1e-5)).all()
    assert (q.scale.double() <= w.double().abs().amax(1) / 127 * 1.02).all()


def test_a_row_of_nothing_stays_nothing() -> None:
    q = quantize_rows(torch.zeros(2, 64))
    assert not q.values.any()
    assert not compact_linear(torch.ones(1, 64), q).any()


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(0, 4), torch.full((2, 4), torch.inf)])
def test_what_has_no_8_bit_form_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="^weight:"):
        quantize_rows(weight)


def test_widening_needs_little_memory_beside_the_result() -> None:
    weight, _ = four_bits(4096, 256)
    x = torch.randn(compact.INT4_ROWS + 1, 256)
    compact_linear(x, weight)
    with torch.profiler.profile(profile_memory=True) as profile:
        compact_linear(x, weight)
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert max(sizes) <= max(4 * x.shape[0] * 4096, 4 * 512 * 256)  # the result, or 512 outputs in fp32
