"""Drafts: what may come next, guessed from where the end of a text stood before in it.

Arguments of calls and extracted fields are mostly copied from the context, and a later output resembles an earlier one
(prompt lookup decoding, Saxena 2023). The model verifies a guess, so a wrong one costs time and nothing else. How often
guesses are right is measured on every token, whether or not they are used: a text without copies costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import numpy as np
from numpy.typing import NDArray

#: What each row, and on top of that the first one, adds to a step of one row, as a share of it: measured with the
#: embedded model on a CPU, where a step of several rows cannot use weights of 4 bits. A GPU's are lower.
ROW, FIRST = 0.08, 0.25
#: Places that are compared to find the longest match, and ids compared at each.
_PLACES, _LONGEST = 16, 32
#: A single id is looked for only where it stands this seldom.
_RARE = 4
#: Weight that an earlier observation keeps when one more is made.
_FADE = 0.9
#: Share of right guesses assumed at first after 0, 1, 2 to 3, 4 to 7 and more chosen ids that were guessed right.
_ODDS = (0.1, 0.3, 0.5, 0.7, 0.8)

_TOKEN_BITS, _PLACE_BITS = 19, 25


class Drafter:
    """Guesses how a list of ids goes on, and learns how good its guesses are.

    Places are found by the last two ids: in the ids known at first by a sorted array, in what comes later by a
    dictionary, so a step costs O(log n).

    Args:
        ids: all ids so far.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids = list(ids)
        self._keys = _sorted_keys(self._ids)
        self._later: dict[int, int] = {}  # key of a pair that came later -> the place after it
        self._indexed = len(self._ids) - 1  # pairs that end before this place can be found
        self._news: list[tuple[int, ...]] = []  # observed, not yet taken in
        self._right = list(_ODDS)  # faded counts of right guesses, and of all
        self._all = [1.0] * len(_ODDS)
        self._source: int | None = None  # the place whose ids are guessed to come next
        self._run = 0  # ids chosen last that are also those before that place
        self._chosen = 0  # ids chosen since the last forced one
        self._search()

    def fork(self) -> Self:
        """An independent copy; what does not change is shared."""
        fork = object.__new__(type(self))
        fork.__dict__.update(self.__dict__)
        for name in ("_ids", "_later", "_news", "_right", "_all"):
            setattr(fork, name, getattr(self, name).copy())
        return fork

    def observe(self, ids: tuple[int, ...]) -> None:
        """Take note of ids that have come: one that was chosen, then those that were forced."""
        self._news.append(ids)

    def propose(self, most: int) -> list[int]:
        """Up to ``most`` ids that are worth verifying; [] where nothing is.

        A draft goes on as long as the next id is likely enough to pay for its row, and is made at all if what it
        saves on average is more than what it costs.
        """
        for ids in self._news:
            self._take(ids)
        self._news.clear()
        if self._source is None:
            return []
        count, chance, saved = 0, 1.0, 0.0
        while count < most:
            kind = _kind(self._run + count)
            chance *= self._right[kind] / self._all[kind]
            if chance < ROW:
                break
            count += 1
            saved += chance
        return self.guess(count) if saved > FIRST + ROW * count else []

    def guess(self, count: int) -> list[int]:
        """The next ``count`` ids, however unlikely; [] where the end stood nowhere before."""
        if self._source is None:
            return []
        period = len(self._ids) - self._source  # a guess that reaches the end goes on with itself
        return [self._ids[self._source + i % period] for i in range(count)]

    def _take(self, ids: tuple[int, ...]) -> None:
        source, forced = self._source, len(ids) > 1
        if source is not None:
            kind = _kind(self._run)
            self._right[kind] = self._right[kind] * _FADE + (self._ids[source] == ids[0])
            self._all[kind] = self._all[kind] * _FADE + 1
        self._ids.extend(ids)
        # What was forced says nothing about what will be chosen: after a key stands another value than before.
        self._chosen = 0 if forced else self._chosen + 1
        if source is not None and tuple(self._ids[source : source + len(ids)]) == ids:
            self._source, self._run = source + len(ids), 0 if forced else self._run + 1
        else:
            self._search()

    def _search(self) -> None:
        """Find the place before which most ids are those at the end; the latest one of equals."""
        self._index()
        length, self._source = max(((self._match(place), place) for place in self._places()), default=(0, None))
        self._run = min(length, self._chosen)

    def _index(self) -> None:
        """Make every pair known but the last one, after which nothing stands yet."""
        ids = self._ids
        for at in range(max(self._indexed, 1), len(ids) - 1):
            self._later[_key(ids[at], ids[at - 1])] = at + 1
        self._indexed = max(self._indexed, len(ids) - 1)

    def _places(self) -> list[int]:
        """Places after ids like the last two; where there are none, after a rare id like the last one."""
        if len(self._ids) < 2:
            return []
        before, last = self._ids[-2:]
        key = _key(last, before)
        places = self._between(key, key + (1 << _PLACE_BITS), _PLACES)
        if key in self._later:
            places.append(self._later[key])
        if places:
            return places
        places = self._between(_key(last, 0), _key(last + 1, 0), _RARE + 1)
        return places if len(places) <= _RARE else []

    def _between(self, low: int, high: int, most: int) -> list[int]:
        first, end = np.searchsorted(self._keys, np.array([low, high])).tolist()
        return (self._keys[max(first, end - most) : end] & ((1 << _PLACE_BITS) - 1)).tolist()

    def _match(self, place: int) -> int:
        ids, end = self._ids, len(self._ids)
        length = 1  # it was found by the last one
        while length < _LONGEST and length < place and ids[place - 1 - length] == ids[end - 1 - length]:
            length += 1
        return length


def _kind(run: int) -> int:
    return min(run.bit_length(), len(_ODDS) - 1)


def _key(last: int, before: int) -> int:
    return (last << _TOKEN_BITS | before) << _PLACE_BITS


def _sorted_keys(ids: list[int]) -> NDArray[np.int64]:
    """Of each pair but the last one: its ids and the place after it, in one number, in order."""
    tokens = np.array(ids[:-1], dtype=np.int64)
    keys = (tokens[1:] << _TOKEN_BITS | tokens[:-1]) << _PLACE_BITS
    keys |= np.arange(2, len(tokens) + 1)
    keys.sort()
    return keys
