"""One worker process: how it is started and told what to do, what it writes down, and when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu.report import Check, Figure, Note, Report, Section
from bench.gpu.sections import Entry
from bench.gpu.tree import ROOT

_NO_TIME = "no time was left"


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    sections: Sequence[Entry]
    quick: bool
    rehearse: bool
    seconds: float
    json: Path | None = None
    markdown: Path | None = None

    def write(self, report: Report) -> None:
        """Write the files that were asked for."""
        if self.json is not None:
            self.json.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
        if self.markdown is not None:
            self.markdown.write_text(report.markdown(), encoding="utf-8")


@dataclass(frozen=True)
class Task:
    """What a worker is told, as JSON on its command line.

    Attributes:
        sections: names, in order.
        deadline: in seconds of `time.time`.
        shard: which part of the proofs, of how many.
        skip: how many proofs of the part were done by a process that did not survive the last of them.
        out: where to append events, one JSON object a line.
    """

    sections: list[str]
    quick: bool
    rehearse: bool
    deadline: float
    shard: tuple[int, int]
    skip: int
    out: str


class Run:
    """A worker's part of the work, from its first process to its last.

    Args:
        order: of the whole run.
        batch: sections to run.
        shard: the part of them.
        deadline: in seconds of `time.time`.
        folder: for events.
        report: gets machine and what was dropped.
    """

    def __init__(
        self,
        order: Order,
        batch: Sequence[Entry],
        shard: tuple[int, int],
        deadline: float,
        folder: Path,
        report: Report,
    ) -> None:
        self._order, self._batch, self._shard, self._deadline, self._report = order, batch, shard, deadline, report
        self._events = folder / f"{time.time_ns()}-{shard[0]}.jsonl"
        self._read = 0
        self._found: list[Section] = []
        self._open = False
        self._trial = ""
        self._begin = self._heard = time.time()

    def sections(self) -> list[Section]:
        """Run the batch; the sections that were begun. A process that ends within proofs is replaced for the rest."""
        self._events.touch()
        reason = self._process(0)
        while self._open and self._batch[0].proofs and reason != _NO_TIME:
            section = self._found.pop()
            if self._trial:
                section.add(Check(self._trial, False, time.time() - self._heard, reason))
            self._open, self._trial = False, ""
            before = len(section.checks)
            reason = self._process(before)
            if not self._found:  # not even begun
                self._found, self._open = [section], True
                break
            again = self._found[-1]
            again.checks[:0], again.notes[:0] = section.checks, section.notes
            if len(again.checks) == before and not self._trial:
                break
        if self._open:
            self._close(reason)
        return self._found

    def _process(self, skip: int) -> str:
        """Run one process; how it ended."""
        self._heard = time.time()
        order, names = self._order, [entry.name for entry in self._batch]
        task = Task(names, order.quick, order.rehearse, self._deadline, self._shard, skip, str(self._events))
        process = subprocess.Popen(
            [sys.executable, "-c", "from bench.gpu.worker import main; main()", json.dumps(asdict(task))],
            cwd=ROOT,
            env=self._environment(),
            start_new_session=True,
        )
        reason = ""
        try:
            while process.poll() is None and not reason:
                time.sleep(0.1)
                self._collect()
                reason = self._overdue()
        finally:
            if process.poll() is None:  # with its children: compilers, suites
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._collect()
        return reason or f"the process ended with status {process.returncode}"

    def _environment(self) -> dict[str, str]:
        interpret = "1" if self._order.rehearse else "0"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        set_here = {"TRITON_INTERPRET": interpret, "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": path}
        if self._order.rehearse:  # toys take longer on several threads; and a card that is there has no part in it
            set_here |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return os.environ | set_here | {"PYTHONUNBUFFERED": "1"}

    def _overdue(self) -> str:
        """Why the process has to be stopped now; empty while it has time."""
        if time.time() > self._deadline:
            return _NO_TIME
        silent = time.time() - self._heard
        limit = self._batch[max(0, len(self._found) - 1)].silence
        return f"it was stopped after {silent:.0f} s of silence" if not self._order.rehearse and silent > limit else ""

    def _close(self, reason: str) -> None:
        """End the section in which the process ended."""
        section, entry = self._found[-1], self._batch[len(self._found) - 1]
        cut = not entry.proofs and (reason == _NO_TIME or (not entry.ours and "silence" in reason))
        self._end("cut" if cut else "failed", reason, time.time() - self._begin)
        if self._trial:
            section.add(Check(self._trial, False, time.time() - self._heard, reason))

    def _end(self, status: Any, error: str, seconds: float) -> None:
        section = self._found[-1]
        section.status, section.error, section.seconds = status, error, seconds
        self._open = False
        print(f"{section.name}: {status} in {seconds:.1f} s {error}", file=sys.stderr)
        if self._shard[1] == 1:
            so_far = Report(**{**vars(self._report), "sections": [*self._report.sections, *self._found]})
            self._order.write(so_far)

    def _collect(self) -> None:
        """Take the events that have been written completely."""
        with self._events.open(encoding="utf-8") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole.encode())
        for line in whole.splitlines():
            self._heard = time.time()
            self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        kind, data = event["kind"], event["data"]
        if kind == "machine":
            self._report.machine |= data
        elif kind == "dropped":
            self._report.dropped += [data] if data not in self._report.dropped else []
        elif kind == "begin":
            self._found.append(Section(data))
            self._open, self._begin = True, time.time()
        elif kind == "end":
            self._end(data["status"], data["error"], data["seconds"])
        elif kind == "trial":
            self._trial = data["name"]
        else:
            make = {"figure": Figure.load, "check": lambda x: Check(**x), "note": lambda x: Note(**x)}[kind]
            self._found[-1].add(make(data))
            self._trial = "" if kind == "check" else self._trial
