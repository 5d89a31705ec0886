"""Device time: medians over repetitions with a cold cache, and graph replays for what is shorter than its launch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

Call = Callable[[], object]


@dataclass
class Pace:
    """How many repetitions there is time for.

    Attributes:
        deadline: in seconds of `time.time`.
        owed: seconds that the sections after the present one will take.
        section: the present one.
        dropped: what was left out.
    """

    deadline: float
    quick: bool = False
    owed: float = 0.0
    section: str = ""
    dropped: list[str] = field(default_factory=list[str])

    @property
    def left(self) -> float:
        """Seconds for the present section."""
        return self.deadline - time.time() - self.owed

    def repetitions(self, wanted: int) -> int:
        """As many as wanted; where time is short a fifth, at least three."""
        if self.left > 0:
            return max(3, wanted // 3) if self.quick else wanted
        self.drop(f"repetitions in {self.section}")
        return max(3, wanted // 5)

    def affords(self, seconds: float, what: str) -> bool:
        """Whether something optional can still be run."""
        if self.left >= seconds:
            return True
        self.drop(f"{what} in {self.section}")
        return False

    def drop(self, what: str) -> None:
        if what not in self.dropped:
            self.dropped.append(what)


class Clock:
    """Seconds of calls on a device; on a CPU one call by the wall clock, which shows that it runs and no more."""

    def __init__(self, device: torch.device, pace: Pace) -> None:
        self.pace = pace
        self._cuda = device.type == "cuda"
        if self._cuda:
            # Beyond the cache, and long enough to write that the host has launched the call before it is done.
            self._flush = torch.empty(max(5 * cache_bytes(device), 512 << 20), dtype=torch.uint8, device=device)

    def cold(self, call: Call, repetitions: int = 25) -> float:
        """Median seconds of one call that finds nothing of its own in the cache."""
        if not self._cuda:
            return _wall(call)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(self.pace.repetitions(repetitions)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3

    def graph(self, calls: Sequence[Call], repetitions: int = 25) -> float:
        """Median seconds of a call, from replays of a graph of all of them. Give each its own buffers, so that
        together they exceed the cache several times."""
        if not self._cuda:
            return statistics.mean(_wall(call) for call in calls)
        graph = capture(lambda: [call() for call in calls] and None)
        times: list[float] = []
        for _ in range(self.pace.repetitions(repetitions)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times) * 1e-3 / len(calls)


class Echo:
    """In place of a graph where there are none: a replay is the call itself."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def replay(self) -> None:
        self._call()


def capture(call: Call) -> torch.cuda.CUDAGraph | Echo:
    """A graph of what the call launches, after a warm-up that compiles."""
    if not torch.cuda.is_available():
        call()
        return Echo(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def cache_bytes(device: torch.device) -> int:
    """The L2 cache of a card; of a CPU a token size, as nothing is measured there."""
    if device.type != "cuda":
        return 1 << 10
    return int(cast("Any", torch.cuda.get_device_properties(device)).L2_cache_size)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _wall(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
