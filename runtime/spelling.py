"""Which tokens go along with a text: what must be left out if an output is not to be that text again."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator

from agentkit.runtime.vocab import Vocabulary

_BLANKS = b" \t\n\r"
_BLANK_OUTSIDE = re.compile(rb'("(?:[^"\\]|\\.)*"?)|[ \t\n\r]+', re.DOTALL)


class Spellings:
    """The tokens of a vocabulary in the order of their bytes.

    Args:
        vocab: control tokens among them are left out: they are no text.
    """

    def __init__(self, vocab: Vocabulary) -> None:
        control = set(vocab.control.values())
        tokens = [(vocab.token_bytes(i), i) for i in range(vocab.size) if i not in control]
        self._plain = _Index(tokens)
        self._blank = _Index([(_compact(text), i) for text, i in tokens if any(byte in _BLANKS for byte in text)])

    def along(self, text: bytes, string: bool) -> list[int]:
        """The tokens that begin `text`, are it, or begin with it: all ways to write on towards it.

        Args:
            text: JSON from some place on, not empty.
            string: that place is inside a string. Outside of strings white space makes no other document, so it is
                looked through, and a token of nothing else goes along with every text.
        """
        if string:
            return list(self._plain.along(text))
        text = _compact(text)
        return [*self._plain.along(text), *self._blank.along(text)]


class _Index:
    def __init__(self, tokens: list[tuple[bytes, int]]) -> None:
        tokens.sort()
        self._texts, self._ids = [text for text, _ in tokens], [i for _, i in tokens]
        self._longest = max(map(len, self._texts), default=0)

    def along(self, text: bytes) -> Iterator[int]:
        for size in range(min(len(text), self._longest + 1)):
            at = bisect_left(self._texts, text[:size])
            while at < len(self._texts) and self._texts[at] == text[:size]:
                yield self._ids[at]
                at += 1
        at = bisect_left(self._texts, text)
        while at < len(self._texts) and self._texts[at].startswith(text):
            yield self._ids[at]
            at += 1


def _compact(text: bytes) -> bytes:
    """JSON text without white space outside of its strings."""
    return _BLANK_OUTSIDE.sub(lambda piece: piece[1] or b"", text)
