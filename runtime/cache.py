"""A cache that is bounded by the size of what it holds."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Remembers the values that were used last, as many as fit; the very last one always. Not thread-safe.

    Args:
        capacity: sum of the sizes of what is remembered, in whatever unit the sizes have.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self.held = 0

    def get(self, key: str) -> Value | None:
        """The value under `key`, which has now been used; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: str, value: Value, size: int) -> None:
        """Remember `value` and forget those used longest ago that no longer fit."""
        self.drop(key)
        self._entries[key] = (value, size)
        self.held += size
        while self.held > self._capacity and len(self._entries) > 1:
            self.drop(next(iter(self._entries)))

    def drop(self, key: str) -> None:
        """Forget the value under `key`, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.held -= entry[1]
