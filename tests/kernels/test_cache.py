"""Norm, rotation and store of keys and values: the kernels, interpreted, against fp64, and the entry against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit.kernels.cache import (
    HeadNorms,
    bounds_,
    launch_bounds,
    launch_rotate_and_write,
    rotate_and_write,
    rotate_and_write_reference,
)
from agentkit.kernels.rope import angles, whole
from tests.kernels.rule import assert_as_exact

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FP8 = torch.float8_e4m3fn
SLOTS = 48
#: Beginning and end of Qwen3's context, and a token that writes nothing.
POSITIONS = torch.tensor([0, 1, 4096, 262_143, 100_003])
TARGETS = torch.tensor([7, 40, 0, -1, 23])


def inputs(heads: int, kv_heads: int, d: int, dtype: torch.dtype, normed: bool) -> tuple[Tensor, HeadNorms | None]:
    torch.manual_seed(0)
    qkv = (torch.randn(len(POSITIONS), heads + 2 * kv_heads, d) * 2).to(dtype)
    norms = HeadNorms(torch.randn(d).to(dtype), torch.randn(d).to(dtype), 1e-6) if normed else None
    return qkv, norms


def tables(d: int) -> tuple[Tensor, Tensor]:
    return angles(POSITIONS, 5e6 ** -(torch.arange(0, d, 2) / d))


def double(norms: HeadNorms | None) -> HeadNorms | None:
    return norms and HeadNorms(norms.query.double(), norms.key.double(), norms.eps)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2), (4, 2, 16), (9, 3, 64), (12, 4, 32), (32, 8, 128)])
def test_kernel_is_as_exact_as_torch(shape: tuple[int, int, int], dtype: torch.dtype, normed: bool) -> None:
    heads, kv_heads, d = shape
    qkv, norms = inputs(heads, kv_heads, d, dtype, normed)
    cos, sin = tables(d)
    pool = torch.full((3, SLOTS, 2, kv_heads, d), 77.0, dtype=dtype)
    peer = rotate_and_write_reference(qkv, cos, sin, kv_heads, norms)
    exact = rotate_and_write_reference(qkv.double(), cos, sin, kv_heads, double(norms))
    query = launch_rotate_and_write(qkv, cos, sin, TARGETS, pool[1], norms)
    assert_as_exact(query, peer[0], exact[0])
    written = TARGETS >= 0
    assert_as_exact(pool[1, TARGETS[written]], peer[1][written], exact[1][written])
    others = torch.ones(SLOTS, dtype=torch.bool).index_fill(0, TARGETS[written], False)
    assert (pool[1, others] == 77).all()
    assert (pool[[0, 2]] == 77).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_pool_holds_what_its_scales_make_of_it(dtype: torch.dtype) -> None:
    qkv, norms = inputs(4, 2, 32, dtype, True)
    cos, sin = tables(32)
    scales = (0.125, 0.03)
    pool = torch.zeros(SLOTS, 2, 2, 32, dtype=FP8)
    launch_rotate_and_write(qkv, cos, sin, TARGETS, pool, norms, scales)
    written = TARGETS >= 0
    factor = torch.tensor(scales).view(1, 2, 1, 1)
    exact = rotate_and_write_reference(qkv.double(), cos, sin, 2, double(norms))[1][written]
    small = (rotate_and_write_reference(qkv, cos, sin, 2, norms)[1][written].float() / factor).clamp(-448, 448).to(FP8)
    got = pool.view(torch.uint8)[TARGETS[written]].view(FP8).float() * factor
    assert_as_exact(got, small.float() * factor, exact)


def test_what_fp8_cannot_hold_is_its_largest_number() -> None:
    qkv = torch.cat([torch.ones(1, 2, 4) * 1e4, torch.ones(1, 1, 4) * -1e4], 1)
    pool = torch.zeros(4, 2, 1, 4, dtype=FP8)
    ones, zeros = torch.ones(1, 1, 2), torch.zeros(1, 1, 2)
    for write, tables in (
        (launch_rotate_and_write, (ones, zeros)),
        (rotate_and_write, whole(ones, zeros, qkv.dtype)),
    ):
        pool.zero_()
        write(qkv.clone(), *tables, torch.tensor([2]), pool)
        assert pool[2].float().flatten().tolist() == [448.0] * 4 + [-448.0] * 4


def test_kernel_reads_rows_of_a_wider_projection_where_they_lie() -> None:
    qkv, norms = inputs(4, 2, 16, torch.float32, True)
    wide = torch.full((len(POSITIONS), 11, 16), torch.nan)
    wide[:, 2:10] = qkv
    cos, sin = tables(16)
    first, second = torch.zeros(2, SLOTS, 2, 2, 16)
    query = launch_rotate_and_write(wide[:, 2:10], cos, sin, TARGETS, first, norms)
    assert torch.equal(query, launch_rotate_and_write(qkv, cos, sin, TARGETS, second, norms))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normed", [False, True])
def test_entry_on_the_cpu_is_as_exact_as_its_definition(dtype: torch.dtype, normed: bool) -> None:
    qkv, norms = inputs(9, 3, 16, dtype, normed)
    cos, sin = tables(16)
    pool = torch.full((SLOTS, 2, 3, 16), 77.0, dtype=dtype)
    peer = rotate_and_write_reference(qkv, cos, sin, 3, norms)
    exact = rotate_and_write_reference(qkv.double(), cos, sin, 3, double(norms))
    query = rotate_and_write(qkv.clone(), *whole(cos, sin, dtype), TARGETS, pool, norms)
    assert_as_exact(query, peer[0], exact[0])
    written = TARGETS >= 0
    assert_as_exact(pool[TARGETS[written]], peer[1][written], exact[1][written])
    others = torch.ones(SLOTS, dtype=torch.bool).index_fill(0, TARGETS[written], False)
    assert (pool[others] == 77).all()


@st.composite
def writes(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A page size and slots as steps write them: runs that ascend within pages, padding between them."""
    page = draw(st.sampled_from([1, 4, 16]))
    slots: list[int] = []
    for p in draw(st.permutations(range(5))):
        first = draw(st.integers(0, page - 1))
        slots += range(p * page + first, p * page + draw(st.integers(first, page)))
        slots += [-1] * draw(st.integers(0, 2))
    return page, slots


