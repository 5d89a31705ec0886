"""Moving pages of the pool: copies for forks that part inside a page, and blocks to keep elsewhere and bring back.

A page of one layer is one block of memory, and whatever its dtype, 32-bit words are moved.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agentkit.kernels.jit import jit, tl, triton

#: Words that a program moves: 16 bytes a thread, four times.
_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Copy:
    """The first ``tokens`` tokens of page ``source`` go to page ``target``."""

    source: int
    target: int
    tokens: int


def copy_pages_reference(kv: Tensor, copies: Sequence[Copy], page_size: int) -> Tensor:
    """Definition of `copy_pages`: the pool afterwards, a new tensor."""
    out = kv.clone()
    for c in copies:
        source, target = c.source * page_size, c.target * page_size
        out[:, target : target + c.tokens] = kv[:, source : source + c.tokens]
    return out


def copy_pages(kv: Tensor, copies: Sequence[Copy], page_size: int) -> None:
    """Copy beginnings of pages over all layers, in one launch on a GPU.

    Args:
        kv: ``[layers, slots, 2, kv_heads, d]``, page ``p`` at the slots from ``p * page_size``. For the key bounds of
            pages (`agentkit.kernels.cache`), ``[layers, pages, 2, kv_heads, d]`` with a page size of 1.
        copies: no page is the target of one and the source or target of another.
        page_size: tokens in a page.

    Raises:
        ValueError: a page or token that does not exist, or copies that depend on each other; it names the argument.
    """
    pool = pool_words(kv, page_size)
    targets = {c.target for c in copies}
    for c in copies:
        if not (0 <= c.source < pool.shape[1] and 0 <= c.target < pool.shape[1] and 0 <= c.tokens <= page_size):
            raise ValueError(f"copies: {c} does not fit {pool.shape[1]} pages of {page_size} tokens")
    if len(targets) < len(copies) or targets & {c.source for c in copies}:
        raise ValueError("copies: the target of one is the source or the target of another")
    if kv.device.type == "cuda":
        listed = [(c.source, c.target, c.tokens) for c in copies]
        moves = torch.tensor(listed, dtype=torch.int64, pin_memory=True).view(
            -1, 3
        )  # else the copy waits for the device
        launch_move(pool, pool, moves.to(kv.device, non_blocking=True), page_size)
        return
    token = pool.shape[2] // page_size
    for c in copies:
        pool[:, c.target, : c.tokens * token] = pool[:, c.source, : c.tokens * token]


def gather_pages(kv: Tensor, pages: Tensor, page_size: int) -> Tensor:
    """Pages as blocks of their own, to be kept outside of the pool.

    Args:
        kv: ``[layers, slots, 2, kv_heads, d]``.
        pages: ``[n]`` int64, pages of the pool. On a GPU they are not checked: that would wait for it.
        page_size: tokens in a page.

    Returns:
        ``[n, layers, page_size, 2, kv_heads, d]``, all layers of a page together.

    Raises:
        ValueError: a pool whose pages are no blocks of words; it names the argument.
    """
    pool = pool_words(kv, page_size)
    blocks = kv.new_empty(len(pages), kv.shape[0], page_size, *kv.shape[2:])
    if kv.device.type == "cuda":
        moves = _whole(pages, torch.arange(len(pages), device=kv.device), page_size)
        launch_move(pool, block_words(blocks), moves, page_size)
    else:
        block_words(blocks).copy_(pool[:, pages])
    return blocks


def scatter_pages(kv: Tensor, pages: Tensor, blocks: Tensor, page_size: int) -> None:
    """Bring blocks of `gather_pages` back into the pool.

    Args:
        kv: ``[layers, slots, 2, kv_heads, d]``.
        pages: ``[n]`` int64, distinct pages of the pool, where the blocks go. On a GPU they are not checked.
        blocks: ``[n, layers, page_size, 2, kv_heads, d]`` on the same device.
        page_size: tokens in a page.

    Raises:
        ValueError: blocks of another shape or dtype, or a pool whose pages are no blocks of words; it names the
            argument.
    """
    pool = pool_words(kv, page_size)
    expected = (len(pages), kv.shape[0], page_size, *kv.shape[2:])
    if blocks.shape != expected or blocks.dtype is not kv.dtype or not blocks.is_contiguous():
        raise ValueError(f"blocks: {blocks.dtype} {tuple(blocks.shape)}, expected {kv.dtype} {expected}, contiguous")
    if kv.device.type == "cuda":
        moves = _whole(torch.arange(len(pages), device=kv.device), pages, page_size)
        launch_move(block_words(blocks), pool, moves, page_size)
    else:
        pool[:, pages] = block_words(blocks)


def pool_words(kv: Tensor, page_size: int) -> Tensor:
    """The pool as ``[layers, pages, words]`` int32, a view."""
    if kv.shape[1] % page_size or not kv[0].is_contiguous() or kv.shape[-1] * kv.element_size() % 4:
        raise ValueError(f"kv: {kv.dtype} {tuple(kv.shape)}, strides {kv.stride()}, has no pages of {page_size} tokens")
    return kv.view(torch.int32).unflatten(1, (-1, page_size)).flatten(2)


def block_words(blocks: Tensor) -> Tensor:
    """Blocks as ``[layers, n, words]`` int32, a view."""
    return blocks.view(torch.int32).flatten(2).transpose(0, 1)


def _whole(source: Tensor, target: Tensor, page_size: int) -> Tensor:
    """Moves of whole pages."""
    return torch.stack([source, target, torch.full_like(source, page_size)], 1)


def launch_move(source: Tensor, target: Tensor, moves: Tensor, page_size: int) -> None:
    """Launch the kernel.

    Args:
        source: ``[layers, pages, words]`` int32; words lie together.
        target: likewise, with as many layers and words. May be the same tensor.
        moves: ``[n, 3]`` int64: page of the source, page of the target, how many of its first tokens.
        page_size: tokens in a page.
    """
    if not len(moves):
        return
    grid = (len(moves), source.shape[0], triton.cdiv(source.shape[2], _BLOCK))
    strides = (source.stride(0), source.stride(1), target.stride(0), target.stride(1))
    _move[grid](source, target, moves, source.shape[2] // page_size, *strides, BLOCK=_BLOCK, num_warps=4)


@jit
def _move(source, target, moves, token, source_layer, source_page, target_layer, target_page, BLOCK: tl.constexpr):
    """A stretch of one page in one layer."""
    move = moves + tl.program_id(0).to(tl.int64) * 3
    layer = tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(move + 2).to(tl.int32) * token  # a multiple of a token, which the compiler knows to be even
    source += layer * source_layer + tl.load(move) * source_page
    target += layer * target_layer + tl.load(move + 1) * target_page
    tl.store(target + at, tl.load(source + at, mask=inside, other=0), mask=inside)
