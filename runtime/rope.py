"""Inverse frequencies of the rotary embedding, plain and scaled, in fp32 and in transformers' order of operations.

The order matters: fp32 rounding is part of what a model was trained with, and at a quarter of a million positions a
last-bit difference in a frequency is a visible angle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from agentkit.runtime.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angular step per position of each pair of dimensions.

    Returns:
        ``[head_dim / 2]`` fp32, and the factor on cosine and sine (1 except for YaRN).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    powers = config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / powers, 1.0
    if scaling.kind == "linear":
        return 1.0 / powers / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(1.0 / powers, scaling), 1.0
    return _yarn(powers, scaling, config), scaling.attention_factor


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: long waves are stretched, short ones kept, the band between them interpolated."""
    wavelength = 2 * math.pi / plain
    longest = scaling.original_positions / scaling.low_freq_factor
    shortest = scaling.original_positions / scaling.high_freq_factor
    stretched = torch.where(wavelength > longest, plain / scaling.factor, plain)
    smooth = (scaling.original_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    between = ~(wavelength < shortest) & ~(wavelength > longest)
    return torch.where(between, blended, stretched)


def _yarn(powers: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), section 3.2: a ramp between interpolation and extrapolation."""
    dim = config.head_dim

    def dimension(rotations: float) -> float:
        """The dimension that turns this often within the trained context."""
        turns = scaling.original_positions / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
