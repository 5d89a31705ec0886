"""Dual chunk attention: no key is further from a row than a model has been trained for, however long its context is.

A context is cut into chunks of equal length, and a key is rotated by its place in its chunk. A row has three queries:
one rotated by its own place, for the keys of its chunk; one for the chunk before, rotated so that keys across the
border are at their true distance as long as that is small; and one, always rotated alike, for all that came earlier.
The softmax is over all of them. Source: An et al. 2024 (arXiv:2402.17463), as Qwen2.5-1M uses it (arXiv:2501.15383). A
context of one chunk is attended to as ever.

Since the rotation of a key depends on its position alone, pages are shared as with any other attention. On a GPU the
three queries of a row are three rows of a plan with one result (`agentkit.kernels.groups.chunked`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agentkit.kernels.flash import Item, Part, joined, parts, split

#: Queries of a row: for the keys of its own chunk, of the one before, and of all earlier ones.
TURNS = 3


def turned(positions: Tensor, length: int, farthest: int) -> Tensor:
    """By which positions the queries of rows are rotated.

    The first third is also what their keys are rotated by.

    Args:
        positions: ``[t]`` int64, in the whole context.
        length: tokens of a chunk.
        farthest: the largest distance; more than ``length`` by the tokens whose true distance is kept across a border.

    Returns:
        ``[3 * t]`` int64, all first queries, then all second ones, then all third ones.
    """
    own = positions % length
    near = (own + length).clamp(max=farthest)
    return torch.cat([own, near, torch.full_like(own, min(2 * length - 1, farthest))])


def chunked_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    work: Sequence[Item],
    length: int,
    scale: float,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """Definition: one softmax over a context whose keys are multiplied with one of three queries of each row.

    It computes in fp32, or in fp64 where the query is fp64.

    Args:
        query: ``[3 * t, heads, d]``, rotated as `turned` says.
        keys: ``[slots, kv_heads, d]``, the pool of one layer; ``heads`` is a multiple of ``kv_heads``.
        values: ``[slots, kv_heads, d]``.
        work: items whose rows follow each other and cover the ``t`` rows.
        length: tokens of a chunk.
        scale: factor on the products.
        key_scale: what the stored keys are multiplied by, for a pool in fp8.
        value_scale: what the stored values are multiplied by.

    Returns:
        ``[t, heads, d]`` in the dtype of ``query``.
    """
    turns = query.chunk(TURNS)
    out = torch.empty_like(turns[0], memory_format=torch.contiguous_format)
    group, wide = query.shape[1] // keys.shape[1], torch.promote_types(query.dtype, torch.float32)
    for item in work:
        slots = torch.cat([torch.arange(first, first + count) for first, count in item.runs]).to(keys.device)
        k = keys[slots].transpose(0, 1).to(wide).repeat_interleave(group, 0) * key_scale
        v = values[slots].transpose(0, 1).to(wide).repeat_interleave(group, 0) * value_scale
        rows = slice(item.start, item.start + item.rows)
        at = torch.arange(item.context, device=keys.device)
        own = at[-item.rows :, None]
        apart = (own // length - at // length).clamp(max=TURNS - 1)
        scores = torch.full((query.shape[1], *apart.shape), -math.inf, dtype=wide, device=keys.device)
        for turn, queries in enumerate(turns):
            products = queries[rows].transpose(0, 1).to(wide) @ k.transpose(1, 2) * scale
            scores = torch.where((apart == turn) & (at <= own), products, scores)
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
    return out


class Chunked:
    """`chunked_attention_reference` on the CPU, ready for every layer, as `agentkit.kernels.flash.Layout` is.

    Args:
        work: items whose rows follow each other and cover the batch.
        length: tokens of a chunk.
    """

    def __init__(self, work: Sequence[Item], length: int) -> None:
        self._blocks = [block for item in work for block in _blocks(item, length)]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention of each row over all of its context.

        Args:
            query: ``[3 * t, heads, d]``.
            keys: ``[slots, kv_heads, d]``, of the query's dtype or float8_e4m3fn.
            values: like ``keys``.
            scale: factor on the products.

        Returns:
            ``[t, heads, d]``.
        """
        turns = query.chunk(TURNS)
        out = torch.empty_like(turns[0], memory_format=torch.contiguous_format)
        for rows, seen in self._blocks:
            found: list[Part] = []
            for queries, runs in zip(turns, seen, strict=True):
                if runs:
                    q = queries[rows]
                    found += parts(q, keys, values, runs, 0 if found else len(q), scale)
            out[rows] = joined(found, out[rows].shape)
        return out


class _Block(NamedTuple):
    """Rows of one chunk, and the runs of slots that each of their queries is for."""

    rows: slice
    seen: tuple[list[tuple[int, int]], ...]


def _blocks(item: Item, length: int) -> Iterator[_Block]:
    """The rows of an item, cut where a chunk ends."""
    first = item.context - item.rows
    for begin in range(first // length * length, item.context, length):
        low, high = max(first, begin), min(begin + length, item.context)
        past, rest = split(item.runs, begin)
        own, _ = split(rest, high - begin)
        far, near = split(past, begin - length)
        yield _Block(slice(item.start + low - first, item.start + high - first), (own, near, far))