@given(case=writes(), seed=st.integers(0, 2**31), dtype=st.sampled_from([*FLOATS, FP8]))
@settings(max_examples=40, deadline=None)
def test_bounds_of_a_page_hold_all_of_its_keys(case: tuple[int, list[int]], seed: int, dtype: torch.dtype) -> None:
    page, listed = case
    slots = torch.tensor(listed, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(5 * page, 2, 2, 8, generator=generator).to(dtype)
    scale = 0.5 if dtype is FP8 else 1.0
    before = torch.randn(5, 2, 2, 8, generator=generator)
    got, want = before.clone(), before.clone()
    launch_bounds(pool, slots, got, scale)
    bounds_(pool, slots[slots >= 0], want, scale)
    assert torch.equal(got, want)
    for p in range(5):
        here = slots[(slots >= 0) & (slots // page == p)]
        keys = pool.float()[here, 0] * scale
        if not len(here):
            assert torch.equal(got[p], before[p])
        elif int(here[0]) % page == 0:
            assert torch.equal(got[p], torch.stack([keys.amin(0), keys.amax(0)]))
        else:
            assert torch.equal(got[p, 0], torch.minimum(before[p, 0], keys.amin(0)))
            assert torch.equal(got[p, 1], torch.maximum(before[p, 1], keys.amax(0)))


def test_bounds_do_not_depend_on_how_a_page_was_filled() -> None:
    torch.manual_seed(0)
    cos, sin = whole(*angles(torch.arange(8), 5e6 ** -(torch.arange(0, 16, 2) / 16)), torch.float32)
    qkv = torch.randn(8, 6, 16)
    slots = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    at_once, one_by_one = torch.zeros(2, 4, 2, 2, 16)
    rotate_and_write(qkv.clone(), cos, sin, slots, torch.zeros(16, 2, 2, 16), bounds=at_once)
    pool = torch.zeros(16, 2, 2, 16)
    for t in range(8):
        rotate_and_write(
            qkv[t : t + 1].clone(), cos[t : t + 1], sin[t : t + 1], slots[t : t + 1], pool, bounds=one_by_one
        )
    assert torch.equal(at_once, one_by_one)
    assert torch.equal(at_once[[0, 2]], torch.zeros(2, 2, 2, 16))


def test_no_tokens_write_nothing() -> None:
    pool, bounds = torch.ones(4, 2, 1, 4), torch.ones(2, 2, 1, 4)
    none, table = torch.empty(0, dtype=torch.int64), torch.empty(0, 1, 2)
    assert launch_rotate_and_write(torch.empty(0, 4, 4), table, table, none, pool).shape == (0, 2, 4)
    launch_bounds(pool, none, bounds, 1.0)
    assert (pool == 1).all()
    assert (bounds == 1).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qkv": torch.zeros(2, 4, 8)}, "qkv"),
        ({"qkv": torch.zeros(2, 6, 16)}, "qkv"),
        ({"qkv": torch.zeros(2, 6, 16)[..., ::2]}, "qkv, kv, slots"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "slots"),
        ({"slots": torch.zeros(4, dtype=torch.int64)[::2]}, "qkv, kv, slots"),
        ({"kv": torch.zeros(8, 2, 2, 8, dtype=torch.float16)}, "kv"),
        ({"scales": (0.5, 0.5)}, "scales"),
        ({"cos": torch.zeros(2, 1, 8)}, "cos"),
        ({"sin": torch.zeros(2, 1, 4, dtype=torch.bfloat16)}, "sin"),
        ({"qkv": torch.zeros(2, 6, 12), "kv": torch.zeros(8, 2, 2, 12)}, "qkv"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], named: str) -> None:
    arguments: dict[str, object] = {
        "qkv": torch.zeros(2, 6, 8),
        "cos": torch.zeros(2, 1, 4),
        "sin": torch.zeros(2, 1, 4),
        "slots": torch.zeros(2, dtype=torch.int64),
        "kv": torch.zeros(8, 2, 2, 8),
    }
    with pytest.raises(ValueError, match=f"^{named}:"):
        launch_rotate_and_write(**(arguments | change))  # pyright: ignore[reportArgumentType]


def test_bounds_that_do_not_fit_the_pool_are_named() -> None:
    table = torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="^bounds:"):
        rotate_and_write(
            torch.zeros(1, 6, 8),
            table,
            table,
            torch.tensor([0]),
            torch.zeros(8, 2, 2, 8),
            bounds=torch.zeros(3, 2, 2, 8),
        )
