"""A process that runs sections one after another and writes down what they find as they find it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu import tree
from bench.gpu.process import Task
from bench.gpu.report import Check, Figure, Item, Note, Trial
from bench.gpu.sections import BY_NAME


class Events:
    """The file that the supervisor reads."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 — open for the life of the process

    def write(self, kind: str, data: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "data": data}) + "\n")
        self._file.flush()

    def item(self, item: Item) -> None:
        kinds = {Figure: "figure", Check: "check", Note: "note", Trial: "trial"}
        self.write(kinds[type(item)], asdict(item))


def main() -> None:
    """Run the task on the command line."""
    told = json.loads(sys.argv[1])
    task = Task(**{**told, "shard": tuple(told["shard"])})
    tree.prepare()
    import torch

    from bench.gpu.card import Bench, describe

    events = Events(task.out)
    with torch.inference_mode(), right_floats(task.rehearse):
        bench = Bench.start(task)
        events.write("machine", describe(bench.device))
        for index, name in enumerate(task.sections):
            bench.pace.section = name
            bench.pace.owed = sum(BY_NAME[later].seconds for later in task.sections[index + 1 :])
            section(bench, events, name)
            for dropped in bench.pace.dropped:
                events.write("dropped", dropped)
            gc.collect()
            if bench.device.type == "cuda":
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:  # the context is lost, and with it this process
                    sys.exit(1)


def section(bench: Any, events: Events, name: str) -> None:
    """Run one section; whatever it raises is written down as its failure."""
    module, function = BY_NAME[name].function.split(":")
    begin = time.perf_counter()
    events.write("begin", name)
    status, error = "ok", ""
    try:
        for item in getattr(importlib.import_module(f"bench.gpu.{module}"), function)(bench):
            events.item(item)
    except Exception as cause:
        traceback.print_exc()
        status, error = "failed", f"{type(cause).__name__}: {cause}"[:500]
    events.write("end", {"status": status, "error": error, "seconds": time.perf_counter() - begin})


@contextlib.contextmanager
def right_floats(rehearse: bool) -> Iterator[None]:
    """In a rehearsal, the interpreter with its arithmetic of bf16 and fp8 put right."""
    if not rehearse:
        yield
        return
    from tests.kernels.interpreter import exact_floats

    with exact_floats():
        yield
