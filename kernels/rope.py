"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of GPT-NeoX."""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, inverse_frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of the given positions, always in fp32.

    The product is taken in fp32, not fp64, because the models were trained with fp32 angles: at position
    262,143 the two differ by 1.8e-2 in the cosine.

    Args:
        positions: ``[t]`` int64.
        inverse_frequencies: ``[d / 2]`` fp32.
        scale: factor on both tables (YaRN's attention factor), else 1.

    Returns:
        ``(cos, sin)``, each ``[t, 1, d / 2]`` fp32; the middle dimension broadcasts over heads.
    """
    phase = positions.to(torch.float32)[:, None, None] * inverse_frequencies
    return phase.cos() * scale, phase.sin() * scale


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Definition: rotate each pair ``(x[i], x[i + d/2])`` by its angle.

    Args:
        x: ``[t, heads, d]``.
        cos: ``[t, 1, d / 2]``, in the dtype of ``x``.
        sin: ``[t, 1, d / 2]``, in the dtype of ``x``.

    Returns:
        ``[t, heads, d]``, a new tensor.
    """
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotate_reference`, in place: the cache is then written from the projection itself, without a copy.

    Args:
        x: ``[t, heads, d]``.
        cos: ``[t, 1, d]``, in the dtype of ``x``, from `whole`.
        sin: ``[t, 1, d]``, likewise.
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(swapped, sin)


def whole(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tables of `angles` for both halves of a head, as `rotate_` takes them: a few calls a step, not a layer.

    Returns:
        ``(cos, sin)``, each ``[t, 1, d]``; the first half of the sine is negative.
    """
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)
