"""Sets of characters, as sorted and disjoint intervals of code points, and how they are written for llguidance.

Two dialects read a schema's pattern: jsonschema takes it to Python's `re`, where ``\\d``, ``\\w`` and ``\\s`` mean the
whole of Unicode; JSON Schema recommends ECMA 262, where they mean ASCII and a few blanks. A class is taken
``narrow``, what both dialects admit, where admitting less is safe, and ``wide``, what either does, where the
class is negated.
"""

from __future__ import annotations

import re
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

Chars = tuple[tuple[int, int], ...]

LAST = 0x10FFFF
# No character: JSON text is UTF-8, which cannot hold them.
_SURROGATES = (0xD800, 0xDFFF)
# A pattern has few sets and meets them often, ``\w`` of all of Unicode with its hundreds of intervals above all.
_KEPT = 512


def union(*sets: Iterable[tuple[int, int]]) -> Chars:
    """Characters in any of `sets`."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(interval for one in sets for interval in one):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


@lru_cache(_KEPT)
def complement(chars: Chars) -> Chars:
    """All other characters, without surrogates."""
    found: list[tuple[int, int]] = []
    at = 0
    for low, high in union(chars, [_SURROGATES]):
        if at < low:
            found.append((at, low - 1))
        at = high + 1
    if at <= LAST:
        found.append((at, LAST))
    return tuple(found)


@lru_cache(_KEPT)
def intersection(one: Chars, other: Chars) -> Chars:
    """Characters in both."""
    return complement(union(complement(one), complement(other)))


ANY: Chars = complement(())
_CONTROL: Chars = ((0x00, 0x07), (0x0B, 0x0B), (0x0E, 0x1F))  # those that JSON escapes by number only
_SEPARATOR: Chars = ((0x1F, 0x1F),)  # the control character missed least
_ESCAPED: Chars = ((0x22, 0x22), (0x5C, 0x5C))
DIGITS: Chars = ((0x30, 0x39),)
_WORD: Chars = union(DIGITS, [(0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_ECMA_BLANKS = "\ufeff"
_PYTHON_BLANKS = "\x1c\x1d\x1e\x1f\x85"


def category(letter: str, wide: bool) -> Chars:
    """The class ``\\d``, ``\\w`` or ``\\s``."""
    if not wide:
        if letter == "s":
            both = complement(union((ord(c), ord(c)) for c in _PYTHON_BLANKS))
            return intersection(_python(letter), both)
        return DIGITS if letter == "d" else _WORD
    ecma = [(ord(c), ord(c)) for c in _ECMA_BLANKS] if letter == "s" else []
    return union(_python(letter), ecma)


@lru_cache(maxsize=3)
def _python(letter: str) -> Chars:
    """What Python's `re` takes for a class, by asking it; about 15 ms. Unicode has no letters beyond plane 3."""
    codes = [*range(_SURROGATES[0]), *range(_SURROGATES[1] + 1, 0x40000)]
    text = array("I", codes).tobytes().decode(f"utf-32-{sys.byteorder[0]}e")
    return tuple((ord(run[0][0]), ord(run[0][-1])) for run in re.finditer(rf"\{letter}+", text))


def holds(chars: Chars, code: int) -> bool:
    """Whether a character is in a set."""
    at = bisect_right(chars, (code, LAST))
    return at > 0 and code <= chars[at - 1][1]


def told_apart(sets: Iterable[Chars]) -> tuple[Chars, ...]:
    """The coarsest classes of characters, each of which is inside or outside of every one of `sets`."""
    distinct = list(dict.fromkeys(sets))
    cuts = sorted({cut for chars in (ANY, *distinct) for low, high in chars for cut in (low, high + 1)})
    classes: dict[tuple[bool, ...], list[tuple[int, int]]] = {}
    for low, after in pairwise(cuts):
        if holds(ANY, low):
            classes.setdefault(tuple(holds(chars, low) for chars in distinct), []).append((low, after - 1))
    return tuple(union(intervals) for intervals in classes.values())


@lru_cache(_KEPT)
def spelled(chars: Chars) -> str:
    """`chars`, not empty, in a syntax that Python and Rust share."""
    if chars == ANY:
        return "(?s:.)"
    others = complement(chars)
    if not intersection(others, _CONTROL) and intersection(others, _ESCAPED):
        # llguidance takes a class with all of these for one with every escape, the quote's included.
        chars = intersection(chars, complement(_SEPARATOR))
    if len(chars) == 1 and chars[0][0] == chars[0][1]:
        return _character(chars[0][0])
    others = complement(chars)
    if len(others) < len(chars):
        return f"[^{''.join(map(_interval, others))}]"
    return f"[{''.join(map(_interval, chars))}]"


def _interval(interval: tuple[int, int]) -> str:
    low, high = interval
    if low == high:
        return _character(low)
    return f"{_character(low)}{'-' if high > low + 1 else ''}{_character(high)}"


def _character(code: int) -> str:
    """A character as both Python and Rust read it."""
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
