"""From token ids back to text, one step at a time: bytes to characters, and where to stop."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agentkit.runtime.errors import AgentError
from agentkit.runtime.vocab import Vocabulary


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of ordinary text, or exactly one control token.

    Attributes:
        text: the characters; for a control token the literal it is written as.
        control: id of the control token, None for ordinary text. `<tool_call>` spelt out in ordinary
            tokens is ordinary text: only this field tells the two apart.
    """

    text: str
    control: int | None = None


class Detokenizer:
    """Incremental UTF-8 decoder over the exact bytes of each token.

    A character that is split over tokens is held back until it is whole; bytes that can never become a
    character give U+FFFD. The joined texts always equal the joined bytes decoded at once with
    ``errors="replace"``, whatever the grouping of the ids. It never sees the prompt, so nothing of the
    prompt can appear in the first piece. Memory is at most three pending bytes.
    """

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        self._control = frozenset(vocab.control.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> list[Piece]:
        """The pieces that `token` completes: none, one, or a broken tail and the control token after it."""
        return self.feed_many((token,))

    def feed_many(self, tokens: Iterable[int]) -> list[Piece]:
        """As `feed` for each id in turn, with adjacent stretches of ordinary text joined."""
        pieces: list[Piece] = []
        pending = bytearray()
        for token in tokens:
            data = self._vocab.token_bytes(token)
            if token in self._control:
                self._decode(pending, pieces, final=True)
                pending.clear()
                pieces.append(Piece(data.decode("utf-8", errors="replace"), control=token))
            else:
                pending += data
        self._decode(pending, pieces, final=False)
        return pieces

    def fork(self) -> Detokenizer:
        """A decoder in the same state."""
        other = Detokenizer(self._vocab)
        other._decoder.setstate(self._decoder.getstate())
        return other

    def flush(self) -> list[Piece]:
        """What was still held back, as U+FFFD; call it once, after the last id. Then the decoder is fresh."""
        pieces: list[Piece] = []
        self._decode(b"", pieces, final=True)
        return pieces

    def _decode(self, data: bytes | bytearray, pieces: list[Piece], *, final: bool) -> None:
        text = self._decoder.decode(bytes(data), final)
        if final:
            self._decoder.reset()
        if text:
            pieces.append(Piece(text))


@dataclass(frozen=True, slots=True)
class Screened:
    """Text that may be shown, and the stop string that ended it (None while the text goes on)."""

    text: str
    stop: str | None = None


class StopStrings:
    """Cuts a stream of text at the first stop string, which is itself not shown.

    The stop string whose last character arrives first wins; of two that end at the same character, the
    longer. The result does not depend on how the stream is cut into pushes, so a step may bring several
    tokens. Only a tail that could be the beginning of a stop string is held back, which is at most one
    character less than the longest of them.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises AgentError if a stop string is empty."""
        if "" in stops:
            raise AgentError("A stop string is empty, so it would end every text at once; remove it from the list.")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._stop: str | None = None

    def push(self, text: str) -> Screened:
        """Take the next `text`. After a stop everything is dropped and the same stop is reported again."""
        if self._stop is not None:
            return Screened("", self._stop)
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self._stop = min(found)
            self._held = ""
            return Screened(text[:at], self._stop)
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return Screened(text[: len(text) - keep])

    def fork(self) -> StopStrings:
        """A screen in the same state."""
        other = StopStrings(self._stops)
        other._held, other._stop = self._held, self._stop
        return other

    def flush(self) -> str:
        """The held tail, once the stream has ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest tail of `text` that begins a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
