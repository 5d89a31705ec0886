"""Room in the host's memory for pages that the device has none for."""

from __future__ import annotations

from agentkit.runtime.pages import Corruption


class HostPool:
    """Hands out slots ``0 .. total - 1``, each as large as a page. All that are taken are the prefix tree's."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.clear()

    def clear(self) -> None:
        """Free every slot."""
        self._free = list(range(self.total))[::-1]
        self._taken = bytearray(self.total)

    @property
    def used(self) -> int:
        """Slots that hold a page."""
        return self.total - len(self._free)

    def allocate(self) -> int | None:
        """A slot; None when none is free."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._taken[slot] = True
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; releasing a free one raises `Corruption`."""
        if not self._taken[slot]:
            raise Corruption(f"slot {slot} of the host is released twice")
        self._taken[slot] = False
        self._free.append(slot)
