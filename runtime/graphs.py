"""Decode steps as captured graphs: one launch in place of some hundreds.

A step in which every sequence decodes one id is padded to the next size of a ladder and replayed from the graph of that
size. Everything it reads lies in fixed memory (`agentkit.runtime.inputs`, `agentkit.kernels.plan`), rows that pad it
have no context and no slot, and a `Reserve` keeps the grids of its attention the same as lengths change. A graph ends
with the hidden states: the head is two launches, which are made while the graph runs, and so the logits of a step are
memory of its own, whoever keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from agentkit.kernels.plan import RESIDENT, Reserve, Shape
from agentkit.runtime.errors import EngineError
from agentkit.runtime.model import Batch
from agentkit.runtime.sequence import Entry

#: Runs what was captured; the result is the same memory each time.
Replay = Callable[[], Tensor]
#: Captures what a call launches.
Capture = Callable[[Callable[[], Tensor]], Replay]

#: Row entries of the groups of a step, times its rows, that a reserve holds; with more, prefixes are not shared.
ENTRIES = 4
#: From here on sizes are this far apart.
_APART = 8


class CudaCapture:
    """Captures CUDA graphs, all in one memory pool.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, launch: Callable[[], Tensor]) -> Replay:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            launch()  # compiles kernels, and libraries make their workspaces
        current.wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = launch()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class Graphs:
    """The decode steps of a runner, captured by size.

    Args:
        forward: hidden states of a batch.
        running: most sequences in a step.
        capture: how.

    Attributes:
        sizes: of the ladder, ascending.
    """

    def __init__(self, forward: Callable[[Batch], Tensor], running: int, capture: Capture) -> None:
        self._forward, self._capture = forward, capture
        self._replays: dict[int, Replay] = {}
        self.sizes = ladder(running)

    def size(self, entries: Items[Entry]) -> int | None:
        """The rows that a step is padded to; None for one that is not captured, as it does more than decode."""
        if not entries or not all(entry.decodes for entry in entries):
            return None
        return next((size for size in self.sizes if size >= len(entries)), None)

    def run(self, batch: Batch) -> Tensor:
        """Hidden states ``[t, hidden]`` of a padded batch, the same memory in each step of the size.

        Raises:
            EngineError: the step cannot be captured.
        """
        size = len(batch.ids)
        if size not in self._replays:
            try:
                self._replays[size] = self._capture(lambda: self._forward(batch))
            except Exception as cause:
                raise EngineError(
                    f"a decode step of {size} sequences could not be captured as a CUDA graph: {cause}. Load the model "
                    "with Options(graphs=False); if it is memory that lacks, a smaller `kv_bytes` or `running` leaves "
                    "more."
                ) from cause
        return self._replays[size]()


def ladder(running: int) -> tuple[int, ...]:
    """Sizes that steps of up to so many sequences are padded to: at most twice as many rows, from 8 on at most 7 more.

    Args:
        running: most sequences in a step.
    """
    small = [size for size in (1, 2, 4) if size < running]
    return (*small, *range(_APART, running, _APART), running)


def reserve(size: int, shape: Shape, processors: int) -> Reserve:
    """Grids that hold the attention of any decode step of so many rows whose groups have at most `ENTRIES` times as
    many row entries, with room to split lists until they fill the device.

    Args:
        size: rows, padding included.
        shape: of the attention.
        processors: multiprocessors.
    """
    narrow = min(tile for tile in RESIDENT if tile >= shape.group)
    entries, rows = ENTRIES * size, narrow // shape.group

    def fill(tile: int) -> int:
        return -(-processors * RESIDENT[tile] // shape.kv_heads)

    # Page lists form a tree: a leaf for each row, and fewer branching points than leaves. Each is one block, but for
    # those with more rows than the tile of least rows has; there is a wider one for them.
    items = {narrow: 2 * size + 2 * fill(narrow)}
    if size > rows:
        wide = max(narrow, 64)
        blocks = min(size, entries // (rows + 1)) + -(-entries * shape.group // wide)
        items[wide] = items.get(wide, 0) + blocks + fill(wide)
    return Reserve(items, merges=size)
