"""Moving pages: the kernel, interpreted, and the entries, bit by bit against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agentkit.kernels.pages import (
    Copy,
    block_words,
    copy_pages,
    copy_pages_reference,
    gather_pages,
    launch_move,
    pool_words,
    scatter_pages,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]
LAYERS, PAGES = 3, 6


def pool(page_size: int, dtype: torch.dtype) -> Tensor:
    """Every bit pattern, those of NaN too: pages are moved, not computed with."""
    torch.manual_seed(0)
    bits = torch.randint(0, 256, (LAYERS, PAGES * page_size, 2, 2, 8 * dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def copy_by_kernel(kv: Tensor, copies: list[Copy], page_size: int) -> None:
    words = pool_words(kv, page_size)
    moves = torch.tensor([(c.source, c.target, c.tokens) for c in copies], dtype=torch.int64).view(-1, 3)
    launch_move(words, words, moves, page_size)


@st.composite
def copies(draw: st.DrawFn) -> tuple[int, list[Copy]]:
    """Copies from pages 0 to 2, which may repeat, to pages 3 to 5, which may not."""
    page_size = draw(st.sampled_from([1, 4, 16]))
    pages = draw(st.lists(st.integers(3, 5), unique=True))
    tokens = st.integers(0, page_size)
    return page_size, [Copy(draw(st.integers(0, 2)), page, draw(tokens)) for page in pages]


@given(case=copies(), dtype=st.sampled_from(DTYPES), copy=st.sampled_from([copy_pages, copy_by_kernel]))
@settings(max_examples=60, deadline=None)
def test_copies_take_the_first_tokens_of_all_layers(
    case: tuple[int, list[Copy]], dtype: torch.dtype, copy: Callable[[Tensor, list[Copy], int], None]
) -> None:
    page_size, listed = case
    kv = pool(page_size, dtype)
    want = copy_pages_reference(kv.view(torch.uint8), listed, page_size)
    copy(kv, listed, page_size)
    assert same(kv, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("pages", [[], [4], [5, 0, 3], [2, 2]])
def test_gathered_blocks_are_the_pages(pages: list[int], page_size: int, dtype: torch.dtype) -> None:
    kv = pool(page_size, dtype)
    listed = torch.tensor(pages, dtype=torch.int64)
    blocks = gather_pages(kv, listed, page_size)
    assert blocks.shape == (len(pages), LAYERS, page_size, 2, 2, 8)
    for block, page in zip(blocks, pages, strict=True):
        assert same(block, kv[:, page * page_size : (page + 1) * page_size])
    by_kernel = torch.zeros_like(blocks)
    words = pool_words(kv, page_size)
    moves = torch.tensor([(page, i, page_size) for i, page in enumerate(pages)], dtype=torch.int64).view(-1, 3)
    launch_move(words, block_words(by_kernel), moves, page_size)
    assert same(by_kernel, blocks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scattered_blocks_land_on_other_pages_and_touch_no_others(dtype: torch.dtype) -> None:
    kv = pool(4, dtype)
    before = kv.clone()
    blocks = gather_pages(kv, torch.tensor([1, 4]), 4)
    scatter_pages(kv, torch.tensor([3, 0]), blocks, 4)
    assert same(kv, copy_pages_reference(before.view(torch.uint8), [Copy(1, 3, 4), Copy(4, 0, 4)], 4))
    by_kernel = before.clone()
    words = pool_words(by_kernel, 4)
    launch_move(block_words(blocks), words, torch.tensor([(0, 3, 4), (1, 0, 4)]), 4)
    assert same(by_kernel, kv)


def test_a_page_larger_than_a_program_is_moved_whole() -> None:
    kv = torch.arange(2 * 32 * 2 * 4 * 64, dtype=torch.float32).view(2, 32, 2, 4, 64)
    want = copy_pages_reference(kv, [Copy(0, 1, 13)], 16)
    copy_by_kernel(kv, [Copy(0, 1, 13)], 16)
    assert torch.equal(kv, want)


@pytest.mark.parametrize(
    "wrong",
    [
        [Copy(0, 6, 1)],
        [Copy(-1, 3, 1)],
        [Copy(0, 3, 5)],
        [Copy(0, 3, -1)],
        [Copy(0, 3, 1), Copy(1, 3, 1)],
        [Copy(0, 3, 1), Copy(3, 4, 1)],
        [Copy(2, 2, 1)],
    ],
)
def test_copies_that_do_not_fit_are_refused_before_any_is_made(wrong: list[Copy]) -> None:
    kv = pool(4, torch.bfloat16)
    before = kv.clone()
    with pytest.raises(ValueError, match="^copies:"):
        copy_pages(kv, [Copy(1, 5, 4), *wrong], 4)
    assert same(kv, before)


def test_blocks_of_another_shape_or_dtype_are_refused() -> None:
    kv = pool(4, torch.bfloat16)
    blocks = gather_pages(kv, torch.tensor([1, 4]), 4)
    for wrong in (blocks[:1], blocks.float(), blocks.transpose(3, 4)):
        with pytest.raises(ValueError, match="^blocks:"):
            scatter_pages(kv, torch.tensor([3, 0]), wrong, 4)


@pytest.mark.parametrize(
    ("kv", "page_size"),
    [
        (torch.zeros(2, 10, 2, 1, 4), 4),
        (torch.zeros(2, 8, 4, 1, 4)[:, :, ::2], 4),
        (torch.zeros(2, 8, 2, 1, 2, dtype=torch.float8_e4m3fn), 4),
    ],
)
def test_a_pool_without_such_pages_is_refused(kv: Tensor, page_size: int) -> None:
    with pytest.raises(ValueError, match="^kv:"):
        gather_pages(kv, torch.tensor([0]), page_size)
