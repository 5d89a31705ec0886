"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), alone and after a residual sum."""

# pyright: basic
from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from agentkit.kernels.jit import jit, tl, triton

#: A row lies in the registers of one program: at 16 warps this is 32 values of fp32 a thread.
_WIDEST = 16384


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Definition: ``x / sqrt(mean(x²) + eps) * weight`` over the last dimension, reduced in fp32.

    Args:
        x: ``[..., n]``.
        weight: ``[n]``.
        eps: added to the mean square.

    Returns:
        ``[..., n]`` in the dtype of ``x``. The normalised value is rounded to that dtype before it meets the
        weight, as transformers does; bf16 results differ otherwise. fp64 stays fp64 throughout.
    """
    wide = x if x.dtype is torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Definition: the new residual ``residual + x`` in their dtype, and `rms_norm_reference` of it.

    Args:
        x: ``[..., n]``, what a block adds to the stream.
        residual: ``[..., n]``, the stream.
        weight: ``[n]``.
        eps: added to the mean square.

    Returns:
        ``(residual + x, its norm)``, new tensors.
    """
    total = residual + x
    return total, rms_norm_reference(total, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference`: a kernel on a GPU, on the CPU in fp32 throughout and rounded once.

    Raises:
        ValueError: on a GPU, shapes or dtypes that do not fit; it names the argument.
    """
    if x.device.type == "cuda":
        return launch_rms_norm(x, weight, eps)
    return _few_calls(x, weight, eps).to(x.dtype)


class Residual:
    """The residual stream of a step on a GPU: blocks add to it and read its norm.

    Args:
        x: ``[t, n]``, the embeddings; they are overwritten.
    """

    def __init__(self, x: Tensor) -> None:
        self._stream = x

    def norm(self, weight: Tensor, eps: float) -> Tensor:
        """`rms_norm_reference` of the stream.

        Args:
            weight: from `residual_weight`.
            eps: added to the mean square.

        Returns:
            ``[t, n]`` in the dtype of the embeddings, valid until the next call.
        """
        return launch_rms_norm(self._stream, weight, eps)

    def add_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`norm` after ``x``, ``[t, n]``, was added."""
        return launch_rms_norm(x, weight, eps, self._stream)

    def plus(self, x: Tensor) -> Tensor:
        """The stream and ``x``, ``[t, n]``, a new tensor."""
        return self._stream + x


class MirroredResidual(Residual):
    """`Residual` on the CPU, summed in fp32 and kept beside its negative, ``[t, 2, n]``.

    The mean of such a row is zero, so that its layer norm is its RMS norm. Torch has layer norm as one pass; the RMS
    norm takes seven calls, each of which is longer than the arithmetic on a row.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__(torch.stack([x, -x], 1).float())
        self._flat = self._stream.flatten(1)
        # One row is added from and returned in the same memory each time, by views that are made once. Widened by a
        # copy of its own it is added in half the time: a sum of two dtypes takes a slower way.
        self._added = torch.empty(1, 1, x.shape[1])
        self._widened = self._added[0]
        self._one = torch.empty(1, self._flat.shape[1], dtype=x.dtype)
        self._side = self._one[:, : x.shape[1]]

    def norm(self, weight: Tensor, eps: float) -> Tensor:
        normal = torch.native_layer_norm(self._flat, weight.shape, weight, None, eps)[0]
        if len(normal) != 1:
            return normal[:, : self._side.shape[1]].to(self._side.dtype).contiguous()
        self._one.copy_(normal)
        return self._side

    def add_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if len(x) != 1:
            self._stream.addcmul_(_signs(), x.unsqueeze(1))
        else:
            self._widened.copy_(x)
            self._stream.addcmul_(_signs(), self._added)
        return self.norm(weight, eps)

    def plus(self, x: Tensor) -> Tensor:
        return self._stream[:, 0] + x


def residual(x: Tensor) -> Residual:
    """The stream that begins with embeddings ``[t, n]``, which may be overwritten."""
    return MirroredResidual(x) if x.device.type == "cpu" else Residual(x)


def residual_weight(weight: Tensor) -> Tensor:
    """Weights ``[n]`` of a norm as `residual` takes them: on the CPU ``[2n]`` fp32, for both sides."""
    return torch.cat([weight, weight]).float() if weight.device.type == "cpu" else weight


@cache
def _signs() -> Tensor:
    return torch.tensor([[1.0], [-1.0]])


def _few_calls(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm in fp32. On few rows each call costs microseconds, on many a pass over them: torch's own makes twelve.

    The root of ``mean(x²) + eps`` is the hypotenuse of two sides: the norm over ``sqrt(n)``, and ``sqrt(eps)``.
    """
    wide = x.float()
    root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).mul_(x.shape[-1] ** -0.5).hypot_(_scalar(eps**0.5))
    return (wide * weight).div_(root)


@cache
def _scalar(value: float) -> Tensor:
    """A number as an operand, for operators that take tensors only."""
    return torch.tensor(value)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Launch the kernel: `add_rms_norm_reference`, the sum in place of a residual, or `rms_norm_reference` without one.

    Raises:
        ValueError: shapes or dtypes that do not fit; it names the argument.
    """
    n = x.shape[-1]
    if not 0 < n <= _WIDEST:
        raise ValueError(f"x: rows of {n} values, expected 1 to {_WIDEST}")
    if weight.shape != (n,) or weight.dtype is not x.dtype or not weight.is_contiguous():
        raise ValueError(f"weight: expected {n} consecutive values of {x.dtype}, got {weight.dtype} {weight.shape}")
    rows = x.reshape(-1, n)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        raise ValueError(f"residual: {residual.dtype} {residual.shape} is not like x, {x.dtype} {x.shape}")
    if residual is not None and not residual.is_contiguous():
        raise ValueError(f"residual: strides {residual.stride()}, expected a contiguous tensor, it is changed in place")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    block = triton.next_power_of_2(n)
    _rms_norm[(rows.shape[0],)](
        rows,
        residual if residual is not None else out,
        weight,
        out,
        rows.stride(0),
        eps,
        N=n,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=min(16, max(1, block // 512)),
    )
    return out


@jit
def _rms_norm(x, residual, weight, out, x_row, eps, N: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """One row. ``residual`` and ``out`` are contiguous, rows of ``x`` are ``x_row`` values apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < N
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * N + column, mask=inside, other=0.0).to(tl.float32)
        total = value.to(residual.dtype.element_ty)
        tl.store(residual + row * N + column, total, mask=inside)
        value = total.to(tl.float32)  # the norm of what was stored, so that a later norm of the stream agrees
    scale = tl.rsqrt(tl.sum(value * value, 0) / N + eps)
    normal = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + column, (normal * factor).to(out.dtype.element_ty), mask=inside)
