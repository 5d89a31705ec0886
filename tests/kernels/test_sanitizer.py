"""The instruments themselves: the interpreter's bf16 and fp8 are torch's, and every seeded mistake is caught."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from agentkit.kernels.jit import jit, tl
from tests.kernels.rule import assert_as_exact
from tests.kernels.sanitizer import SanitizerError

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@jit
def _copy(x, y, n, BLOCK: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, OTHER: tl.constexpr):
    """Copy and convert; reads READ elements too far, writes WRITE too far."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i + READ, mask=i < n, other=0.0) if OTHER else tl.load(x + i + READ, mask=i < n)
    tl.store(y + i + WRITE, a.to(y.dtype.element_ty), mask=i < n)


def copy(x: Tensor, y: Tensor, read: int = 0, write: int = 0, other: bool = True) -> None:
    _copy[(-(-x.numel() // 16),)](x, y, x.numel(), BLOCK=16, READ=read, WRITE=write, OTHER=other)


@jit
def _binary(x, y, out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=1.0)
    b = tl.load(y + i, mask=i < n, other=1.0)
    if OP == "add":
        c = a + b
    elif OP == "multiply":
        c = a * b
    elif OP == "divide":
        c = a / b
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "select":
        c = tl.where(a < b, a, b)
    else:
        c = tl.fma(a, b, a)
    tl.store(out + i, c.to(out.dtype.element_ty), mask=i < n)


@jit
def _product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@jit
def _sum(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


def values(dtype: torch.dtype) -> Tensor:
    """Numbers of every size, halves between two neighbours, and what is no number."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(400), torch.randn(400) * 100, torch.randn(100) * 1e-6, torch.arange(-448.0, 449.0, 8)])
    halves = torch.randint(0, 2**16, (300,), dtype=torch.int32) << 16 | 0x8000
    halves = halves.view(torch.float32)
    x = torch.cat([x, halves[halves.isfinite() & (halves.abs() < 400)], torch.tensor([0.0, -0.0, torch.nan])])
    return x.to(dtype)


@pytest.mark.parametrize("source", [*FLOATS, torch.float64])
@pytest.mark.parametrize("target", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_are_torchs(source: torch.dtype, target: torch.dtype) -> None:
    x = values(source)
    y = torch.empty(x.shape, dtype=target)
    copy(x, y)
    assert torch.equal(y.double().nan_to_num(nan=12345.0), x.to(target).double().nan_to_num(nan=12345.0))


@pytest.mark.parametrize("source", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("target", FLOATS)
def test_every_fp8_number_widens_to_itself(source: torch.dtype, target: torch.dtype) -> None:
    x = torch.arange(256, dtype=torch.uint8).view(source)
    x = torch.where(x.float().isinf(), torch.zeros(()), x.float()).to(source)
    y = torch.empty(x.shape, dtype=target)
    copy(x, y)
    assert torch.equal(y.float().nan_to_num(nan=12345.0), x.float().nan_to_num(nan=12345.0))


def test_what_fp8_cannot_hold_is_no_number() -> None:
    y = torch.empty(3, dtype=torch.float8_e4m3fn)
    copy(torch.tensor([1e6, -1e6, 448.0]), y)
    assert y.float().isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("operation", ["add", "multiply", "divide", "maximum", "select", "fma"])
def test_arithmetic_of_bf16_is_torchs(operation: str) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(1000) * 3).bfloat16(), (torch.randn(1000) + 4).bfloat16()
    out = torch.empty_like(x)
    _binary[(1,)](x, y, out, 1000, OP=operation, BLOCK=1024)
    want = {
        "add": x + y,
        "multiply": x * y,
        "divide": x / y,
        "maximum": torch.maximum(x, y),
        "select": torch.where(x < y, x, y),
        "fma": (x.double() * y.double() + x.double()).bfloat16(),
    }[operation]
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_products_of_tiles_are_summed_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    out = torch.empty(32, 32)
    _product[(1,)](x, y, out, N=32)
    assert_as_exact(out, x.float() @ y.float(), x.double() @ y.double())


def test_reductions_of_bf16_are_refused() -> None:
    with pytest.raises(Exception, match="cast to fp32 first"):
        _sum[(1,)](torch.zeros(16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16), N=16)


@pytest.mark.parametrize("far", [-1, 1, 100, 10_000_000])
def test_a_stray_read_is_caught(far: int) -> None:
    with pytest.raises(SanitizerError, match="^load outside of the tensors"):
        copy(torch.zeros(40), torch.zeros(40), read=far)


@pytest.mark.parametrize("far", [-1, 1, 100])
def test_a_stray_write_is_caught_before_it_happens(far: int) -> None:
    y = torch.zeros(42)
    with pytest.raises(SanitizerError, match="^store outside of the tensors"):
        copy(torch.ones(40), y[1:41], write=far)
    assert (y[0], y[41]) == (0, 0)


def test_the_gaps_of_a_view_are_outside_of_it() -> None:
    pool = torch.zeros(16, 2)
    with pytest.raises(SanitizerError, match="^store outside of the tensors: 8 of 16"):
        copy(torch.zeros(16), pool[:, 0])


def test_a_masked_load_without_other_is_caught() -> None:
    with pytest.raises(SanitizerError, match="without other="):
        copy(torch.zeros(40), torch.zeros(40), other=False)


@jit
def _all_to_one(x, N: tl.constexpr):
    tl.store(x + tl.program_id(0) // N, tl.program_id(0))


@jit
def _shift(x, n, BLOCK: tl.constexpr):
    """Each program reads what its neighbour writes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(x + i, a, mask=i < n)


@jit
def _lanes_to_one(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i // 2, i.to(tl.float32))


@jit
def _misaligned(x, y):
    tl.store(y, tl.load((x.to(tl.int64) + 2).to(x.dtype)))


@pytest.mark.parametrize("programs", [2, 5])
def test_two_programs_writing_one_element_are_caught(programs: int) -> None:
    x = torch.zeros(programs, dtype=torch.int32)
    _all_to_one[(programs,)](x, N=1)
    assert x.tolist() == list(range(programs))
    with pytest.raises(SanitizerError, match="another stored to"):
        _all_to_one[(programs,)](x, N=2)


def test_reading_what_another_program_writes_is_caught() -> None:
    _shift[(1,)](torch.zeros(16), 16, BLOCK=16)
    with pytest.raises(SanitizerError, match="^race"):
        _shift[(2,)](torch.zeros(32), 32, BLOCK=16)


def test_two_lanes_writing_one_element_are_caught() -> None:
    with pytest.raises(SanitizerError, match="two lanes"):
        _lanes_to_one[(1,)](torch.zeros(16), BLOCK=16)


def test_an_address_between_two_elements_is_caught() -> None:
    with pytest.raises(SanitizerError, match="no multiple of 4"):
        _misaligned[(1,)](torch.zeros(4), torch.zeros(4))


@jit
def _last_sums(x, parts, count, out, N: tl.constexpr, BLOCK: tl.constexpr, SEM: tl.constexpr, EARLY: tl.constexpr):
    """Each program stores a part, the last to arrive sums all; EARLY counts before it stores."""
    p = tl.program_id(0)
    part = tl.sum(tl.load(x + p * BLOCK + tl.arange(0, BLOCK)), 0)
    if not EARLY:
        tl.store(parts + p, part)
    arrived = tl.atomic_add(count, 1, sem=SEM)
    if EARLY:
        tl.store(parts + p, part)
    if arrived == N - 1:
        tl.store(out, tl.sum(tl.load(parts + tl.arange(0, N)), 0))


def last_sums(sem: str = "acq_rel", early: bool = False) -> Tensor:
    x, out = torch.arange(64, dtype=torch.float32), torch.zeros(1)
    count = torch.zeros(1, dtype=torch.int32)
    _last_sums[(4,)](x, torch.zeros(4), count, out, N=4, BLOCK=16, SEM=sem, EARLY=early)
    return out


def test_what_an_atomic_releases_may_be_read() -> None:
    assert last_sums().item() == sum(range(64))


@pytest.mark.parametrize(("sem", "early"), [("relaxed", False), ("acq_rel", True)])
def test_what_no_atomic_releases_may_not(sem: str, early: bool) -> None:
    with pytest.raises(SanitizerError, match="^race"):
        last_sums(sem, early)


def test_a_stray_atomic_is_caught() -> None:
    x = torch.zeros(64)
    with pytest.raises(SanitizerError, match="^atomic outside"):
        _last_sums[(4,)](x, torch.zeros(4), torch.zeros(0, dtype=torch.int32), x, N=4, BLOCK=16, SEM="relaxed", EARLY=0)


def test_the_rule_accepts_the_peers_error_twice_and_no_more() -> None:
    exact = torch.zeros(4, dtype=torch.float64)
    peer = torch.full((4,), 1e-3)
    assert_as_exact(torch.full((4,), 1.9e-3), peer, exact)
    with pytest.raises(AssertionError, match="error 2.1"):
        assert_as_exact(torch.full((4,), 2.1e-3), peer, exact)
    with pytest.raises(AssertionError, match="NaN"):
        assert_as_exact(torch.full((4,), torch.nan), peer, exact)
