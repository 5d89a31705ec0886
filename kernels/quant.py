"""Matrices of 8 and 4 bits, and ``y = x @ W.T`` with them. The weights are quantised, activations keep their dtype.

A decode step is bound by the bytes of the weights, so a GPU reads them as they are stored and widens them in
registers. Three forms:

* ``int8``: groups of 32 along a row share a scale, ``w = q * scale``; GGUF's Q8_0.
* ``int4``: groups of 32 share a scale and a minimum, ``w = q * scale + minimum``; GGUF's Q4_1, and Q4_0 with
  ``minimum = -8 * scale``.
* ``fp8``: e4m3 with one scale for each row.

The forms of the CPU are in `agentkit.kernels.compact`: they need another layout.
"""

# pyright: basic
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agentkit.kernels.cache import FP8_LIMIT
from agentkit.kernels.jit import jit, tl, triton
from agentkit.kernels.plan import architecture, processors

GROUP = 32
#: More rows than this are bound by the products, not by the bytes: they take a matrix that was widened before.
MOST_ROWS = 64
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Kind = Literal["int8", "int4", "fp8"]
BlockKind = Literal["Q8_0", "Q4_0", "Q4_1"]


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix ``[n, k]``; ``k`` is a multiple of 32.

    Attributes:
        kind: which form, see the top of the file.
        values: int8 ``[n, k]``; or uint8 ``[n, k / 2]``, where byte ``j`` of a group's 16 holds element ``j`` in its
            low half and element ``j + 16`` in its high half, as GGUF does; or float8_e4m3fn ``[n, k]``.
        scale: ``[n, k / 32]``, fp16 as GGUF has it, bf16 or fp32; for fp8 ``[n]`` fp32.
        minimum: like ``scale`` for int4, otherwise None.
    """

    kind: Kind
    values: Tensor
    scale: Tensor
    minimum: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, k)``: outputs and inputs."""
        return self.values.shape[0], self.values.shape[1] * (2 if self.kind == "int4" else 1)

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return sum(x.numel() * x.element_size() for x in (self.values, self.scale, self.minimum) if x is not None)

    def to(self, device: torch.device) -> Quantised:
        """The same matrix on a device."""
        minimum = self.minimum.to(device) if self.minimum is not None else None
        return Quantised(self.kind, self.values.to(device), self.scale.to(device), minimum)


def quantize_int8(weight: Tensor) -> Quantised:
    """Quantise a dense matrix to int8. No weight moves by more than half of its group's scale.

    Args:
        weight: ``[n, k]`` of any float dtype. The scale is the group's largest magnitude over 127, rounded up to fp16.

    Raises:
        ValueError: the shape has no groups, or a value is not finite or too large for a scale in fp16.
    """
    groups = _groups(weight)
    scale = _up(groups.abs().amax(-1) / 127)
    _check_range(scale)
    q = (groups / scale.float().unsqueeze(-1)).round()
    return Quantised("int8", q.to(torch.int8).view(weight.shape), scale)


def quantize_int4(weight: Tensor) -> Quantised:
    """Quantise a dense matrix to int4: rounding to nearest, with a scale and a minimum searched for each group.

    The largest weights of a group lie far out, and a scale that spans them all is wide for the others. So the range of
    the group and two narrower ones are tried; each gives codes, to these codes the scale and minimum are fitted by
    least squares, and the pair with the smallest squared error is kept and fitted once more. That is the search of
    ggml's ``make_qkx2_quants`` (Kawrakow, llama.cpp, ``ggml-quants.c``), with fewer ranges and unweighted: more of them
    leave a few percent less of the squared error, but no smaller divergence (`bench/accuracy.py`). About four fifths of
    the squared error of the plain range are left, which is one of the candidates: no group becomes worse.

    Args:
        weight: ``[n, k]`` of any float dtype. Scales and minima are rounded to fp16 before their error is measured.

    Raises:
        ValueError: the shape has no groups, or a value is not finite or too large for fp16.
    """
    groups = _groups(weight).flatten(0, 1)
    found = [_search(piece) for piece in groups.split(_SEARCHED)]
    q, scale, minimum = (torch.cat(column) for column in zip(*found, strict=True))
    n = weight.shape[0]
    return from_codes(q.view(weight.shape), scale.view(n, -1), minimum.view(n, -1))


