"""Linear maps ``y = x @ W.T`` on the CPU, in the form that moves the fewest bytes or wastes the fewest cycles.

A decode step is bound by the bytes of the weights, so 4-bit weights are multiplied as they are; the form is that of
GGUF's Q4_1 (``w = q * scale + minimum``), and Q4_0 is the same with ``minimum = -8 * scale``. More rows take a wider
matrix. Where activations are fp32 it is fp16 multiplied in fp32 by fbgemm, which is faster than an fp32 matrix at any
number of rows; the output head is multiplied so too, because logits are needed in fp32. Where they are bf16, or where
results have to be exact, it is a matrix of their dtype, put into oneDNN's blocked layout once: the plain product
reorders it at every call. `bench/linear.py` prints what each costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
#: Steps vary between one row and hundreds; a layout made for this many is within a few percent of the best for all.
_ROWS_PACKED_FOR = 16


def int4_rows(dtype: torch.dtype) -> int:
    """Up to how many rows nibbles are multiplied rather than a wider matrix.

    Their cost grows with the rows, that of the wider product is bound by reading three (fp16) or four times (bf16) as
    many bytes. torch's kernel for AVX2 needs the advantage of the bytes already for one row. Measured by
    `bench/linear.py` and `bench/decode.py`.

    Args:
        dtype: of the activations.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return 1
    return 8 if dtype is torch.bfloat16 else 4


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
    # Not by way of `torch.ops`, which takes some microseconds longer to call.
    product = torch._weight_int4pack_mm_for_cpu  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    narrow = x if x.dtype is torch.bfloat16 else x.to(torch.bfloat16)
    return product(narrow, weight.nibbles, GROUP, weight.scales)


def pack_dense(weight: Tensor) -> Tensor:
    """A matrix in oneDNN's blocked layout, where torch has oneDNN for it; otherwise as it is.

    Args:
        weight: ``[n, k]``, bf16 or fp32.

    Returns:
        An opaque tensor for `dense_linear`.
    """
    native = weight.dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not native:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_PACKED_FOR)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + b``.

    Args:
        x: ``[t, k]`` in the dtype of the matrix.
        weight: ``[n, k]``, or what `pack_dense` made of it.
        bias: ``[n]``.

    Returns:
        ``[t, n]`` in the same dtype.
    """
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def pack_half(weight: Tensor) -> torch.ScriptObject | None:
    """A matrix as fp16 for `half_linear`; None where this processor or the matrix's range does not allow it.

    Args:
        weight: ``[n, k]`` of any float dtype.
    """
    if weight.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    if not float(weight.abs().max()) <= torch.finfo(torch.float16).max:
        return None
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), None)


def half_linear(x: Tensor, weight: torch.ScriptObject) -> Tensor:
    """``x @ W.T`` with fp16 weights, fp32 activations, products and sums.

    Args:
        x: ``[t, k]`` fp32.
        weight: from `pack_half`.

    Returns:
        ``[t, n]`` fp32.
    """
    return torch.ops.quantized.linear_dynamic_fp16(x, weight)
