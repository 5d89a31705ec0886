"""Runs sections in worker processes, keeps what they find, and goes on after one that faults or hangs.

A fault in a kernel leaves a CUDA context that answers every later call with the same error, and a kernel that hangs
cannot be interrupted. So sections run in a process that can be replaced. No torch here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu.process import Order, Run
from bench.gpu.report import Report, Section
from bench.gpu.sections import Entry

#: Of the time for all, so that the table is written before whoever waits for it gives up.
_RESERVE = 5.0
#: A process is not worth its start in less.
_LEAST = 15.0


def supervise(order: Order) -> Report:
    """Run the sections and return what they found; the files are written anew after each section."""
    begin = time.time()
    deadline = begin + order.seconds - _RESERVE
    report = Report(order.rehearse)
    todo = list(order.sections)
    with tempfile.TemporaryDirectory() as folder:
        while todo:
            if deadline - time.time() < _LEAST:
                report.sections += [_unstarted(entry, "no time was left") for entry in todo]
                break
            batch, shards = _batch(order, todo)
            runs = [Run(order, batch, (i, shards), deadline, Path(folder), report) for i in range(shards)]
            with ThreadPoolExecutor(shards) as pool:
                found = list(pool.map(Run.sections, runs))
            if not any(found):
                report.sections += [_unstarted(entry, "no worker could start; what it said is above") for entry in todo]
                break
            report.sections += _merged(found, batch[0])
            del todo[: max(map(len, found))]
            report.seconds = time.time() - begin
            order.write(report)
    report.seconds = time.time() - begin
    order.write(report)
    return report


def _batch(order: Order, todo: Sequence[Entry]) -> tuple[Sequence[Entry], int]:
    """What the next processes run, and how many share it: proofs are shared, measurements have the card alone."""
    if todo[0].processes > 1:
        return todo[:1], min(2, todo[0].processes) if order.rehearse else todo[0].processes
    return todo[: next((i for i, entry in enumerate(todo) if entry.processes > 1), len(todo))], 1


def _unstarted(entry: Entry, why: str) -> Section:
    return Section(entry.name, "failed" if entry.proofs or why.startswith("no worker") else "cut", error=why)


def _merged(found: Sequence[list[Section]], first: Entry) -> list[Section]:
    """Sections of processes that shared the work, as one each."""
    filled = [sections or [Section(first.name, "failed", error="a process could not start")] for sections in found]
    merged = filled[0]
    for section, *others in zip(merged, *filled[1:], strict=True):
        for other in others:
            section.figures += other.figures
            section.checks += other.checks
            section.notes += other.notes
            section.seconds = max(section.seconds, other.seconds)
            section.error = "; ".join(dict.fromkeys(x for x in (section.error, other.error) if x))
            section.status = min(section.status, other.status, key=["failed", "cut", "ok"].index)
    return [section.judge() for section in merged]