#: Groups searched at once: what is computed with them stays in a CPU's cache.
_SEARCHED = 8192
#: Levels that the range of a group is divided into; its 16 codes span 15 of them.
_LEVELS = (15.0, 15.5, 16.0)


def _search(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``[g, 32]``, scales and minima fp16 ``[g, 1]`` of fp32 groups ``[g, 32]``."""
    low = groups.amin(-1, keepdim=True)
    minimum = -_up(-low)
    scale = _up((groups.amax(-1, keepdim=True) - minimum.float()) / 15)
    _check_range(scale)
    _check_range(minimum)
    q, error = _rounded(groups, scale, minimum)
    inverse = 1 / (groups.amax(-1, keepdim=True) - low).clamp_min(torch.finfo(torch.float32).tiny)
    for levels in (*_LEVELS, None):
        tried = q if levels is None else ((groups - low) * (levels * inverse)).round_().clamp_(0, 15)
        a, b = _fitted(groups, tried)
        codes, sum_of_squares = _rounded(groups, a, b)
        better = sum_of_squares < error  # not so where a number is not finite
        q, error = torch.where(better, codes, q), torch.where(better, sum_of_squares, error)
        scale, minimum = torch.where(better, a, scale), torch.where(better, b, minimum)
    return q.to(torch.uint8), scale, minimum


def _rounded(groups: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, fp32, and the sum of squares that they leave of each group."""
    wide, least = scale.float(), minimum.float()
    q = ((groups - least) / wide).round_().clamp_(0, 15)
    return q, torch.addcmul(least, q, wide).sub_(groups).square_().sum(-1, keepdim=True)


def _fitted(groups: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum, fp16, with which codes come closest to their groups: the line of least squares."""
    n, of_codes, of_groups = groups.shape[-1], q.sum(-1, keepdim=True), groups.sum(-1, keepdim=True)
    spread = n * (q * q).sum(-1, keepdim=True) - of_codes * of_codes
    scale = (n * (q * groups).sum(-1, keepdim=True) - of_codes * of_groups) / spread
    return scale.to(torch.float16), ((of_groups - scale * of_codes) / n).to(torch.float16)


def quantize_fp8(weight: Tensor) -> Quantised:
    """Quantise a dense matrix to e4m3. No weight moves by more than a sixteenth of itself, or ``scale / 1024``.

    Args:
        weight: ``[n, k]`` of any float dtype. The scale is the row's largest magnitude over 448.

    Raises:
        ValueError: the shape has no groups, or a value is not finite.
    """
    rows = _groups(weight).flatten(1)
    scale = rows.abs().amax(-1) / FP8_LIMIT
    _check_range(scale)
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)  # of a row of nothing
    q = (rows / scale.unsqueeze(-1)).clamp(-FP8_LIMIT, FP8_LIMIT)
    return Quantised("fp8", q.to(torch.float8_e4m3fn), scale)


def from_codes(q: Tensor, scale: Tensor, minimum: Tensor) -> Quantised:
    """A matrix of 4-bit codes, ``w = q * scale + minimum``.

    Args:
        q: ``[n, k]`` uint8 of 0 to 15.
        scale: ``[n, k / 32]``, fp16, bf16 or fp32.
        minimum: like ``scale``.
    """
    low, high = q.view(q.shape[0], -1, GROUP).chunk(2, -1)
    return Quantised("int4", (low | high << 4).flatten(1), scale, minimum)


def codes(matrix: Quantised) -> Tensor:
    """The codes of an int4 matrix, ``[n, k]`` uint8 of 0 to 15."""
    n, k = matrix.shape
    packed = matrix.values.view(n, -1, GROUP // 2)
    return torch.cat([packed & 0xF, packed >> 4], -1).view(n, k)


def from_blocks(kind: BlockKind, data: Tensor) -> Quantised:
    """A matrix of GGUF's blocks, to the bit: the scale and minimum of a block lie before its values, both fp16.

    Args:
        kind: ggml's name of the type.
        data: ``[n, bytes of a row]`` uint8; a row is a whole number of blocks.

    Raises:
        ValueError: bytes that are no blocks of this kind; it names the argument.
    """
    header, size = {"Q8_0": (2, 34), "Q4_0": (2, 18), "Q4_1": (4, 20)}[kind]
    if data.ndim != 2 or data.dtype is not torch.uint8 or data.shape[1] % size or not data.numel():
        raise ValueError(f"data: {data.dtype} {tuple(data.shape)}, expected uint8 rows of {size} bytes to a block")
    blocks = data.reshape(data.shape[0], -1, size)
    head = blocks[..., :header].contiguous().view(torch.float16)
    values, scale = blocks[..., header:].flatten(1), head[..., 0].contiguous()
    if kind == "Q8_0":
        return Quantised("int8", values.view(torch.int8), scale)
    return Quantised("int4", values, scale, head[..., 1].contiguous() if kind == "Q4_1" else -8 * scale)


def _groups(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.numel() or weight.shape[1] % GROUP:
        raise ValueError(f"weight: {tuple(weight.shape)}, expected [n, k] with k a multiple of {GROUP}")
    return weight.float().view(weight.shape[0], -1, GROUP)


def _up(x: Tensor) -> Tensor:
    """The numbers in fp16, rounded to nearest after a nudge that outweighs the rounding: never less than they were."""
    return (x + x.abs() * 2**-10 + 2**-24).to(torch.float16)


def _check_range(numbers: Tensor) -> None:
    if not bool(numbers.isfinite().all()):
        raise ValueError("weight: a value is not finite, or too large for a scale in fp16")


def dequantize_reference(matrix: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """Definition: the matrix ``[n, k]``, computed in fp32 (fp64 for fp64) and rounded to ``dtype`` once."""
    n, k = matrix.shape
    wide = torch.promote_types(dtype, torch.float32)
    values, scale = matrix.values, matrix.scale.to(wide).unsqueeze(-1)
    if matrix.kind == "fp8":
        return (values.to(wide) * scale).to(dtype)
    if matrix.minimum is None:
        return (values.to(wide).view(n, -1, GROUP) * scale).view(n, k).to(dtype)
    q = codes(matrix).view(n, -1, GROUP).to(wide)
    return (q * scale + matrix.minimum.to(wide).unsqueeze(-1)).view(n, k).to(dtype)


def quant_linear_reference(x: Tensor, matrix: Quantised, bias: Tensor | None = None) -> Tensor:
    """Definition: ``x @ W.T + b`` in fp32, or fp64 where ``x`` is.

    Args:
        x: ``[t, k]``.
        matrix: ``[n, k]``.
        bias: ``[n]``.

    Returns:
        ``[t, n]`` fp32 or fp64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), dequantize_reference(matrix, wide), None if bias is None else bias.to(wide))


