"""The gate of the feed-forward block: SiLU of one half times the other (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""

# pyright: basic
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit.kernels.jit import jit, tl, triton

_LOG2_E = tl.constexpr(1.4426950408889634)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Definition: ``silu(gate) * up``, SiLU rounded to the dtype before the product, as torch does.

    Args:
        gate_up: ``[t, 2n]``, the gate in the first half of a row.

    Returns:
        ``[t, n]`` in the same dtype.
    """
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu_mul_reference`: a kernel on a GPU, without a second intermediate on the CPU.

    Raises:
        ValueError: a row has no two halves; it names the argument.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: rows of {gate_up.shape[-1]} values have no two halves")
    if gate_up.device.type == "cuda":
        return launch_silu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def launch_silu_mul(gate_up: Tensor) -> Tensor:
    """Launch the kernel on ``[t, 2n]`` contiguous rows."""
    t, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(t, n, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(n))
        _silu_mul[(t, triton.cdiv(n, block))](gate_up.contiguous(), out, n, BLOCK=block, num_warps=4)
    return out


@jit
def _silu_mul(gate_up, out, n, BLOCK: tl.constexpr):
    """A stretch of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    gate = tl.load(gate_up + row * 2 * n + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * n + n + column, mask=inside, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp2(-gate * _LOG2_E))
    silu = silu.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * n + column, (silu * up).to(out.dtype.element_ty), mask=inside)
