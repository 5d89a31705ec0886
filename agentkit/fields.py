"""A JSON document as it grows: which field has begun, what a string has grown by, which field is complete.

Each character is looked at once, whatever the document's size and however its text is cut: nothing is parsed again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal, cast

#: Where a field stands in its document: names of members and indices of items, from the root, which is ``()``.
Path = tuple[str | int, ...]
Kind = Literal["object", "array", "string", "number", "boolean", "null"]


@dataclass(frozen=True, slots=True)
class FieldStarted:
    """A field has begun: the root, a member of an object or an item of an array.

    Attributes:
        path: where it stands.
        kind: what it is, in the words of JSON schema.
        call: the call of the turn whose argument it is, from 0; None in a typed output.
    """

    path: Path
    kind: Kind
    call: int | None = None


@dataclass(frozen=True, slots=True)
class FieldDelta:
    """A string has grown.

    Attributes:
        path: of the string.
        text: what it has grown by, without JSON's escapes.
        call: as of `FieldStarted`.
    """

    path: Path
    text: str
    call: int | None = None


@dataclass(frozen=True, slots=True)
class FieldReady:
    """A field is complete; for an object or an array, so are all fields in it, each of which had an event of its own.

    Attributes:
        path: where it stands.
        value: as `json.loads` gives it.
        call: as of `FieldStarted`.
    """

    path: Path
    value: Any
    call: int | None = None


FieldEvent = FieldStarted | FieldDelta | FieldReady

_BLANK = re.compile(r"[\s,:]*")
_PLAIN = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[-+.\w]*")
_KINDS: dict[str, Kind] = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class _State(Enum):
    VALUE = auto()  # before a value, or before the end of an array
    MEMBER = auto()  # before the name of a member, or before the end of an object
    STRING = auto()
    SCALAR = auto()  # in a number, true, false or null
    COMPLETE = auto()


class Document:
    """Follows one JSON document. Its text was written under a grammar: what is not JSON is a bug of the caller's.

    Args:
        call: for the events.

    Attributes:
        value: the document, once it is complete.
    """

    def __init__(self, call: int | None = None) -> None:
        self._call = call
        self.value: Any = None
        self._state = _State.VALUE
        self._open: list[Any] = []  # objects and arrays without an end, outermost first
        self._path: Path = ()
        self._names: list[str] = []  # of the members begun in the open objects, innermost last
        self._name = False  # whether the string is the name of a member
        self._parts: list[str] = []  # of the string or scalar
        self._grown: list[str] = []  # of it, by this text
        self._escape = ""  # an escape begun
        self._high = ""  # a surrogate that waits for its other half

    @property
    def complete(self) -> bool:
        """Whether it has come to its end. A number at the root only ends with `end`."""
        return self._state is _State.COMPLETE

    def feed(self, text: str, events: list[Any]) -> int:
        """Take more text and add to `events` what it brings about; the characters that belong to the document."""
        at = 0
        while at < len(text) and self._state is not _State.COMPLETE:
            match self._state:
                case _State.STRING:
                    at = self._in_string(text, at, events)
                case _State.SCALAR:
                    at = self._in_scalar(text, at, events)
                case _:
                    at = self._between(text, at, events)
        self._flush(events)
        return at

    def end(self, events: list[Any]) -> None:
        """The text has ended, and with it a number at the root."""
        if self._state is _State.SCALAR and not self._open:
            self._finish(json.loads("".join(self._parts)), events)

    def _between(self, text: str, at: int, events: list[Any]) -> int:
        """White space and separators, then the beginning or the end of something."""
        at = cast("re.Match[str]", _BLANK.match(text, at)).end()
        if at == len(text):
            return at
        char = text[at]
        if char in "}]" and self._open:
            self._finish(self._open.pop(), events)
            return at + 1
        if self._state is _State.MEMBER:
            if char != '"':
                raise ValueError(f"not JSON: {text[at : at + 20]!r} where a member is expected")
            self._name, self._state = True, _State.STRING
            return at + 1
        if self._open and isinstance(self._open[-1], list):
            self._path = (*self._path, len(cast("list[Any]", self._open[-1])))
        events.append(FieldStarted(self._path, _KINDS.get(char, "number"), self._call))
        if char == "{":
            self._open.append({})
            self._state = _State.MEMBER
        elif char == "[":
            self._open.append([])
        elif char == '"':
            self._state = _State.STRING
        else:
            self._state = _State.SCALAR
            return at
        return at + 1

    def _in_string(self, text: str, at: int, events: list[Any]) -> int:
        if self._escape:
            return self._in_escape(text, at)
        end = cast("re.Match[str]", _PLAIN.match(text, at)).end()
        if end > at:
            self._append(text[at:end])
        if end == len(text):
            return end
        if text[end] == "\\":
            self._escape = "\\"
        else:
            self._append("")  # half a pair of surrogates stays alone
            self._end_string(events)
        return end + 1

    def _in_escape(self, text: str, at: int) -> int:
        """Take what belongs to an escape: one character, or ``u`` and four digits."""
        taken = text[at : at + (6 if (self._escape + text[at])[1] == "u" else 2) - len(self._escape)]
        self._escape += taken
        kind = self._escape[1]
        if kind != "u":
            self._append(_ESCAPES.get(kind, kind))
            self._escape = ""
        elif len(self._escape) == 6:
            char = chr(int(self._escape[2:], 16))
            self._escape = ""
            if self._high and "\udc00" <= char <= "\udfff":
                pair, self._high = self._high + char, ""
                self._append(pair.encode("utf-16", "surrogatepass").decode("utf-16"))
            else:
                self._append("")
                if "\ud800" <= char <= "\udbff":
                    self._high = char
                else:
                    self._append(char)
        return at + len(taken)

    def _append(self, text: str) -> None:
        self._grown += (self._high, text) if self._high else (text,)
        self._high = ""

    def _flush(self, events: list[Any]) -> None:
        """Tell what the string has grown by."""
        if not self._grown:
            return
        text = "".join(self._grown)
        self._grown.clear()
        self._parts.append(text)
        if text and not self._name:
            events.append(FieldDelta(self._path, text, self._call))

    def _end_string(self, events: list[Any]) -> None:
        self._flush(events)
        text = "".join(self._parts)
        self._parts.clear()
        if self._name:
            self._name, self._state = False, _State.VALUE
            self._names.append(text)
            self._path = (*self._path, text)
        else:
            self._finish(text, events)

    def _in_scalar(self, text: str, at: int, events: list[Any]) -> int:
        end = cast("re.Match[str]", _SCALAR.match(text, at)).end()
        self._parts.append(text[at:end])
        if end < len(text):
            self._finish(json.loads("".join(self._parts)), events)
        return end

    def _finish(self, value: Any, events: list[Any]) -> None:
        """A value is complete: put it where it belongs."""
        self._parts.clear()
        events.append(FieldReady(self._path, value, self._call))
        if not self._open:
            self.value, self._state = value, _State.COMPLETE
            return
        self._path = self._path[:-1]
        parent = self._open[-1]
        if isinstance(parent, dict):
            parent[self._names.pop()] = value
            self._state = _State.MEMBER
        else:
            parent.append(value)
            self._state = _State.VALUE