def quant_linear(x: Tensor, matrix: Quantised, bias: Tensor | None = None) -> Tensor:
    """`quant_linear_reference` in the dtype of ``x``.

    On a GPU up to 64 rows are multiplied with the quantised values, and a row's result does not depend on which rows
    are beside it; more rows take torch's product with the widened matrix, as does the CPU at any number.

    Args:
        x: ``[t, k]``, fp32, fp16 or bf16.
        matrix: ``[n, k]`` on the same device.
        bias: ``[n]`` in the dtype of ``x``.

    Returns:
        ``[t, n]`` in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or e4m3 on a GPU that has none; it names the argument.
    """
    if x.device.type == "cuda" and x.shape[0] <= MOST_ROWS:
        return launch_quant_linear(x, matrix, bias)
    _check(x, matrix, bias)
    return F.linear(x, dequantize(matrix, x.dtype), bias)


def dequantize(matrix: Quantised, dtype: torch.dtype) -> Tensor:
    """`dequantize_reference`: a kernel on a GPU.

    Args:
        matrix: ``[n, k]``.
        dtype: fp32, fp16 or bf16.

    Returns:
        ``[n, k]`` in ``dtype``.

    Raises:
        ValueError: tensors that do not make up a matrix, or a dtype that is not one of these; it names the argument.
    """
    if matrix.values.device.type == "cuda":
        return launch_dequantize(matrix, dtype)
    _check_matrix(matrix)
    _check_dtype("dtype", dtype)
    return dequantize_reference(matrix, dtype)


