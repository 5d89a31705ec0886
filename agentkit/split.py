"""Parts of a text that is longer than a model's context, and which of them are read when not all can be."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_LINE, _BLANK = re.compile(r"\n"), re.compile(r"\s")
_SENTENCE = re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？]")
#: Places to cut at, the best first; of several alike the last is taken. A cut is at the end of the match.
_CUTS = [
    *(re.compile(rf"^(?=#{{{level}}}[ \t]+\S)", re.M) for level in range(1, 7)),  # before a heading of Markdown
    re.compile(r"\n[ \t]*\n\s*"),  # between paragraphs
    _LINE,
    _SENTENCE,
    _BLANK,
]
_HEADING = re.compile(r"^(#{1,6})[ \t]+\S", re.M)
_IMPORTANT = re.compile(r"^[ \t]*(?:(#{1,6})[ \t]+|[>*-][ \t]+)?\[IMPORTANT\]", re.M)
_PARAGRAPH = re.compile(r"\n[ \t]*\n|\Z")


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a text.

    Attributes:
        start, end: where it stands, in characters. A part begins a little before the end of the one before it.
        tokens: how many it has.
        important: something in it is marked ``[IMPORTANT]``.
        unread: why it was not read; empty if it was.
    """

    start: int
    end: int
    tokens: int
    important: bool = False
    unread: str = ""


def split(text: str, starts: Sequence[int], size: int, overlap: int, count: Callable[[str], int]) -> list[Part]:
    """Cut a text into parts that overlap.

    Each part is as long as it may be, but is rather cut in its second half where the text has a joint: before a
    heading, the higher the better, else between paragraphs, lines, sentences, words.

    Args:
        text: the text.
        starts: where each of its tokens begins, in characters.
        size: most tokens of a part.
        overlap: tokens of a part that the next one begins with, fewer where that is within a line; at most half of
            ``size``, so that the parts get on.
        count: tokens of a text.
    """
    if not 0 <= overlap <= size // 2:
        raise ValueError(f"parts of {size} tokens cannot share {overlap}")
    marked = _marked(text)
    parts: list[Part] = []
    at, fits = 0, size
    while at < len(text):
        index = bisect_left(starts, at)
        far = starts[index + fits] if index + fits < len(starts) else len(text)
        end = far if far == len(text) else _cut(text, at, max(far, at + 1))
        tokens = count(text[at:end])
        if tokens > size and end - at > 1 and fits > 1:  # cut apart, words may be written in more tokens
            fits = max(1, fits - (tokens - size))
            continue
        fits = size
        important = any(start < end and at < stop for start, stop in marked)
        parts.append(Part(at, end, tokens, important))
        if end == len(text):
            break
        at = _back(text, at, end, starts, overlap)
    return parts


def choose(parts: Sequence[Part], budget: int) -> list[Part]:
    """The same parts, with those left unread for which a budget has no room.

    The important ones are read first, then the others, both in the order of the text.

    Args:
        parts: of one text.
        budget: most tokens that are read.
    """
    chosen = list(parts)
    left = budget
    for index in sorted(range(len(parts)), key=lambda i: (not parts[i].important, i)):
        if parts[index].tokens <= left:
            left -= parts[index].tokens
        else:
            chosen[index] = replace(parts[index], unread=f"the budget of {budget} tokens was spent")
    return chosen


def _cut(text: str, at: int, far: int) -> int:
    """Where a part that begins at ``at`` and can go on to ``far`` ends best."""
    low = at + (far - at) // 2
    spare = far
    for cuts in _CUTS:
        ends = [match.end() for match in cuts.finditer(text, low, far) if at < match.end() <= far]
        if ends and not _headed(text[at : ends[-1]]):
            return ends[-1]
        if ends and spare == far:
            spare = ends[-1]
    return spare


def _headed(text: str) -> bool:
    """Whether a text ends with the line of a heading, which belongs to what follows."""
    line = text.rstrip().rpartition("\n")[2]
    return text.endswith("\n") and _HEADING.match(line) is not None


def _back(text: str, at: int, end: int, starts: Sequence[int], overlap: int) -> int:
    """Where the part behind one that spans ``at`` to ``end`` begins: at the first line, else the first sentence, of the
    overlap. Less than a sentence says nothing, so words are repeated only where a sentence was cut.
    """
    index = bisect_left(starts, end) - overlap
    low = at + 1
    if index > 0:  # a character may be several tokens, and is repeated whole or not at all
        low = max(low, starts[index] + (starts[index - 1] == starts[index]))
    whole = text[end - 1] == "\n" or _SENTENCE.search(text, max(low, end - 8), end) is not None
    for joint in (_LINE, _SENTENCE) if whole else (_LINE, _SENTENCE, _BLANK):
        for match in joint.finditer(text, low - 1, end):
            if match.end() >= low and text[match.end() : end].strip():
                return match.end()
    return end


def _marked(text: str) -> list[tuple[int, int]]:
    """The stretches that are marked: of a marked heading its section, of another line its paragraph."""
    marked: list[tuple[int, int]] = []
    headings = [(match.start(), len(match[1])) for match in _HEADING.finditer(text)]
    for match in _IMPORTANT.finditer(text):
        if match[1]:
            level = len(match[1])
            ends = (place for place, other in headings if place > match.start() and other <= level)
            end = next(ends, len(text))
        else:
            paragraph = _PARAGRAPH.search(text, match.end())
            end = paragraph.start() if paragraph else len(text)
        marked.append((match.start(), end))
    return marked
