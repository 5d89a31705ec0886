"""Linear maps ``y = x @ W.T`` on the CPU that keep their weights in 4 or 8 bits only, whatever the number of rows.

Few rows are bound by the bytes of the weights and take torch's products with narrow weights, which round activations
to bf16. These cost as much again for every further row. Many rows therefore widen the matrix, a stretch of outputs at a
time that stays in the cache, and multiply that in the dtype of the activations: on a processor with bf16 products that
takes half of the time at 512 rows, and no wide copy is kept.

* ``Int4``: groups of 32 with a scale and a minimum, 5 bits a weight (`agentkit.kernels.linear.pack_int4`).
* ``Int8``: one scale for each row, as torch's product has it. Groups of 32, the form of a GPU, would be two products of
  4 bits, which take longer than a matrix in fp16 at any number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from agentkit.kernels.linear import GROUP, Int4, int4_linear

#: Up to how many rows the narrow products are faster than widening.
INT4_ROWS, INT8_ROWS = 64, 16
#: Outputs that are widened at once.
_WIDENED = 512


@dataclass(frozen=True, slots=True)
class Int8:
    """A matrix ``w = q * scale``.

    Attributes:
        values: ``[n, k]`` int8.
        scale: ``[n]`` bf16.
    """

    values: Tensor
    scale: Tensor


def quantize_rows(weight: Tensor) -> Int8:
    """Quantise a dense matrix to 8 bits. No weight moves by more than half of its row's scale.

    Args:
        weight: ``[n, k]`` of any float dtype. The scale is the row's largest magnitude over 127, rounded up to bf16.

    Raises:
        ValueError: not a matrix, or a value is not finite.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"weight: {tuple(weight.shape)}, expected [n, k]")
    largest = weight.float().abs().amax(1)
    if not bool(largest.isfinite().all()):
        raise ValueError("weight: a value is not finite")
    tiny = torch.finfo(torch.bfloat16).tiny  # of a row of nothing
    scale = (largest / 127 * (1 + 2**-8)).clamp_min(tiny).to(torch.bfloat16)  # the nudge outweighs the rounding
    return Int8((weight.float() / scale.float().unsqueeze(1)).round().to(torch.int8), scale)


def int8_linear_reference(x: Tensor, weight: Int8) -> Tensor:
    """Definition, in fp32, or fp64 where ``x`` is: ``x @ (q * scale).T``.

    Args:
        x: ``[t, k]``.
        weight: ``[n, k]``.

    Returns:
        ``[t, n]`` fp32 or fp64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ (weight.values.to(wide) * weight.scale.to(wide).unsqueeze(1)).T


def compact_linear(x: Tensor, weight: Int4 | Int8, bias: Tensor | None = None) -> Tensor:
    """`int8_linear_reference`, or `agentkit.kernels.linear.int4_linear_reference`, in the dtype of ``x``.

    Activations are rounded to bf16 in steps of few rows.

    Args:
        x: ``[t, k]``, fp32 or bf16.
        weight: ``[n, k]``.
        bias: ``[n]`` in the dtype of ``x``.

    Returns:
        ``[t, n]`` in the dtype of ``x``.
    """
    if isinstance(weight, Int8):
        y = _narrow_int8(x, weight) if x.shape[0] <= INT8_ROWS else _wide_int8(x, weight)
    else:
        block = outputs_together()
        known = block and weight.rows % block == 0
        y = int4_linear(x, weight) if x.shape[0] <= INT4_ROWS or not known else _wide_int4(x, weight)
    y = y.to(x.dtype)
    return y if bias is None else y + bias


def _narrow_int8(x: Tensor, weight: Int8) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16), weight.values, weight.scale)


def _wide_int8(x: Tensor, weight: Int8) -> Tensor:
    """Every 8-bit integer is a bf16 number, so it is the sums that are scaled."""
    out = x.new_empty(x.shape[0], weight.values.shape[0])
    for first in range(0, out.shape[1], _WIDENED):
        part = slice(first, first + _WIDENED)
        torch.mm(x, weight.values[part].to(x.dtype).T, out=out[:, part])
    return out.mul_(weight.scale.to(x.dtype))


def _wide_int4(x: Tensor, weight: Int4) -> Tensor:
    out = x.new_empty(x.shape[0], weight.rows)
    for first in range(0, weight.rows, _WIDENED):
        part = slice(first, min(first + _WIDENED, weight.rows))
        torch.mm(x, _widened(weight, part, x.dtype), out=out[:, part])
    return out


def _widened(weight: Int4, part: slice, dtype: torch.dtype) -> Tensor:
    """Outputs ``part`` of a matrix, ``[k, part]``, computed in fp32 and rounded once."""
    block, k = outputs_together(), weight.columns
    packed = weight.nibbles.view(-1, k, block // 2)[part.start // block : part.stop // block].transpose(0, 1)
    q = torch.empty(k, packed.shape[1], 2, block // 2)
    q[:, :, 0].copy_(packed & 0xF)
    q[:, :, 1].copy_(packed >> 4)
    scale, zero = weight.scales[:, part].float().unsqueeze(1).unbind(-1)
    matrix = torch.addcmul(zero - 8 * scale, q.view(k // GROUP, GROUP, -1), scale)
    return matrix.view(k, -1).to(dtype)


@cache
def outputs_together() -> int:
    """How many outputs a block of torch's layout of nibbles holds; 0 if the layout is none that is known here.

    A block is ``[k, outputs / 2]`` bytes, with the first half of its outputs in the low halves of the bytes and the
    second in the high ones. Where vectors have 512 bits it holds 64 outputs, where they have 256, 32. This is written
    down nowhere, so it is not assumed: matrices whose nibbles tell their outputs are packed and looked at.
    """
    output = torch.arange(64, dtype=torch.int32).unsqueeze(1).expand(-1, GROUP)
    for block in (64, 32):
        order = [_unpacked((output >> shift & 0xF).contiguous(), block) for shift in (0, 4)]
        if torch.equal(order[0] | order[1] << 4, output.to(torch.uint8)):
            return block
    return 0


def _unpacked(q: Tensor, block: int) -> Tensor:
    """Codes ``[64, 32]`` packed by torch and read back as blocks of a size."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1).view(-1, GROUP, block // 2)
    return torch.cat([packed & 0xF, packed >> 4], -1).transpose(1, 2).reshape(q.shape)