@dataclass(frozen=True, slots=True)
class Config:
    """How a tile is compiled: outputs and inputs in it, warps of a program, tiles on their way at once."""

    outputs: int
    inputs: int
    warps: int
    stages: int


def configure(arch: str, kind: Kind, dtype: torch.dtype, tile: int) -> Config:
    """The configuration of a tile on an architecture.

    Chosen by what the compiler makes of it (tests/kernels/budget.json): no spills, weights copied to shared memory 16
    bytes at a time behind the products, room for two programs on a processor. There is no tile of 64 rows: its product
    would be one of a warp group, for which widened weights go through shared memory and 16 barriers a step, and in two
    warps it spills. Inputs and outputs are those of the kind for any tile, and so are the `splits`: the order in which
    a row's products are summed does not depend on how many rows there are.

    Args:
        arch: ``sm_80`` … ``sm_120`` or an AMD ``gfx`` name.
        kind: of the matrix.
        dtype: of the activations.
        tile: rows of the tile, 16 or 32.
    """
    small = arch in ("sm_86", "sm_87", "sm_89", "sm_120", "sm_121")  # 100 KiB of shared memory for all programs
    if dtype is torch.float32:  # products without tensor cores
        return Config(32, {"int8": 64, "int4": 128, "fp8": 32}[kind], 4, 2)
    return Config(128, 128 if kind == "int4" else 64, 4, 3 if small and tile == 32 else 4)


