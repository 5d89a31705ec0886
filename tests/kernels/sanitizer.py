"""What a GPU would not tell: stray accesses, races and undefined lanes of a kernel run in Triton's interpreter.

Inside `sanitized()` every launch raises `SanitizerError` when

* an active lane of a load, store or atomic lies outside the elements of the tensors passed to the kernel. For a
  strided view the gaps are outside: a kernel that gets the keys of a pool may not touch its values through them;
* an address is no multiple of the element's size;
* a masked load has no ``other``: its inactive lanes would be undefined;
* two programs touch the same element, one of them writing, unless both have passed an atomic in between, in the
  order of release and acquire (the "last program to arrive sums up" pattern);
* two lanes of one store write different values to one element.

The programs run in an arbitrary order, always the same. ``tests/kernels/conftest.py`` keeps it on for all tests of
this folder; elsewhere write ``with sanitized(): …``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

_BUILDER = interpreter.InterpreterBuilder
_EXECUTOR = interpreter.GridExecutor
_SEVERAL = -1


class SanitizerError(AssertionError):
    """A kernel did what is undefined on a GPU."""


class _Region:
    """Consecutive bytes that one or more tensors lie in."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.allowed = np.zeros(high - low, np.bool_)
        # Sections (see _Launch) that last stored to, loaded and atomically changed a byte; 0 is none.
        self.stored, self.loaded, self.atomic = (np.zeros(high - low, np.int32) for _ in range(3))

    def allow(self, tensor: Any) -> None:
        size = tensor.element_size()
        elements = np.lib.stride_tricks.as_strided(
            self.allowed[tensor.data_ptr() - self.low :],
            (*tensor.shape, size),
            (*(stride * size for stride in tensor.stride()), 1),
        )
        elements[...] = True


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """As ``np.unique``, without its sorting where there is nothing to sort: most tiles lie in one tensor."""
    return numbers[:1] if (numbers == numbers[0]).all() else np.unique(numbers)


def _tensors(argument: Any) -> Iterator[Any]:
    if isinstance(argument, tuple):
        for x in argument:
            yield from _tensors(x)
    elif hasattr(argument, "base") and not hasattr(argument, "untyped_storage"):
        yield from _tensors(argument.base)  # a descriptor, or a tensor under another dtype
    elif hasattr(argument, "data_ptr") and argument.numel():
        yield argument


def _regions(arguments: list[Any]) -> list[_Region]:
    tensors = sorted((t for a in arguments for t in _tensors(a)), key=lambda t: t.data_ptr())
    spans: list[tuple[int, int, list[Any]]] = []
    for t in tensors:
        low = t.data_ptr()
        last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        high = low + (last + 1) * t.element_size()
        if spans and low <= spans[-1][1]:
            first, end, members = spans.pop()
            spans.append((first, max(end, high), [*members, t]))
        else:
            spans.append((low, high, [t]))
    regions: list[_Region] = []
    for low, high, members in spans:
        region = _Region(low, high)
        for t in members:
            region.allow(t)
        regions.append(region)
    return regions


