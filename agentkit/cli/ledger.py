"""The file ``agentkit extract -o`` writes: a line for each file that is read, from which a later call goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from agentkit.runtime.errors import AgentError

#: How each of our lines begins.
_HEAD = b'{"file": '


def digest(*parts: str) -> str:
    """What tells two extractions apart: 32 hexadecimal digits over some texts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Ledger:
    """JSON lines of records and errors, in a file that is always fit to go on from.

    Lines are appended as they come and each is handed to the system at once, so that a program that is killed loses at
    most the line it was writing. What is left of such a line is cut off when the file is opened. `close` brings the
    lines into the order of the files, one for each.

    Args:
        path: of the file; it need not exist.
        files: that are to be read, in order.

    Raises:
        AgentError: the file cannot be read or written, or holds other lines than ours.
    """

    def __init__(self, path: Path, files: Sequence[str]) -> None:
        self.path, self._files = path, files
        self._lines: dict[str, dict[str, Any]] = {}  # the last of each file
        try:
            data = path.read_bytes() if path.exists() else b""
            *whole, half = data.split(b"\n")
            for number, line in enumerate(whole, 1):
                entry = self._entry(line, number)
                self._lines[entry["file"]] = entry
            if not half.startswith(_HEAD) and not _HEAD.startswith(half):
                raise self._foreign(len(whole) + 1)
            self._stream = path.open("ab")
            self._stream.truncate(len(data) - len(half))
        except OSError as error:
            raise AgentError(f"{path} cannot be written: {error.strerror}. Choose another file.") from error

    def _entry(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry: object = json.loads(line)
        except ValueError:
            raise self._foreign(number) from None
        if not isinstance(entry, dict) or not isinstance(cast("dict[str, Any]", entry).get("file"), str):
            raise self._foreign(number)
        return cast("dict[str, Any]", entry)

    def _foreign(self, number: int) -> AgentError:
        return AgentError(f"line {number} of {self.path} is none of `agentkit extract`. Choose another file.")

    def has(self, file: str, key: str) -> bool:
        """Whether there is a record of a file, made in the same way of the same text."""
        line = self._lines.get(file, {})
        return "data" in line and line.get("key") == key

    def add(self, line: dict[str, Any]) -> None:
        """Write a line. It replaces an earlier one of the same file.

        Raises:
            AgentError: it cannot be written.
        """
        self._lines[line["file"]] = line
        try:
            self._stream.write(_encoded(line))
            self._stream.flush()
        except OSError as error:
            raise AgentError(f"{self.path} cannot be written: {error.strerror}. Make room, and start again.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is None:
            self._sort()

    def _sort(self) -> None:
        """Replace the file by one with a line for each file: those of earlier calls, then ours in their order."""
        ours = dict.fromkeys(self._files)
        order = [*(file for file in self._lines if file not in ours), *(file for file in ours if file in self._lines)]
        other = self.path.with_name(self.path.name + ".part")
        try:
            other.write_bytes(b"".join(_encoded(self._lines[file]) for file in order))
            os.replace(other, self.path)
        except OSError as error:  # the lines are all there, only not in order
            other.unlink(missing_ok=True)
            raise AgentError(f"{self.path} is complete but could not be sorted: {error.strerror}.") from error


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
