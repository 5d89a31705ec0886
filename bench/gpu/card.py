"""The device under measurement: what it is, its ceilings, and figures as shares of them."""

from __future__ import annotations

import datetime
import platform
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
import triton

from bench.gpu.process import Task
from bench.gpu.report import Figure, Target
from bench.gpu.timing import Clock, Pace
from bench.gpu.tree import ROOT

Role = Literal["ours", "peer", "floor", "part"]


@dataclass
class Bench:
    """What every section gets.

    Attributes:
        device: the card, or the CPU in a rehearsal.
        rehearsal: whether shapes are toys and times mean nothing.
        quick: fewer cases.
        shard: which part of the proofs, of how many.
        skip: proofs of the part that are done.
    """

    device: torch.device
    pace: Pace
    rehearsal: bool = False
    quick: bool = False
    shard: tuple[int, int] = (0, 1)
    skip: int = 0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.device, self.pace)

    @staticmethod
    def start(task: Task) -> Bench:
        """The bench of a task. RuntimeError where there is no card and no rehearsal was asked for."""
        if not task.rehearse and not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device: run with --rehearse to try the program without one")
        device = torch.device("cpu" if task.rehearse else "cuda", None if task.rehearse else 0)
        torch.manual_seed(0)
        pace = Pace(task.deadline, task.quick)
        return Bench(device, pace, task.rehearse, task.quick, task.shard, task.skip)

    @property
    def processors(self) -> int:
        """Multiprocessors to plan for."""
        return self.device_properties.multi_processor_count if self.device.type == "cuda" else 2

    @property
    def device_properties(self) -> Any:
        return cast("Any", torch.cuda.get_device_properties(self.device))

    @cached_property
    def copied(self) -> float:
        """Bytes a second, read and written, of a copy within the device."""
        size = 1 << 12 if self.rehearsal else 1 << 30
        source, target = (torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * size / self.clock.cold(lambda: target.copy_(source))

    @cached_property
    def multiplied(self) -> float:
        """Operations a second of a large bf16 product of random numbers."""
        n = 32 if self.rehearsal else 8192
        a, b = (torch.randn(n, n, device=self.device).to(torch.bfloat16) for _ in range(2))
        return 2 * n**3 / self.clock.cold(lambda: a @ b)

    def figure(self, name: str, value: float, unit: str, **more: Any) -> Figure:
        """A figure that is marked where it is none."""
        return Figure(name, value, unit, rehearsal=self.rehearsal, **more)

    def bytes(
        self, name: str, moved: float, seconds: float, target: Target | None = None, role: Role = "ours", note: str = ""
    ) -> Figure:
        """Bytes moved, as a rate beside the copy's."""
        note = "; ".join(x for x in (f"{seconds * 1e6:,.1f} µs", note) if x)
        rate = moved / seconds
        return self.figure(
            name, rate * 1e-12, "TB/s", share=rate / self.copied, floor="copy", target=target, role=role, note=note
        )

    def operations(
        self, name: str, done: float, seconds: float, target: Target | None = None, role: Role = "ours", note: str = ""
    ) -> Figure:
        """Operations done, as a rate beside the product's."""
        note = "; ".join(x for x in (f"{seconds * 1e6:,.1f} µs", note) if x)
        rate = done / seconds
        return self.figure(
            name, rate * 1e-12, "TFLOP/s", share=rate / self.multiplied, floor="product", target=target, role=role,
            note=note,
        )  # fmt: skip


def describe(device: torch.device) -> dict[str, str]:
    """What a reader has to know of the machine and the tree to place the numbers."""
    said = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    if device.type == "cuda":
        said["device"] = torch.cuda.get_device_name(device)
        said |= query_driver()
    return said | {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "commit": (_output(["git", "rev-parse", "--short", "HEAD"]) or "unknown")
        + (" with changes" if _output(["git", "status", "--porcelain", "--untracked-files=no"]) else ""),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }


def query_driver() -> dict[str, str]:
    """The driver's version, and clocks as they are at this moment; empty where there is no driver."""
    fields = {"driver": "driver_version", "SM clock": "clocks.sm", "memory clock": "clocks.mem", "power": "power.limit"}
    found = _output(["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"])
    values = [value.strip() for value in found.split(",")]
    return dict(zip(fields, values, strict=False)) if len(values) == len(fields) else {}


def _output(command: list[str]) -> str:
    """What a program prints; empty where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
