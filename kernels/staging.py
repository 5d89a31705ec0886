"""Numbers that the host writes and the device reads in each step, always in the same memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Staging:
    """One stretch of host memory and one of the device, in sections.

    The host's is pinned where there is a GPU, so that the copy does not wait for the device; an event keeps the next
    step from writing over it before it is read.

    Args:
        sizes: numbers in each section.
        device: where they go.
        dtype: of the numbers.

    Attributes:
        host: the sections, to be written between `wait` and `send`.
        device: the same sections as the device has them.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int32) -> None:
        cuda = device.type == "cuda"
        aligned = [even(size, dtype) for size in sizes]
        self._host = torch.zeros(sum(aligned), dtype=dtype, pin_memory=cuda)
        self._device = torch.zeros(sum(aligned), dtype=dtype, device=device)
        starts = [sum(aligned[:i]) for i in range(len(aligned))]
        self.device: list[Tensor] = [self._device[a : a + n] for a, n in zip(starts, sizes, strict=True)]
        self.host: list[NDArray[Any]] = [self._host[a : a + n].numpy() for a, n in zip(starts, sizes, strict=True)]
        self._last = starts[-1]
        self._copied = torch.cuda.Event() if cuda else None

    def wait(self) -> None:
        """Return when the last copy has been read."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, last: int) -> None:
        """Copy every section, of the last one only so many numbers."""
        stop = self._last + last
        self._device[:stop].copy_(self._host[:stop], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def even(size: int, dtype: torch.dtype) -> int:
    """A size that makes what follows begin at 16 bytes, as kernels are compiled for."""
    unit = 16 // dtype.itemsize
    return -(-size // unit) * unit
