"""Triton's interpreter with the arithmetic of bf16 and fp8 made right.

The interpreter (3.6 to 3.9) keeps bf16 as uint16 and fp8 as uint8 and computes on the raw bits, so a bf16 kernel
returns nonsense without an error; its casts to bf16 truncate, and those to fp8 lose the carry of the rounding.
Inside `exact_floats()`:

* bf16 arithmetic is done in fp32 and rounded to the nearest even, products of tiles are summed in fp32;
* casts to bf16 and fp8 round to the nearest even. What e4m3 cannot hold becomes NaN: some devices saturate (PTX's
  ``cvt.rn.satfinite``), not all do, so a kernel has to clamp;
* what a kernel should not do raises TypeError: arithmetic on fp8, a reduction of bf16 or fp8 (cast to fp32 first).

``tests/kernels/conftest.py`` keeps it on for all tests of this folder; elsewhere write ``with exact_floats(): …``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_BUILDER = interpreter.InterpreterBuilder
_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def _kind(handle: Any) -> Any:
    """The scalar type whose bits the handle holds, or None where numpy knows the type."""
    scalar = handle.dtype.scalar
    if (scalar == tl.bfloat16 and handle.data.dtype == np.uint16) or (scalar in _FP8 and handle.data.dtype == np.uint8):
        return scalar
    return None  # also the result of a comparison, which carries the type of its operands


def _values(handle: Any) -> np.ndarray:
    """What the handle's bits mean, exactly: fp32 for bf16 and fp8."""
    kind = _kind(handle)
    if kind is None:
        return handle.data
    if kind == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    bits = torch.from_numpy(np.array(handle.data, order="C"))
    return bits.view(_FP8[kind]).float().numpy()


def _handle(values: np.ndarray, scalar: Any) -> Any:
    """Round to bf16 or fp8."""
    wide = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    if scalar == tl.bfloat16:
        return interpreter.TensorHandle(wide.bfloat16().view(torch.uint16).numpy(), scalar)
    if scalar == tl.float8e4nv:  # 464 is half way to what would be the next number
        wide = wide.masked_fill(wide.abs() > 464, torch.nan)
    return interpreter.TensorHandle(wide.to(_FP8[scalar]).view(torch.uint8).numpy(), scalar)


def _fp32(handle: Any) -> Any:
    return handle if _kind(handle) is None else interpreter.TensorHandle(_values(handle), tl.float32)


def _arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``binary_op`` or ``unary_op``: the last argument is numpy's function, the ones before are operands."""

    def wrapped(self: Any, *arguments: Any) -> Any:
        *operands, function = arguments
        kinds = {_kind(x) for x in operands} - {None}
        if not kinds:
            return original(self, *arguments)
        if kinds != {tl.bfloat16}:
            raise TypeError("arithmetic on fp8: cast it first")
        result = function(*(_values(x) for x in operands))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return _handle(result, tl.bfloat16)

    return wrapped


def _ternary(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, a: Any, b: Any, c: Any, function: Callable[..., Any]) -> Any:
        if function is np.where or tl.bfloat16 not in {_kind(a), _kind(b), _kind(c)}:
            return original(self, a, b, c, function)  # a selection moves bits, whatever they mean
        return _handle(function(_values(a), _values(b), _values(c)), tl.bfloat16)

    return wrapped


def _fma(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, x: Any, y: Any, z: Any) -> Any:
        if _kind(z) is None:
            return original(self, x, y, z)
        product = _values(x).astype(np.float64) * _values(y).astype(np.float64)
        return _handle(product + _values(z).astype(np.float64), tl.bfloat16)

    return wrapped


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``cast_impl`` and ``create_fp_to_fp``."""

    def wrapped(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        scalar = target.scalar
        if scalar == tl.bfloat16 or scalar in _FP8:
            if _kind(source) == scalar:
                return source
            if rounding and rounding[0] == interpreter._ir.ROUNDING_MODE.RTZ:
                raise NotImplementedError("rounding towards zero")
            return _handle(_values(source), scalar)
        if _kind(source) is None:
            return original(self, source, target, *rounding)
        return interpreter.TensorHandle(_values(source).astype(interpreter._get_np_dtype(scalar)), scalar)

    return wrapped


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, _fp32(a), _fp32(b), *rest)

    return wrapped


def _reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, tensors: Any) -> Any:
        if any(_kind(x.handle) is not None for x in tensors):
            raise TypeError("a reduction or scan of bf16 or fp8: cast to fp32 first")
        return original(self, tensors)

    return wrapped


@contextmanager
def exact_floats() -> Iterator[None]:
    """Right bf16 and fp8 in the interpreter while the context is open."""
    wraps: list[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
        (_BUILDER, "binary_op", _arithmetic),
        (_BUILDER, "unary_op", _arithmetic),
        (_BUILDER, "ternary_op", _ternary),
        (_BUILDER, "create_fma", _fma),
        (_BUILDER, "cast_impl", _cast),
        (_BUILDER, "create_fp_to_fp", _cast),
        (_BUILDER, "create_dot", _dot),
        (interpreter.ReduceScanOpInterface, "check_tensor", _reduction),
    ]
    with ExitStack() as stack, np.errstate(all="ignore"):  # infinities are no accident in a kernel
        for owner, name, wrap in wraps:
            stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name))))
        yield
