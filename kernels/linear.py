"""Weight-only 4-bit linear: ``y = x @ W.T`` with ``W`` kept as nibbles, a scale and a minimum per 32 columns.

A decode step is bound by the bytes of the weights, so the nibbles are multiplied as they are. The form is that of
GGUF's Q4_1 (``w = q * scale + minimum``); Q4_0 is the same with ``minimum = -8 * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
#: Above about this many rows the dense fp32 product is faster: the nibbles' cost grows with the rows, the dense one is
#: bound by reading its eight times as many bytes (`bench/linear.py`).
MAX_ROWS = 16


@dataclass(frozen=True, slots=True)
class Int4:
    """A packed matrix.

    Attributes:
        rows: outputs.
        columns: inputs, a multiple of 32.
        nibbles: torch's CPU layout of the quantised values.
        scales: ``[columns / 32, rows, 2]`` bf16, scale and zero, where ``w = (q - 8) * scale + zero``.
    """

    rows: int
    columns: int
    nibbles: Tensor
    scales: Tensor


def int4_linear_reference(x: Tensor, q: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Definition, in fp32: ``x @ (q * scale + minimum).T``.

    Args:
        x: ``[t, k]``.
        q: ``[n, k]`` uint8, 0 to 15.
        scale: ``[n, k / 32]``.
        minimum: ``[n, k / 32]``.

    Returns:
        ``[t, n]`` fp32.
    """
    weight = q.float() * scale.float().repeat_interleave(GROUP, 1) + minimum.float().repeat_interleave(GROUP, 1)
    return x.float() @ weight.T


def pack_int4(q: Tensor, scale: Tensor, minimum: Tensor) -> Int4:
    """Pack nibbles for `int4_linear` on the CPU.

    Args:
        q: ``[n, k]`` uint8, 0 to 15; ``n`` a multiple of 16, ``k`` of 32.
        scale: ``[n, k / 32]``.
        minimum: ``[n, k / 32]``.

    Raises:
        ValueError: the shape cannot be packed; it names the argument.
    """
    rows, columns = q.shape
    if rows % 16 or columns % GROUP:
        raise ValueError(f"q: {rows} × {columns} cannot be packed: rows must be a multiple of 16, columns of {GROUP}")
    if scale.shape != (rows, columns // GROUP) or minimum.shape != scale.shape:
        raise ValueError(f"scale, minimum: expected {(rows, columns // GROUP)}, got {tuple(scale.shape)}")
    nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
    scale, minimum = scale.float(), minimum.float()
    scales = torch.stack([scale, minimum + 8 * scale], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return Int4(rows, columns, nibbles, scales)


def int4_linear(x: Tensor, weight: Int4) -> Tensor:
    """``x @ W.T`` on the CPU, activations rounded to bf16.

    Args:
        x: ``[t, columns]`` of any float dtype.
        weight: the packed matrix.

    Returns:
        ``[t, rows]`` bf16, the precision of the product.
    """
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), weight.nibbles, GROUP, weight.scales)
