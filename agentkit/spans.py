"""Where a text has the values of a record."""

from __future__ import annotations

import re
from functools import cached_property
from typing import NamedTuple

_NUMBER = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+")
Span = tuple[int, int]


class _Squeezed(NamedTuple):
    """A text without white space and without case, and the place in the text of each of its characters."""

    text: str
    places: list[int]


class Finder:
    """Finds values in one stretch of a text.

    Equal values take its places one after the other, in the order in which they are asked for; the last place is
    shared by those that are left over.

    Args:
        text: the whole text.
        start, end: the stretch.
    """

    def __init__(self, text: str, start: int = 0, end: int | None = None) -> None:
        self._text = text[start:end]
        self._offset = start
        self._asked: dict[object, int] = {}

    def find(self, value: str | int | float | bool | None, written: str) -> Span | None:
        """The next place of a value.

        A string is looked for as it is, then with differences of case and white space; places that begin or end within
        a word only where there are no others. A number is looked for as the record writes it, then by its value, with
        or without thousands separators. Other values have no place.

        Args:
            value: the value.
            written: how the record writes it, as JSON.

        Returns:
            Its place in characters of the whole text; None if there is none.
        """
        if isinstance(value, str):
            found = self._string(value)
        elif isinstance(value, bool) or value is None:
            return None
        else:
            found = self._number(value, written)
        if not found:
            return None
        key = (type(value), value)
        turn = self._asked[key] = self._asked.get(key, -1) + 1
        start, end = found[min(turn, len(found) - 1)]
        return start + self._offset, end + self._offset

    def _string(self, value: str) -> list[Span]:
        value = value.strip()
        if not value:
            return []
        exact = [(at, at + len(value)) for at in _occurrences(self._text, value)]
        return self._whole(exact) or self._whole(self._loose(value)) or exact

    def _loose(self, value: str) -> list[Span]:
        """Places of a string whatever its case and white space."""
        wanted = _squeeze(value).text
        text, places = self._squeezed
        return [(places[at], places[at + len(wanted) - 1] + 1) for at in _occurrences(text, wanted)]

    def _whole(self, found: list[Span]) -> list[Span]:
        """Those that neither begin nor end within a word or number."""
        text = self._text
        return [
            (start, end)
            for start, end in found
            if not (start and _joined(text[start - 1], text[start]))
            and not (end < len(text) and _joined(text[end - 1], text[end]))
        ]

    def _number(self, value: int | float, written: str) -> list[Span]:
        numbers = [(match.start(), match.end()) for match in _NUMBER.finditer(self._text)]
        literal = written.lstrip("-")
        same = [span for span in numbers if self._text[slice(*span)] == literal]
        if not same:
            same = [span for span in numbers if float(self._text[slice(*span)].replace(",", "")) == abs(value)]
        return self._signed(same) if value < 0 else same

    def _signed(self, found: list[Span]) -> list[Span]:
        """Those behind a minus sign, with it."""
        return [(start - 1, end) for start, end in found if start and self._text[start - 1] in "-−"]

    @cached_property
    def _squeezed(self) -> _Squeezed:
        return _squeeze(self._text)


def _squeeze(text: str) -> _Squeezed:
    chars: list[str] = []
    places: list[int] = []
    for place, char in enumerate(text):
        if not char.isspace():
            folded = char.casefold()  # may be several characters, all of which stand in one place
            chars.append(folded)
            places.extend([place] * len(folded))
    return _Squeezed("".join(chars), places)


def _occurrences(text: str, wanted: str) -> list[int]:
    """Where ``wanted`` begins in ``text``, without overlaps."""
    found: list[int] = []
    at = text.find(wanted)
    while at >= 0:
        found.append(at)
        at = text.find(wanted, at + len(wanted))
    return found


def _joined(left: str, right: str) -> bool:
    """Whether two characters that follow each other belong to one word or one number."""
    return (left.isalpha() and right.isalpha()) or (left.isdigit() and right.isdigit())