class _Launch:
    """The accesses of one launch so far.

    A *section* is what a program does between two of its atomics. A section has been released when its program has
    passed an atomic since, and a program acquires with its own atomics.
    """

    def __init__(self, arguments: list[Any], seed: int) -> None:
        self.regions = _regions(arguments)
        self.lows = np.array([r.low for r in self.regions], np.uint64)
        self.seed = seed
        self.order: list[int] | None = None
        self.grid_index: tuple[int, int, int] = (0, 0, 0)
        self.program = 0
        self.epochs: dict[int, int] = {}
        self.sections: dict[tuple[int, int], int] = {(-1, 0): 0}
        self.owners: list[tuple[int, int]] = [(-1, 0)]

    def move_to(self, x: int, y: int, z: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The program that runs in the place of program (x, y, z)."""
        if self.order is None:
            self.order = list(range(grid[0] * grid[1] * grid[2]))
            random.Random(self.seed).shuffle(self.order)
        self.program = self.order[(x * grid[1] + y) * grid[2] + z]
        rest, z = divmod(self.program, grid[2])
        x, y = divmod(rest, grid[1])
        self.grid_index = (x, y, z)
        return self.grid_index

    def locate(self, what: str, pointers: Any, mask: Any) -> list[tuple[_Region, np.ndarray]]:
        """Check where the active lanes point to; ``(region, offsets of the elements' first bytes)``."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = np.broadcast_to(mask.data, pointers.data.shape).reshape(-1).astype(np.bool_)
        addresses = pointers.data.reshape(-1)[active].astype(np.uint64)
        if not addresses.size:
            return []
        if (addresses % np.uint64(size)).any():
            raise SanitizerError(f"{what} of program {self.grid_index}: an address is no multiple of {size}")
        index = np.searchsorted(self.lows, addresses, side="right").astype(np.int64) - 1
        places: list[tuple[_Region, np.ndarray]] = []
        for i in _distinct(index):
            mine = addresses[index == i]
            if i < 0:
                raise self._stray(what, mine, len(addresses), self.regions[0] if self.regions else None)
            region = self.regions[i]
            offsets = (mine - np.uint64(region.low)).astype(np.int64)
            inside = offsets + size <= len(region.allowed)
            bad = ~inside
            bad[inside] = ~(region.allowed[offsets[inside]] & region.allowed[offsets[inside] + size - 1])
            if bad.any():
                raise self._stray(what, mine[bad], len(addresses), region)
            both = offsets if size == 1 else np.concatenate([offsets, offsets + size - 1])
            places.append((region, both))
        return places

    def _stray(self, what: str, addresses: np.ndarray, lanes: int, region: _Region | None) -> SanitizerError:
        place = "no tensor was passed"
        if region is not None:
            size = region.high - region.low
            place = f"the first is {int(addresses[0]) - region.low} bytes from the start of a region of {size}"
        return SanitizerError(
            f"{what} outside of the tensors: {len(addresses)} of {lanes} lanes of program {self.grid_index}; {place}"
        )

    def section(self) -> int:
        key = (self.program, self.epochs.get(self.program, 0))
        if key not in self.sections:
            self.sections[key] = len(self.owners)
            self.owners.append(key)
        return self.sections[key]

    def check(self, what: str, seen: np.ndarray, how: str) -> None:
        """Raise where one of the sections belongs to another program, and nothing orders it before this one."""
        for section in _distinct(seen):
            if section == 0:
                continue
            if section != _SEVERAL:
                program, epoch = self.owners[section]
                released = self.epochs.get(program, 0) > epoch
                if program == self.program or (released and self.epochs.get(self.program, 0) > 0):
                    continue
            raise SanitizerError(f"race: a {what} of program {self.grid_index} at an element that another {how}")

    def load(self, pointers: Any, mask: Any) -> None:
        me = self.section()
        for region, at in self.locate("load", pointers, mask):
            self.check("load", region.stored[at], "stored to")
            self.check("load", region.atomic[at], "changed atomically")
            before = region.loaded[at]
            others = [s for s in _distinct(before) if s != 0 and (s < 0 or self.owners[s][0] != self.program)]
            region.loaded[at] = np.where(np.isin(before, others), _SEVERAL, me) if others else me

    def store(self, pointers: Any, value: Any, mask: Any) -> None:
        me = self.section()
        for region, at in self.locate("store", pointers, mask):
            self.check("store", region.stored[at], "stored to")
            self.check("store", region.loaded[at], "loaded")
            self.check("store", region.atomic[at], "changed atomically")
            region.stored[at] = me
        self._one_value_each(pointers, value, mask)

    def _one_value_each(self, pointers: Any, value: Any, mask: Any) -> None:
        shape = pointers.data.shape
        active = np.broadcast_to(mask.data, shape).reshape(-1).astype(np.bool_)
        addresses = pointers.data.reshape(-1)[active]
        if len(addresses) < 2:
            return
        values = np.broadcast_to(value.data, shape).reshape(-1)[active]
        order = np.argsort(addresses, kind="stable")
        same = addresses[order][1:] == addresses[order][:-1]
        if same.any():
            bits = np.ascontiguousarray(values[order]).view(f"V{values.dtype.itemsize}")
            if (same & (bits[1:] != bits[:-1])).any():
                raise SanitizerError(f"race: two lanes of one store of program {self.grid_index} differ at one element")

    def change(self, pointers: Any, mask: Any, semantic: Any) -> None:
        me = self.section()
        for region, at in self.locate("atomic", pointers, mask):
            self.check("atomic", region.stored[at], "stored to")
            self.check("atomic", region.loaded[at], "loaded")
            region.atomic[at] = me
        if semantic != interpreter._ir.MEM_SEMANTIC.RELAXED:
            self.epochs[self.program] = self.epochs.get(self.program, 0) + 1


class _Hooks:
    """Replacements for methods of the interpreter; they hold the launch that is running."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.launch: _Launch | None = None
        self.unmasked = False

    def all(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        yield _EXECUTOR, "_init_args_hst", self.begin
        yield _EXECUTOR, "__call__", self.call
        yield _BUILDER, "set_grid_idx", self.move
        yield _BUILDER, "create_load", self.plain_load
        yield _BUILDER, "create_masked_load", self.load
        yield _BUILDER, "create_masked_store", self.store
        yield _BUILDER, "create_atomic_rmw", self.change
        yield _BUILDER, "create_atomic_cas", self.compare

    def begin(self, original: Any, executor: Any, arguments: Any, named: Any) -> Any:
        on_host = original(executor, arguments, named)
        self.launch = _Launch([*on_host[0], *on_host[1].values()], self.seed)
        return on_host

    def call(self, original: Any, executor: Any, *arguments: Any, **named: Any) -> None:
        try:
            original(executor, *arguments, **named)
        except InterpreterError as error:
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):  # one for each device function on the way
                cause = cause.__cause__
            if isinstance(cause, SanitizerError):
                raise cause from None
            raise
        finally:
            self.launch = None

    def move(self, original: Any, builder: Any, x: int, y: int, z: int) -> None:
        if self.launch is not None:
            x, y, z = self.launch.move_to(x, y, z, builder.grid_dim)
        original(builder, x, y, z)

    def plain_load(self, original: Any, builder: Any, *arguments: Any) -> Any:
        self.unmasked = True
        try:
            return original(builder, *arguments)
        finally:
            self.unmasked = False

    def load(self, original: Any, builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        if self.launch is not None:
            # For one element the interpreter takes other=0 for none, and then reads 0: nothing is lost, or known.
            if other is None and not self.unmasked and pointers.data.size > 1:
                raise SanitizerError("a masked load without other=: its inactive lanes are undefined")
            self.launch.load(pointers, mask)
        return original(builder, pointers, mask, other, *rest, **named)

    def store(self, original: Any, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if self.launch is not None:
            self.launch.store(pointers, value, mask)
        return original(builder, pointers, value, mask, *rest)

    def change(
        self,
        original: Any,
        builder: Any,
        operation: Any,
        pointers: Any,
        value: Any,
        mask: Any,
        semantic: Any,
        *rest: Any,
    ) -> Any:
        if self.launch is not None:
            self.launch.change(pointers, mask, semantic)
        return original(builder, operation, pointers, value, mask, semantic, *rest)

    def compare(
        self, original: Any, builder: Any, pointers: Any, expected: Any, value: Any, semantic: Any, *rest: Any
    ) -> Any:
        if self.launch is not None:
            everywhere = interpreter.TensorHandle(np.ones(pointers.data.shape, np.bool_), interpreter.tl.int1)
            self.launch.change(pointers, everywhere, semantic)
        return original(builder, pointers, expected, value, semantic, *rest)


def _bind(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    def method(*arguments: Any, **named: Any) -> Any:
        return hook(original, *arguments, **named)

    return method


@contextmanager
def sanitized(seed: int = 0) -> Iterator[None]:
    """Check every launch in the interpreter while the context is open.

    Args:
        seed: chooses the order in which the programs of a launch run.
    """
    hooks = _Hooks(seed)
    with ExitStack() as stack:
        for owner, name, hook in hooks.all():
            stack.enter_context(patch.object(owner, name, _bind(getattr(owner, name), hook)))
        yield
