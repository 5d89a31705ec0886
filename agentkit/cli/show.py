"""What a run looks like: to a person as it happens, to a program as JSON lines.

Text of the model goes to standard output; calls, results and counts go to standard error, so that the
answer alone can be piped on.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from typing import Any

from pydantic_core import to_jsonable_python

from agentkit.agent import AgentEvent
from agentkit.cli.terminal import CYAN, DIM, RED, json_line, paint, printable
from agentkit.loop import Finished, PrefillProgress, ToolFinished, TurnFinished
from agentkit.result import CallRecord, RunResult
from agentkit.runtime.request import Usage
from agentkit.turn import CallReady, OutputDelta, TextDelta

#: Of a tool's result, the lines that are shown, and the characters of a line.
_LINES, _WIDTH = 5, 160


class Printer:
    """Prints events for a person. Use a new one for each run: it measures how long the model takes."""

    def __init__(self) -> None:
        self._column = 0
        self._status = False
        self._turn_open = False
        self._since = time.monotonic()
        self._model_seconds = 0.0

    def __call__(self, event: AgentEvent) -> None:
        """Print one event; the order is that of the run."""
        if isinstance(event, PrefillProgress):
            self._reading(event)
        elif isinstance(event, TextDelta | OutputDelta):
            self._write(printable(event.text))
        elif isinstance(event, CallReady):
            self.note(f"→ {event.name}({json.dumps(dict(event.arguments), ensure_ascii=False)})", CYAN)
        elif isinstance(event, ToolFinished):
            self.note(_returned(event.record), RED if event.record.failed else DIM)
        elif isinstance(event, Finished):
            self.note(summary(event.result, self._model_seconds), DIM)
        self._clock(event)

    def note(self, text: str, color: str) -> None:
        """Print a line beside the model's text."""
        self.end_line()
        print(paint(printable(text), color, sys.stderr), file=sys.stderr, flush=True)

    def end_line(self) -> None:
        """Begin a new line of text unless one has just begun."""
        self._clear()
        if self._column:
            self._write("\n")

    def _reading(self, event: PrefillProgress) -> None:
        """A line that each event writes over and the next output clears; only a terminal can show it."""
        if sys.stderr.isatty():
            self.end_line()
            again = f", {event.recomputed:,} a second time" if event.recomputed else ""
            text = f"reading the prompt: {event.done:,} of {event.total:,} tokens{again}"
            print(paint(text, DIM, sys.stderr), end="", file=sys.stderr, flush=True)
            self._status = True

    def _clear(self) -> None:
        if self._status:
            self._status = False
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        self._clear()
        sys.stdout.write(text)
        sys.stdout.flush()
        self._column = len(text) - 1 - text.rfind("\n") + (0 if "\n" in text else self._column)

    def _clock(self, event: AgentEvent) -> None:
        """Add up the time of turns: tools that run after the model has ended its turn cost it nothing."""
        now = time.monotonic()
        if isinstance(event, TurnFinished):
            self.end_line()
            self._model_seconds += now - self._since
            self._since, self._turn_open = now, False
        elif not isinstance(event, ToolFinished):
            self._turn_open = True
        elif not self._turn_open:
            self._since = now


def print_json(event: AgentEvent) -> None:
    """Print an event as one JSON object on a line."""
    json_line(event_json(event))


def event_json(event: AgentEvent) -> dict[str, Any]:
    """An event as JSON values: its type in snake case as ``event``, then its fields.

    `Finished` has ``output``, ``stop``, ``usage`` and ``seconds``.
    """
    name = re.sub(r"(?<=.)(?=[A-Z])", "_", type(event).__name__).lower()
    if isinstance(event, Finished):
        result = event.result
        fields = {
            "output": result.output,
            "stop": result.stop,
            "usage": result.usage,
            "seconds": result.seconds,
        }
    else:
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return {"event": name} | to_jsonable_python(fields)


def summary(result: RunResult[Any], model_seconds: float) -> str:
    """What a run cost, on one line.

    Args:
        result: of the run.
        model_seconds: how long its turns took, prefill included and waiting for tools excluded; what the
            rate refers to.
    """
    made = result.usage.decoded + result.usage.forced
    rate = f" · {made / model_seconds:.0f} tok/s" if model_seconds > 0 else ""
    stop = "" if result.stop == "answer" else f" · stopped by {result.stop}"
    return f"{tokens(result.usage)}{rate} · {result.seconds:.1f} s{stop}"


def tokens(usage: Usage) -> str:
    """Token counts on one line."""
    counts = f"{usage.prefilled} prefilled, {usage.cached} cached, {usage.decoded} decoded, {usage.forced} forced"
    counts += f", {usage.recomputed} recomputed" if usage.recomputed else ""
    counts += f", {usage.retried} retried" if usage.retried else ""
    return f"tokens: {counts}" + (f", {usage.accepted} of {usage.drafted} drafts right" if usage.drafted else "")


def _returned(record: CallRecord) -> str:
    """The first lines of a tool's result."""
    lines = record.result.splitlines() or [""]
    shown = [line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…" for line in lines[:_LINES]]
    if len(lines) > _LINES:
        shown.append(f"… {len(lines) - _LINES} more lines")
    return f"← {record.name}: " + "\n  ".join(shown) + f" ({record.seconds:.1f} s)"
