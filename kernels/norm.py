"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Definition: ``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, reduced in fp32.

    Args:
        x: ``[..., n]``.
        weight: ``[n]``.
        eps: added to the mean square.

    Returns:
        ``[..., n]`` in the dtype of ``x``. The normalised value is rounded to that dtype before it meets the
        weight, as transformers does; bf16 results differ otherwise.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference`, in one fused call where that gives the same rounding (fp32)."""
    if x.dtype is torch.float32:
        return torch.rms_norm(x, (x.shape[-1],), weight, eps)
    return rms_norm_reference(x, weight, eps)
