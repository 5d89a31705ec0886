"""Triton where it is installed (Linux); elsewhere what lets the files beside this one be imported without it.

The torch forms need no Triton. A launch does, and says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any


class _Kernel:
    """A kernel that cannot be launched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __getitem__(self, grid: object) -> Any:
        raise RuntimeError(f"{self.function.__name__} is a Triton kernel: install triton, or use the CPU")


class _Absent:
    """Stands for the module; kernels' bodies and annotations are never evaluated, so almost nothing is asked."""

    jit = _Kernel

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"triton.{name} is needed: install triton, or use the CPU")


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":  # installed, but broken: that must not pass for absent
            raise
        return _Absent()


triton: Any = _load("triton")
jit: Any = triton.jit

if TYPE_CHECKING:  # the types that Triton declares are not those that kernels' bodies and launches have

    class _Anything(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_Anything):
        class constexpr(Any):
            def __init__(self, value: Any) -> None: ...
else:
    tl = _load("triton.language")
