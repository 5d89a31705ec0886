"""Paged attention: the tiled CPU form against its definition, over every way a context can lie in the pool."""

from __future__ import annotations

import pytest
import torch
import torch.utils._python_dispatch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentkit.kernels.attention import Work, paged_attention, paged_attention_reference
from agentkit.kernels.flash import Layout, merge

SLOTS = 96


@st.composite
def works(draw: st.DrawFn) -> tuple[Work, ...]:
    """Work items whose rows follow each other; their contexts may share slots, as sequences with one prefix do."""
    items: list[Work] = []
    start = 0
    for _ in range(draw(st.integers(1, 7))):
        runs: list[tuple[int, int]] = []
        for _ in range(draw(st.integers(1, 4))):
            first = draw(st.integers(0, SLOTS - 1))
            length = draw(st.integers(1, SLOTS - first))
            runs.append((first, length))
        context = sum(length for _, length in runs)
        rows = draw(st.just(1) | st.integers(1, min(context, 24)))
        items.append(Work(start, rows, tuple(runs)))
        start += rows
    return tuple(items)


@given(
    work=works(),
    shape=st.sampled_from([(9, 3, 64), (4, 4, 32), (8, 2, 16)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    fp8=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_tiled_form_equals_its_definition(
    work: tuple[Work, ...], shape: tuple[int, int, int], dtype: torch.dtype, fp8: bool, seed: int
) -> None:
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    rows = work[-1].start + work[-1].rows
    query = torch.randn(rows, heads, dim, generator=generator).to(dtype)
    pool = torch.randn(SLOTS, 2, kv_heads, dim, generator=generator).to(dtype)
    used = {slot for item in work for first, length in item.runs for slot in range(first, first + length)}
    pool[[slot for slot in range(SLOTS) if slot not in used]] = torch.nan  # nothing outside the runs may be read
    scales = (0.5, 2.0) if fp8 else (1.0, 1.0)
    pool = pool.to(torch.float8_e4m3fn) if fp8 else pool
    got = paged_attention(query, pool[:, 0], pool[:, 1], work, dim**-0.5, *scales)
    wide = pool.double()
    want = paged_attention_reference(query.double(), wide[:, 0], wide[:, 1], work, dim**-0.5, *scales)
    tolerance = (1e-5 if dtype is torch.float32 else 2e-2) * scales[1]
    assert not got.isnan().any()
    assert (got.double() - want).abs().max() < tolerance


def test_definition_is_torchs_attention_on_one_contiguous_sequence() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(12, 4, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    got = paged_attention_reference(query, keys, values, [Work(0, 12, ((0, 12),))], 0.25)
    want = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    assert torch.allclose(got, want, atol=1e-6)


def test_context_is_never_copied() -> None:
    """A decode row over a long context allocates no more than a few of its own outputs."""
    keys = torch.zeros(4096, 2, 64)
    work = [Work(0, 1, ((0, 4000),))]
    with torch.profiler.profile(profile_memory=True) as profile:
        paged_attention(torch.zeros(1, 4, 64), keys, keys, work, 0.125)
    allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    assert allocated < keys.numel() * keys.element_size() / 4


def test_a_run_longer_than_a_stretch_is_one_context() -> None:
    generator = torch.Generator().manual_seed(6)
    pool = torch.randn(9500, 2, 2, 16, generator=generator)
    work = [Work(0, 1, ((300, 9200), (0, 70)))]
    query = torch.randn(1, 4, 16, generator=generator)
    got = paged_attention(query, pool[:, 0], pool[:, 1], work, 0.25)
    assert torch.allclose(got, paged_attention_reference(query, pool[:, 0], pool[:, 1], work, 0.25), atol=1e-5)


def test_of_long_contexts_no_row_is_gathered_however_many_there_are() -> None:
    keys = torch.zeros(4096, 2, 64)
    work = [Work(i, 1, ((i * 512, 300),)) for i in range(8)]
    layout = Layout(work, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        layout.attend(torch.zeros(8, 4, 64), keys, keys, 0.125)
    allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    assert allocated < 8 * 300 * 2 * 64 * 4 / 4


def test_contexts_in_short_runs_are_gathered_and_others_are_not() -> None:
    """A pool that has long been full gives single pages: one call for all such rows, and the right result."""
    calls: list[int] = []
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(1) if function is flash.default else None
            return function(*args, **kwargs or {})

    generator = torch.Generator().manual_seed(5)
    pages = torch.randperm(200, generator=generator).tolist()
    keys, values = (torch.randn(3200, 2, 16, generator=generator) for _ in range(2))
    work = [Work(row, 1, tuple((page * 16, 16) for page in pages[row * 30 : row * 30 + 20 + row])) for row in range(5)]
    work.append(Work(5, 1, ((0, 400),)))
    work.append(Work(6, 9, tuple((page * 16, 16) for page in pages[150:170])))  # a chunk of a prompt
    query = torch.randn(15, 4, 16, generator=generator)
    layout = Layout(work, torch.float32)
    with Counted():
        got = layout.attend(query, keys, values, 0.25)
    assert len(calls) == 4
    assert torch.allclose(got, paged_attention_reference(query, keys, values, work, 0.25), atol=1e-5)


def test_merge_of_one_piece_is_that_piece() -> None:
    part = torch.randn(1, 2, 3, 4)
    assert merge([(part, torch.zeros(1, 2, 3))]) is part


@pytest.mark.parametrize(
    ("query", "keys", "values", "named"),
    [
        ((1, 5, 8), (4, 2, 8), (4, 2, 8), "query"),
        ((1, 4, 8), (4, 2, 8), (4, 2, 16), "keys, values"),
        ((1, 4, 16), (4, 2, 8), (4, 2, 8), "keys, values"),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(
    query: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=f"^{named}:"):
        paged_attention(torch.zeros(query), torch.zeros(keys), torch.zeros(values), [Work(0, 1, ((0, 1),))], 1.0)
