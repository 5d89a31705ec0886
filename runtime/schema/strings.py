"""Strings: patterns, lengths and formats as llguidance enforces them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import jsonschema

from agentkit.runtime.schema.automaton import allowed, automaton, searched
from agentkit.runtime.schema.backend import takes
from agentkit.runtime.schema.backtracking import search
from agentkit.runtime.schema.kinds import Json, admits, whole, without
from agentkit.runtime.schema.lengths import anchored, closed, counted, span
from agentkit.runtime.schema.patterns import (
    REST,
    Ahead,
    Edge,
    Join,
    Node,
    Set,
    Untranslatable,
    conditions,
    joined,
    walk,
    written,
)
from agentkit.runtime.schema.report import Note

_KEYWORDS = ("minLength", "maxLength", "pattern", "format")

# A length beside a pattern makes each position a state of its own, so that no mask is found in llguidance's cache:
# 0.45 ms a token where the pattern's classes are ASCII and 1.6 ms where they are most of Unicode, against 3 µs
# without the length and 0.09 ms for a length alone, whatever its size (Qwen3's vocabulary). Up to this length the
# string is short and the bound kept; beyond, only where the classes are small.
_SHORT, _SMALL = 64, 0x400

_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = r"(([0-9]{2}(0[48]|[2468][048]|[13579][26]))|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    rf"|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
#: Formats by a pattern of ours. llguidance's own for the first three let through days that no month has, and any
#: number of digits of a second; it has none for the last.
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "idn-email": r"^[^@\s]+@[^@\s]+$",
}
# llguidance's own, each of which admits a part of what jsonschema's checker does, or what that does not check.
_ENFORCED = {"duration", "email", "ipv4", "ipv6", "uuid", "uri", "hostname"}
# Those of them that a checker may be installed for which llguidance was not compared with.
_UNPROVEN = {"duration", "uri", "hostname"}


def rewrite(part: Json, note: Note) -> Json:
    """A part whose string keywords llguidance takes."""
    if not any(key in part for key in _KEYWORDS):
        return part
    if not admits(part, "string"):
        return without(part, *_KEYWORDS)
    part = _format(whole(part, "minLength", "maxLength"), note)
    return _pattern(part, note) if isinstance(part.get("pattern"), str) else part


def _format(part: Json, note: Note) -> Json:
    """A format as llguidance's own, as a pattern, or as an annotation."""
    kind = part.get("format")
    if not isinstance(kind, str):
        return without(part, "format")
    checked = kind in jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers
    if kind in FORMATS:
        plain = without(part, "format")
        if "pattern" in plain:
            return also(plain, [FORMATS[kind]])
        return {**plain, "pattern": FORMATS[kind]}
    if kind in _ENFORCED:
        if checked and kind in _UNPROVEN:
            note("format", "verified", f"{kind!r} is enforced, but jsonschema may be stricter about it.")
        return part
    if checked:
        note("format", "verified", f"{kind!r} is no regular expression.")
    else:
        note("format", "exact", f"{kind!r} is an annotation and not enforced.")
    return without(part, "format")


def also(part: Json, patterns: Sequence[str]) -> Json:
    """A part whose strings also match `patterns`, which are written for llguidance."""
    if not patterns:
        return part
    beside = cast("list[Any]", part.get("allOf", []))
    return {**part, "allOf": [*beside, *({"pattern": pattern} for pattern in patterns)]}


def _pattern(part: Json, note: Note) -> Json:
    pattern = part["pattern"]
    try:
        patterns = translated(pattern)
    except Untranslatable as error:
        note("pattern", "verified", f"its {error} cannot be enforced while decoding.")
        return without(part, "pattern")
    return _bounded(also({**part, "pattern": patterns[0]}, patterns[1:]), pattern, note)


@lru_cache(maxsize=256)
def translated(pattern: str) -> tuple[str, ...]:
    """Patterns for llguidance all of which a string matches if it matches `pattern`.

    Raises:
        Untranslatable: there are none.
    """
    node, ahead = conditions(pattern)
    texts = tuple(allowed(condition).pattern() if condition.negated else _begun(condition) for condition in ahead)
    if texts and node == Edge(False):
        return texts
    text = written(node)
    if not takes({"type": "string", "pattern": text}):
        text = automaton(node).pattern()  # anchors in the middle
    if texts and not takes({"type": "string", "pattern": text, "allOf": [{"pattern": one} for one in texts]}):
        return (searched(pattern).pattern(),)
    return text, *texts


def _begun(condition: Ahead) -> str:
    return written(joined([Edge(False), condition.node]))


def matches(pattern: str, text: str) -> bool:
    """Whether `text` matches a pattern as jsonschema has it."""
    return search(pattern, text)


def _bounded(part: Json, pattern: str, note: Note) -> Json:
    """A pattern and lengths: those that it implies are left out, the others counted where that is cheap."""
    least, most = part.get("minLength", 0), part.get("maxLength")
    if not least and most is None:
        return part
    node, _ = conditions(pattern)
    if not anchored(node):
        return _limited(part, node, note)
    node = closed(node)
    low, high = span(node)
    if least <= low:
        part, least = without(part, "minLength"), 0
    if most is not None and high is not None and high <= most:
        part, most = without(part, "maxLength"), None
    if not least and most is None:
        return part
    if node == Join((Edge(False), REST, Edge(True))):
        return without(part, "pattern")
    folded = counted(node, least, most)
    if folded is not None:
        return _limited({**without(part, "minLength", "maxLength"), "pattern": written(folded)}, node, note, part)
    return _limited(part, node, note)


def _limited(part: Json, node: Node, note: Note, loose: Json | None = None) -> Json:
    """`part`, unless its length would cost too much: then `loose` without it."""
    loose = part if loose is None else loose
    most = loose.get("maxLength")
    small = all(sum(b - a + 1 for a, b in inner.chars) <= _SMALL for inner in walk(node) if isinstance(inner, Set))
    if most is not None and most > _SHORT and not small:
        note("maxLength", "verified", f"counting to {most:,} beside this pattern would slow decoding down.")
        return without(loose, "maxLength")
    if not takes({key: part[key] for key in ("pattern", "minLength", "maxLength", "allOf") if key in part}):
        for key in ("minLength", "maxLength"):
            if key in loose:
                note(key, "verified", "a length beside this pattern is too complex to be enforced while decoding.")
        return without(loose, "minLength", "maxLength")
    return part