@cache
def splits(n: int, k: int, processors: int, config: Config) -> int:
    """Into how many parts the inputs are cut, so that all processors have work.

    Two programs to a processor keep enough bytes on their way; what a program costs beside its blocks (filling the
    pipeline, a part to write and sum up) is taken for three blocks. The fewest parts of the best are chosen.
    """
    tiles, blocks = -(-n // config.outputs), -(-k // config.inputs)
    return min(range(1, blocks + 1), key=lambda s: -(-tiles * s // (2 * processors)) * (-(-blocks // s) + 3))


def launch_quant_linear(x: Tensor, matrix: Quantised, bias: Tensor | None = None, parts: int | None = None) -> Tensor:
    """Launch the kernels of `quant_linear`.

    Args:
        x: ``[t, k]``, at most 64 rows.
        matrix: ``[n, k]``.
        bias: ``[n]``.
        parts: into how many parts the inputs are cut; `splits` if not given.

    Raises:
        ValueError: what `quant_linear` refuses, and more rows.
    """
    _check(x, matrix, bias)
    (t, k), n = x.shape, matrix.shape[0]
    if t > MOST_ROWS:
        raise ValueError(f"x: {t} rows, the kernel is for {MOST_ROWS}")
    out = torch.empty(t, n, dtype=x.dtype, device=x.device)
    if t == 0:
        return out
    x = x if x.stride(1) == 1 and x.stride(0) < 1 << 25 else x.contiguous()
    tile = 16 if t <= 16 else 32
    config = configure(architecture(x.device), matrix.kind, x.dtype, tile)
    cuda = x.device.type == "cuda"
    parts = parts or splits(n, k, processors(x.device) if cuda else 132, config)
    each = -(-k // (parts * config.inputs))
    parts = -(-k // (each * config.inputs))  # without those that would have nothing to do
    partial = torch.empty(parts, t, n, dtype=torch.float32, device=x.device) if parts > 1 else out
    _linear[(-(-t // tile), -(-n // config.outputs), parts)](
        x, _words(matrix), matrix.scale, matrix.minimum if matrix.minimum is not None else matrix.scale,
        bias if bias is not None else out, partial, t, n, k // GROUP, x.stride(0), each,
        KIND=matrix.kind, M=tile, N=config.outputs, G=config.inputs // GROUP, EVEN=k % config.inputs == 0,
        BIAS=bias is not None and parts == 1, PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if parts > 1:
        _sum_parts[(-(-n // _SUMMED), t)](
            partial, bias if bias is not None else out, out, n, t * n, parts,
            BLOCK=_SUMMED, BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
    return out


#: Outputs that a program sums the parts of.
_SUMMED = 256


def launch_dequantize(matrix: Quantised, dtype: torch.dtype) -> Tensor:
    """Launch the kernel of `dequantize`."""
    _check_matrix(matrix)
    _check_dtype("dtype", dtype)
    n, k = matrix.shape
    out = torch.empty(n, k, dtype=dtype, device=matrix.values.device)
    minimum = matrix.minimum if matrix.minimum is not None else matrix.scale
    grid = (n, triton.cdiv(k, _WIDENED))
    _dequantize[grid](
        matrix.values, matrix.scale, minimum, out, k // GROUP, KIND=matrix.kind, BLOCK=_WIDENED, num_warps=4
    )
    return out


#: Weights of a row that a program of `launch_dequantize` widens.
_WIDENED = 1024


def _words(matrix: Quantised) -> Tensor:
    """Integers are read four or eight to a word: then a shift and one logical operation make a float of each."""
    return matrix.values if matrix.kind == "fp8" else matrix.values.view(torch.int32)


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{name}: {dtype}, there are kernels for float32, float16 and bfloat16")


def _check_matrix(matrix: Quantised) -> None:
    """Refuse what no kernel is written for, before a launch."""
    stored = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
    if matrix.kind not in stored:
        raise ValueError(f"matrix: the kind {matrix.kind!r} is none of {', '.join(stored)}")
    if matrix.values.ndim != 2 or matrix.values.dtype is not stored[matrix.kind]:
        raise ValueError(f"matrix: values {matrix.values.dtype} {tuple(matrix.values.shape)} of {matrix.kind}")
    n, k = matrix.shape
    if not n or not k or k % GROUP:
        raise ValueError(f"matrix: {n} × {k}, expected inputs to be a multiple of {GROUP}")
    if k >= 1 << 24:
        raise ValueError(f"matrix: rows of {k} inputs, a tile of them would span 2**31 bytes")
    shape = (n,) if matrix.kind == "fp8" else (n, k // GROUP)
    dtypes = (torch.float32,) if matrix.kind == "fp8" else FLOATS
    if matrix.scale.shape != shape or matrix.scale.dtype not in dtypes:
        raise ValueError(f"matrix: scale {matrix.scale.dtype} {tuple(matrix.scale.shape)}, expected {shape}")
    if (matrix.minimum is not None) != (matrix.kind == "int4"):
        raise ValueError(f"matrix: {matrix.kind} {'with a' if matrix.minimum is not None else 'without a'} minimum")
    tensors = [x for x in (matrix.values, matrix.scale, matrix.minimum) if x is not None]
    if matrix.minimum is not None and (matrix.minimum.shape, matrix.minimum.dtype) != (shape, matrix.scale.dtype):
        raise ValueError(f"matrix: minimum {matrix.minimum.dtype} {tuple(matrix.minimum.shape)} is not like scale")
    if any(x.device != matrix.values.device or not x.is_contiguous() for x in tensors):
        raise ValueError("matrix: values, scale and minimum must be contiguous and on one device")
    if matrix.kind != "fp8" and matrix.values.storage_offset() % 4:
        raise ValueError(f"matrix: values begin {matrix.values.storage_offset()} bytes into their storage, no word")
    arch = architecture(matrix.values.device)
    if matrix.kind == "fp8" and arch in ("sm_80", "sm_86", "sm_87"):
        raise ValueError(f"matrix: float8_e4m3fn needs compute capability 8.9, this is {arch}")


def _check(x: Tensor, matrix: Quantised, bias: Tensor | None) -> None:
    _check_matrix(matrix)
    n, k = matrix.shape
    _check_dtype("x", x.dtype)
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x: {tuple(x.shape)} does not fit a matrix of {n} × {k}")
    if x.device != matrix.values.device:
        raise ValueError(f"x: on {x.device}, the matrix is on {matrix.values.device}")
    if bias is not None and (bias.shape != (n,) or bias.dtype is not x.dtype or not bias.is_contiguous()):
        raise ValueError(f"bias: expected {n} consecutive values of {x.dtype}, got {bias.dtype} {tuple(bias.shape)}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias: on {bias.device}, x is on {x.device}")


@jit
def _quarters(x):
    """``[M, 4w]`` as four tiles ``[M, w]`` of every fourth column: the inputs that bytes of words stand for."""
    M: tl.constexpr = x.shape[0]
    WORDS: tl.constexpr = x.shape[1] // 4
    even, odd = tl.split(tl.reshape(x, [M, WORDS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@jit
def _add(acc, x, words, scale, least, MASK: tl.constexpr, POWER: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + x @ w.T`` with the weights whose bits are those of ``MASK``.

    Put into the fraction of a float that is a power of two, they add themselves to it, which takes no conversion. The
    power, times the scale, has been taken from ``least``, and the sum is rounded once, as if there had been none.
    """
    q = (words & MASK | POWER).to(tl.float32, bitcast=True)
    return tl.dot(x, tl.trans((q * scale + least).to(x.dtype)), acc, input_precision=PRECISION)


@jit
def _spread(x, WORDS: tl.constexpr):
    """``[N, G]``, a number for each group, as ``[N, G * WORDS]``: one for each word."""
    N: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, :, None], [N, G, WORDS]), [N, G * WORDS])


@jit
def _linear(
    x, weight, scale, minimum, bias, out, t, n, groups, x_row, each,
    KIND: tl.constexpr, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``N`` outputs of ``M`` rows over one part of the inputs, ``each`` tiles.

    Args:
        x: ``[t, 32 * groups]`` with stride ``x_row``.
        weight: ``[n, groups, 4]`` words of int4, ``[n, groups, 8]`` words of int8 or ``[n, 32 * groups]`` e4m3.
        scale: ``[n, groups]``; for fp8 ``[n]``.
        minimum: like ``scale``, read for int4 only.
        bias: ``[n]``, read where ``BIAS``.
        out: ``[t, n]``, or where there are several parts ``[parts, t, n]`` fp32.
        G: groups in a tile; ``EVEN`` says that all tiles are whole.
    """
    # What a group is loaded as.
    UNITS: tl.constexpr = 4 if KIND == "int4" else (8 if KIND == "int8" else 32)  # pyright: ignore[reportAssignmentType]
    above = tl.program_id(0) * M  # the axis that runs fastest: programs side by side read the same weights
    first = tl.program_id(1) * N
    part = tl.program_id(2)
    lo = part * each
    hi = tl.minimum(lo + each, tl.cdiv(groups, G))
    m = above + tl.arange(0, M)
    live = (m < t)[:, None]
    row = tl.minimum(tl.arange(0, N), n - 1 - first)  # beyond the matrix its last row again, which is not stored
    weight += first.to(tl.int64) * (groups * UNITS)
    weight += row[:, None] * (groups * UNITS) + tl.arange(0, G * UNITS)[None, :]
    if KIND != "fp8":
        scale += first.to(tl.int64) * groups
        minimum += first.to(tl.int64) * groups
        of_group = row[:, None] * groups + tl.arange(0, G)[None, :]
    if KIND == "int4":  # low halves are the first 16 inputs of a group
        i = tl.arange(0, G * 16)
        i = i // 16 * 32 + i % 16
    else:
        i = tl.arange(0, G * 32)
    x += m[:, None] * x_row + i[None, :]
    acc = tl.full([M, N], 0.0, tl.float32)
    for step in tl.range(lo, hi):
        g = step * G
        if EVEN:
            words = tl.load(weight + g * UNITS)
            a = tl.load(x + g * 32, mask=live, other=0.0)
            if KIND == "int4":
                b = tl.load(x + g * 32 + 16, mask=live, other=0.0)
                least = tl.load(minimum + g + of_group).to(tl.float32)
            if KIND != "fp8":
                d = tl.load(scale + g + of_group).to(tl.float32)
        else:
            inside = tl.arange(0, G * UNITS)[None, :] < (groups - g) * UNITS
            words = tl.load(weight + g * UNITS, mask=inside, other=0.0)
            seen = live & (i[None, :] < (groups - g) * 32)
            a = tl.load(x + g * 32, mask=seen, other=0.0)
            known = tl.arange(0, G)[None, :] < groups - g
            if KIND == "int4":
                b = tl.load(x + g * 32 + 16, mask=seen, other=0.0)
                least = tl.load(minimum + g + of_group, mask=known, other=0.0).to(tl.float32)
            if KIND != "fp8":
                d = tl.load(scale + g + of_group, mask=known, other=0.0).to(tl.float32)
        if KIND == "fp8":  # every number of e4m3 is one of fp16 too, and there is an instruction for that only
            acc = tl.dot(a, tl.trans(words.to(tl.float16).to(tl.float32).to(a.dtype)), acc, input_precision=PRECISION)
        elif KIND == "int8":
            a0, a1, a2, a3 = _quarters(a)
            words = words ^ -0x7F7F7F80  # 0x80808080: makes q + 128 of each byte, which has no sign
            z = _spread(-(256.0 + 128.0) * d, UNITS)
            d = _spread(d, UNITS)
            acc = _add(acc, a0, words << 15, d, z, 0x7F8000, 0x43800000, PRECISION)
            acc = _add(acc, a1, words << 7, d, z, 0x7F8000, 0x43800000, PRECISION)
            acc = _add(acc, a2, words >> 1, d, z, 0x7F8000, 0x43800000, PRECISION)
            acc = _add(acc, a3, words >> 9, d, z, 0x7F8000, 0x43800000, PRECISION)
        else:
            a0, a1, a2, a3 = _quarters(a)
            b0, b1, b2, b3 = _quarters(b)
            y = _spread(least - 128.0 * d, UNITS)
            z = _spread(least - 2048.0 * d, UNITS)
            d = _spread(d, UNITS)
            acc = _add(acc, a0, words << 12, d, z, 0xF000, 0x45000000, PRECISION)
            acc = _add(acc, b0, words << 12, d, y, 0xF0000, 0x43000000, PRECISION)
            acc = _add(acc, a1, words << 4, d, z, 0xF000, 0x45000000, PRECISION)
            acc = _add(acc, b1, words, d, z, 0xF000, 0x45000000, PRECISION)
            acc = _add(acc, a2, words, d, y, 0xF0000, 0x43000000, PRECISION)
            acc = _add(acc, b2, words >> 4, d, y, 0xF0000, 0x43000000, PRECISION)
            acc = _add(acc, a3, words >> 12, d, z, 0xF000, 0x45000000, PRECISION)
            acc = _add(acc, b3, words >> 12, d, y, 0xF0000, 0x43000000, PRECISION)
    if KIND == "fp8":
        acc *= tl.load(scale + first + row)[None, :]
    if BIAS:
        acc += tl.load(bias + first + row).to(tl.float32)[None, :]
    column = first + tl.arange(0, N)
    to = out + (part * t + m).to(tl.int64)[:, None] * n + column[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=live & (column < n)[None, :])


@jit
def _sum_parts(partial, bias, out, n, stride, parts, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    """Outputs of one row, their parts summed in order; parts are ``stride`` numbers apart."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    row = tl.program_id(1).to(tl.int64) * n
    total = tl.full([BLOCK], 0.0, tl.float32)
    if BIAS:
        total += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    partial += row
    for _ in tl.range(0, parts):
        total += tl.load(partial + at, mask=inside, other=0.0)
        partial += stride
    tl.store(out + row + at, total.to(out.dtype.element_ty), mask=inside)


@jit
def _dequantize(values, scale, minimum, out, groups, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A stretch of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < groups * 32
    if KIND == "int4":
        values += row * groups * 16
        byte = tl.load(values + i // 32 * 16 + i % 16, mask=inside, other=0)
        q = (byte >> (i % 32 // 16 * 4).to(tl.uint8) & 15).to(tl.float32)
    else:
        q = tl.load(values + row * groups * 32 + i, mask=inside, other=0.0).to(tl.float32)
    if KIND == "fp8":
        w = q * tl.load(scale + row)
    else:
        w = q * tl.load(scale + row * groups + i // 32, mask=inside, other=0.0).to(tl.float32)
    if KIND == "int4":
        w += tl.load(minimum + row * groups + i // 32, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * groups * 32 + i, w.to(out.dtype.element_ty), mask=inside)
