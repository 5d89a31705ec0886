"""Validate and back up: JSON values that the grammar alone does not make valid are judged while they are decoded.

Where the grammar admits more than a schema, a value is held back until it is complete and jsonschema has found it
valid, so nothing that has been handed out is ever taken back. If it fails, the output goes back to a decision of the
failing value, everything that leads to the same text again is excluded there, and decoding goes on. What is excluded
lives in the matcher (`Matcher.ban`), so masks, drafts, forced ids and completions all keep to it.

Which decision: of a string the first one inside it, since another string is wanted and not a longer one; of a number
the last one; if that has not helped, at the other end. Of an object or an array the last one about its own members, as
what fails is often only that it has too few or one of the wrong name. If the same value has failed three times, the
decisions before it, the nearest first.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from agentkit.runtime.closing import Context
from agentkit.runtime.errors import DocumentError
from agentkit.runtime.schema.judge import Fault, Judge

if TYPE_CHECKING:
    from agentkit.runtime.grammar import Matcher
    from agentkit.runtime.request import Chunk, Usage
    from agentkit.runtime.spelling import Spellings
    from agentkit.runtime.vocab import Vocabulary

#: How often a document is decoded again, in part, before it is given up: without getting further, and in all.
_ATTEMPTS, _MOST_ATTEMPTS = 8, 32
#: After so many failures of the same value what stands before it is decoded otherwise.
_PATIENCE = 3

_STARTS = b'{["-0123456789tfn'
_SCALAR_ENDS = b",]} \t\n\r"
_BLANKS = b" \t\n\r"


class Case(NamedTuple):
    """A value to be judged; see `agentkit.runtime.grammar.Judged`."""

    header: bytes
    control: int | None
    judge: Judge


@dataclass(slots=True)
class _Before:
    """What stands before the next value: text since the last control token, value or beginning of the output."""

    text: bytes = b""
    control: int | None = None
    first: bool = True  # nothing but white space has come so far


@dataclass(slots=True)
class _Value:
    """A judged value whose first byte has come.

    Attributes:
        case: what judges it.
        first: index of the id that holds its first byte.
        offset: of that byte in the id's bytes.
        before: what stood before that id.
        text: the value so far, once it is complete the whole of it.
    """

    case: Case
    first: int
    offset: int
    before: _Before
    text: bytearray = field(default_factory=bytearray)
    _depth: int = 0
    _string: bool = False
    _escape: bool = False

    @property
    def scalar(self) -> bool:
        """Whether only what comes after it shows that it is complete."""
        return self.text[0] not in b'{["'

    def extend(self, data: bytes) -> bytes | None:
        """Take more bytes; those behind the end of the value, None while it goes on."""
        for at, byte in enumerate(data):
            if self.text and self.scalar and byte in _SCALAR_ENDS:
                return data[at:]
            self.text.append(byte)
            if self._closes(byte):
                return data[at + 1 :]
        return None

    def _closes(self, byte: int) -> bool:
        if self._string:
            if self._escape:
                self._escape = False
            elif byte == 0x5C:
                self._escape = True
            elif byte == 0x22:
                self._string = False
                return self._depth == 0
        elif byte == 0x22:
            self._string = True
        elif byte in b"{[":
            self._depth += 1
        elif byte in b"}]":
            self._depth -= 1
            return self._depth == 0
        return False


class Review:
    """Judges the values of one output, and holds back what belongs to one that is not complete.

    Args:
        cases: what is judged.
        vocab: the tokens.
        spellings: of the same vocabulary.
    """

    def __init__(self, cases: Sequence[Case], vocab: Vocabulary, spellings: Spellings) -> None:
        self._cases, self._vocab, self._spellings = cases, vocab, spellings
        self._control = frozenset(vocab.control.values()) | vocab.end_ids
        self._longest = max(len(case.header) for case in cases)
        self._taken = 0  # ids heard
        self._before = _Before()
        self._value: _Value | None = None
        self._fault: Fault | None = None
        self._attempts = self._all_attempts = 0  # without getting further than `_furthest`, and in all
        self._furthest = -1  # the last byte of the judged value at which a failing value has begun
        self._failures: Counter[int] = Counter()  # by the byte of the judged value at which a failing value begins
        self._held: list[tuple[int, Chunk]] = []  # with the index of the first id of each

    def fork(self) -> Review:
        """An independent copy, which holds the same chunks."""
        fork = copy(self)
        fork._before, fork._held, fork._failures = copy(self._before), self._held.copy(), self._failures.copy()
        fork._value = copy(self._value)
        if fork._value is not None:
            fork._value.text = fork._value.text.copy()
        return fork

    # --- what has come

    def hear(self, ids: Iterable[int], ended: bool) -> bool:
        """Take ids in; False if a value is complete and fails, and then the output must go `back`.

        Args:
            ids: the next of the output.
            ended: the output ends with them. Of a value that a stop text has cut nothing is judged.
        """
        for token in ids:
            self._take(token)
            self._taken += 1
            if self._fault is not None:
                return False
        if ended and self._value is not None and self._value.scalar:
            self._judge()
        return self._fault is None

    def hold(self, chunk: Chunk) -> None:
        """Keep a chunk until `release`; to be called before its ids are heard."""
        self._held.append((self._taken, chunk))

    def release(self, ended: bool) -> list[Chunk]:
        """The chunks that end before a value that is not yet judged; all if the output has ended."""
        first = None if ended or self._value is None else self._value.first
        ready = [chunk for start, chunk in self._held if first is None or start + len(chunk.ids) <= first]
        del self._held[: len(ready)]
        return ready

    @property
    def counts(self) -> tuple[int, int]:
        """How many ids are held back: those that were chosen, and those that were not."""
        chosen = sum(not chunk.closing for _, chunk in self._held)
        return chosen, sum(len(chunk.ids) for _, chunk in self._held) - chosen

    def _take(self, token: int) -> None:
        if token in self._control:
            if self._value is not None and self._value.scalar:
                self._judge()
            if self._value is None:
                self._before = _Before(control=token, first=False)
            return
        data = self._vocab.token_bytes(token)
        if self._value is None:
            before = copy(self._before)
            self._before.text += data
            rest = self._begin(before, len(data))
        else:
            rest = self._value.extend(data)
        if rest is not None:  # the value is complete
            self._judge()
            self._before.text = rest

    def _begin(self, before: _Before, size: int) -> bytes | None:
        """Begin a value if its first byte is among the last ``size``; returns what `_Value.extend` does."""
        found = next(((case, at) for case in self._cases if (at := self._first(case)) is not None), None)
        if found is None:
            text = self._before.text
            self._before.first &= not text.strip(_BLANKS)
            if len(text) > self._longest:  # no header begins that far back
                self._before.control = None
                self._before.text = text[len(text) - self._longest :]
            return None
        case, at = found
        text = self._before.text[at:]
        self._value = _Value(case, self._taken, size - len(text), before)
        return self._value.extend(text)

    def _first(self, case: Case) -> int | None:
        """Where in the text the first byte of a value stands."""
        text = self._before.text
        if case.control is not None:
            at = len(case.header) if self._before.control == case.control and text.startswith(case.header) else -1
        elif case.header:
            at = text.rfind(case.header)
            at += len(case.header) if at >= 0 else 0
        else:
            at = 0 if self._before.first else -1
        if at < 0:
            return None
        rest = text[at:].lstrip(_BLANKS)
        return len(text) - len(rest) if rest and rest[0] in _STARTS else None

    def _judge(self) -> None:
        assert self._value is not None
        self._fault = self._value.case.judge.fault(self._value.text.decode("utf-8", "replace"))
        if self._fault is None:
            self._value, self._before = None, _Before(first=False)
            self._attempts, self._all_attempts, self._furthest = 0, 0, -1
            self._failures.clear()

    # --- the way back

    def back(self, matcher: Matcher, left: int, reserve: int) -> bool:
        """Take the output back to the decision that is to be made otherwise, and exclude what it was.

        Args:
            matcher: state of the output, which has taken all that was heard; it is rolled back.
            left: ids the budget has room for.
            reserve: where less is left, a completion is looked for before a decision is chosen.

        Returns:
            False, and nothing is changed, if no other decision is possible, or enough have been tried.
        """
        value, fault = self._value, self._fault
        assert value is not None
        assert fault is not None
        path = _Path(value, fault, matcher.ids[value.first :], self._vocab)
        start = path.span[0]
        failures = self._failures[start]
        places = [path.own(again=failures % 2 == 1), path.before]
        if fault.excess or failures >= _PATIENCE:
            places.reverse()
        if start > self._furthest:
            self._attempts, self._furthest = 0, start
        if self._attempts == _ATTEMPTS or self._all_attempts == _MOST_ATTEMPTS:
            return False
        for place in itertools.chain(*places):
            at, text, string = value.first + place, path.text(place), path.strings[place]
            if self._exclude(matcher, at, self._spellings.along(text, string), left, reserve):
                self._attempts += 1
                self._all_attempts += 1
                self._failures[start] += 1
                reached = path.starts[place + 1]
                self._failures = Counter[int]({key: n for key, n in self._failures.items() if key < reached})
                self._return(value, matcher.ids)
                return True
        return False

    def error(self, usage: Usage) -> DocumentError:
        """For the caller, when there is no way `back`."""
        assert self._value is not None
        assert self._fault is not None
        return DocumentError(
            f"The output does not satisfy its schema, at {self._fault}. {self._all_attempts} other ways to write it "
            "have been tried. Simplify that part of the schema, or ask in other words.",
            self._fault.pointer,
            not self._value.case.header,
            tuple(token for _, chunk in self._held for token in chunk.ids),
            usage,
        )

    def _exclude(self, matcher: Matcher, at: int, banned: list[int], left: int, reserve: int) -> bool:
        """Go back to an index of the output and ban ids there, unless nothing else is possible."""
        count = len(matcher.ids) - at
        trial = matcher.fork()
        trial.rollback(count)
        if not trial.ban(banned):
            return False
        if left + count <= reserve and trial.completion(left + count) is None:
            return False
        matcher.rollback(count)
        matcher.ban(banned)
        return True

    def _return(self, value: _Value, ids: Sequence[int]) -> None:
        """Be in the state that `ids` lead to, which end in `value` or right before its first id."""
        size = len(ids)
        held = [(start, chunk) for start, chunk in self._held if start < size]
        self._held = [(start, chunk._replace(ids=chunk.ids[: size - start])) for start, chunk in held]
        self._fault, self._value, self._before = None, None, copy(value.before)
        self._taken = value.first
        self.hear(ids[value.first :], ended=False)


class _Path:
    """The failing value in the ids of the judged one. Places are indices of ids from the first one on.

    Attributes:
        starts: for each place, and the end, the byte of the judged value at which it begins; below 0 in what stands
            before.
        strings: for each place whether it begins inside a string.
        span: as of the fault, in bytes.
    """

    def __init__(self, value: _Value, fault: Fault, ids: Sequence[int], vocab: Vocabulary) -> None:
        self._bytes = [vocab.token_bytes(token) for token in ids]
        document = value.text.decode("utf-8", "replace")
        self.span, *self._members = [
            (len(document[:s].encode()), len(document[:e].encode())) for s, e in (fault.span, *fault.members)
        ]
        self.starts, self.strings, context, at = list[int](), list[bool](), Context(), -value.offset
        for data in self._bytes:
            self.starts.append(at)
            self.strings.append(context.string)
            context = context.after(data[max(0, -at) :])
            at += len(data)
        self.starts.append(at)
        self._opening = value.text[self.span[0]]

    def text(self, place: int) -> bytes:
        """What stands from a place to the end of the failing value."""
        return b"".join(self._bytes[place:])[: self.span[1] - self.starts[place]]

    def own(self, again: bool) -> list[int]:
        """The places of the failing value, in the order in which they are tried.

        Args:
            again: what came first in another order has just been tried.
        """
        start, end = self.span
        places = [at for at, (s, e) in enumerate(pairwise(self.starts)) if s < end and e > start]
        if self._opening == 0x22:
            inside = [place for place in places if self.starts[place] > start]
            return (inside[::-1] if again else inside) + places[:1]
        if self._opening in b"{[":
            places.reverse()
            return sorted(places, key=self._inner)
        return places if again else places[::-1]

    @property
    def before(self) -> list[int]:
        """The places before the failing value, the nearest first."""
        return [at for at in range(len(self._bytes) - 1, -1, -1) if self.starts[at + 1] <= self.span[0]]

    def _inner(self, place: int) -> bool:
        """Whether what is decided there is no matter of the failing value itself, but of one that it consists of: which
        items an array has is its own matter, of an object which keys."""
        at, array = self.starts[place], self._opening == 0x5B
        return any(start + array <= at < end for start, end in self._members)
