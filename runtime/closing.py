"""The way from an unfinished output to a complete one, and when it must be taken.

No document is ever cut: when the token budget runs out, the engine stops sampling and emits a completion, a
short list of ids after which the output may end. `search` finds one; here is what it looks at, and `Closer`,
which knows when to take it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentkit.runtime.errors import CapacityError

if TYPE_CHECKING:
    from agentkit.runtime.grammar import Matcher
    from agentkit.runtime.vocab import Vocabulary

# One token's worth of JSON without content: an end, a separator and a beginning or one of the shortest values.
_PUNCTUATION = re.compile(rb' ?"?[}\]]{0,4}\n?[,:]? ?(?:""|\[\]|{}|[\[{]{0,2}"?|null|true|false|[0-9])?', re.DOTALL)
_STARTS = b'{["-0123456789tfn'
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_ENDING = (b",", b":", b"}", b"]")
_MARKS, _LOOK = 8, 32
_WORDS = (128, 64, 32, 16, 8, 4, 2, 1)


class Context(NamedTuple):
    """Where in a JSON text the output stands.

    Attributes:
        depth: open brackets.
        string: inside a string.
        escape: just after a backslash inside a string.
        passed: commas and colons so far: how far the search has come.
        content: bytes since the last punctuation: how far it has come inside a string or a number.
    """

    depth: int = 0
    string: bool = False
    escape: bool = False
    passed: int = 0
    content: int = 0

    @classmethod
    def of(cls, text: bytes) -> Context:
        """The context at the end of `text`, with `passed` and `content` counted from there."""
        rest = _STRING.sub(b"", text)
        outside, quote, inside = rest.partition(b'"')
        opened = sum(outside.count(c) for c in (b"{", b"["))
        closed = sum(outside.count(c) for c in (b"}", b"]"))
        odd = (len(inside) - len(inside.rstrip(b"\\"))) % 2 == 1
        return cls(opened - closed, bool(quote), bool(quote) and odd)

    def after(self, text: bytes) -> Context:
        """The context after `text`."""
        depth, string, escape, passed, content = self
        for byte in text:
            content += 1
            if string:
                if escape:
                    escape = False
                elif byte == 0x5C:
                    escape = True
                elif byte == 0x22:
                    string, content = False, 0
            elif byte == 0x22:
                string, content = True, 0
            elif byte in b"{[":
                depth, content = depth + 1, 0
            elif byte in b"}]":
                depth, content = depth - 1, 0
            elif byte in b",:":
                passed, content = passed + 1, 0
        return Context(depth, string, escape, passed, content)

    @property
    def open(self) -> int:
        """Weight of what is open and must still be closed."""
        return 6 * self.depth + 2 * self.string


@dataclass(frozen=True, slots=True)
class Hints:
    """What a search cannot see from the matcher alone.

    Attributes:
        json: the output is JSON from its first byte.
        marker: JSON begins after the last occurrence of this text; ``""`` for none.
        literals: texts worth trying as a whole in free text: a tag.
        tokens: control tokens worth trying there: a tag that is one token.
        examples: texts that match the patterns of strings, as JSON writes them.
    """

    json: bool = False
    marker: str = ""
    literals: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    examples: tuple[str, ...] = ()

    def context(self, text: bytes) -> Context | None:
        """The context at the end of `text`, None where it is not JSON."""
        if self.marker:
            _, found, after = text.rpartition(self.marker.encode())
            if found:
                return Context.of(after)
        if not self.json or (self.marker and text and text[0] not in _STARTS):  # free text before a call
            return None
        return Context.of(text)


class Candidates:
    """The tokens of one vocabulary that a search tries, best first."""

    def __init__(self, vocab: Vocabulary) -> None:
        self.vocab = vocab
        control = set(vocab.control.values())
        plain = [(i, vocab.token_bytes(i)) for i in range(vocab.size) if i not in control]
        marks = [(i, b) for i, b in plain if b and b != b"\n" and _PUNCTUATION.fullmatch(b)]
        self.marks: NDArray[np.int64] = np.array([i for i, _ in marks], dtype=np.int64)
        singles = {b[0]: i for i, b in plain if len(b) == 1}
        self._kinds = [[singles[c] for c in kind if c in singles] for kind in _kinds()]
        words: dict[tuple[int, bool], int] = {}
        for i, b in plain:
            if len(b) in _WORDS and b.isascii() and not set(b) & set(b'"\\\n\r\t'):
                words.setdefault((len(b), b.isalpha() and b.islower()), i)
        self._words = [words[key] for key in sorted(words, reverse=True)]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text."""
        return self.vocab.encode(text)

    def punctuation(self, context: Context, legal: NDArray[np.bool_]) -> list[int]:
        """Legal tokens of JSON's punctuation and its shortest values, those that close the most first.

        Inside a string only those that end it.
        """
        found: list[tuple[int, int, int]] = []
        ending = False  # whether what stands open here may end, a string or a value
        for i in self.marks[legal[self.marks]].tolist():
            text = self.vocab.token_bytes(i)
            ends = text[:1] == b'"' if context.string else text.lstrip()[:1] in _ENDING
            if ends != context.string and (context.string or context.depth == 0):
                continue
            if ends and not ending:
                ending, found = True, []
            spells = not context.string and text.lstrip()[:1] == b'"' and len(text.strip()) > 2  # "},{" in a string
            after = context.after(text)
            if ends == ending and not spells and not (after.string and after.content):
                found.append((after.open + 3 * (b"\n" in text), -len(text.strip()), i))
        found = [one for one in found if one[1]] or found  # blanks alone, where nothing else may come
        found.sort()
        return [i for _, _, i in found[: 2 if ending else _MARKS]]

    def kinds(self, legal: NDArray[np.bool_]) -> list[int]:
        """One or two legal tokens of a single byte for each kind; any legal ones if there are none."""
        chosen: list[int] = []
        for kind in self._kinds:
            fitting = [i for i in kind if legal[i]]
            chosen += fitting[:1] + fitting[1:][-1:]
        return chosen or np.flatnonzero(legal)[:_MARKS].tolist()

    def word(self, legal: NDArray[np.bool_]) -> int | None:
        """The longest legal token of ordinary text."""
        return next((i for i in self._words if legal[i]), None)


def _kinds() -> list[bytes]:
    """Bytes that patterns rarely tell apart; each mark of ASCII is a kind of its own."""
    letters, digits = bytes(range(0x61, 0x7B)), bytes(range(0x30, 0x3A))
    marks = [bytes([c]) for c in range(0x20, 0x7F) if not chr(c).isalnum()]
    return [letters, digits, letters.upper(), *marks, bytes(range(0x80, 0xC0)), bytes(range(0xC0, 0x100))]


_PIECE = re.compile(
    r"\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|[bBAzZ]|p\{\^?\w+\}|(?P<kind>[dDwWsS])|(?P<escaped>.))"
    r"|\[(?P<negated>\^?)(?P<members>(?:\\.|[^\]\\])(?:\\.|[^\]\\])*)\]"
    r"|(?P<open>\((?:\?(?:P?<\w+>|[a-z]*:))?)|(?P<close>\))|(?P<or>\|)|[\^$]|(?P<any>\.)|(?P<plain>[^\\])",
    re.DOTALL,
)
_EXAMPLE = 256
_COUNT = re.compile(r"(?:([*?])|(\+)|\{(\d*),?\d*\})[?+]?")
_KINDS = {"d": "0", "D": "a", "w": "a", "W": " ", "s": " ", "S": "a"}


def example(pattern: str) -> str:
    """A short text that `pattern` probably matches: first branches, first members, least repetitions.

    It understands what schemas usually hold. A wrong guess costs nothing, since the grammar is asked. "" where none is
    as short as 256 characters.
    """
    levels: list[tuple[str, str | None]] = []  # of each open group: the text before it, its first branch
    text, branch, at = "", None, 0
    while (piece := _PIECE.match(pattern, at)) is not None:
        at = piece.end()
        if piece["open"]:
            levels.append((text, branch))
            text, branch = "", None
            continue
        if piece["or"]:
            text, branch = "", text if branch is None else branch
            continue
        if piece["close"] and levels:
            group = text if branch is None else branch
            text, branch = levels.pop()
        else:
            group = _sample(piece)
        count = _COUNT.match(pattern, at)
        if count is not None:
            at = count.end()
            times = 0 if count[1] else 1 if count[2] else int(count[3] or 0)
            if times * len(group) > _EXAMPLE:
                return ""
            group *= times
        text += group
        if len(text) > _EXAMPLE:
            return ""
    return text if branch is None else branch


def _sample(piece: re.Match[str]) -> str:
    """One character that a piece of a pattern stands for; "" for an anchor."""
    if code := piece["x"] or piece["u"]:
        return chr(int(code, 16))
    if members := piece["members"]:
        if piece["negated"]:
            return "a"
        return _KINDS.get(members[1], members[1]) if members[0] == "\\" else members[0]
    if kind := piece["kind"]:
        return _KINDS[kind]
    return piece["escaped"] or piece["plain"] or ("a" if piece["any"] else "")


class Closer:
    """Keeps the output of one matcher completable within its budget.

    `admit` is asked before a sampled token is taken. The token is refused, and a completion given in its
    place, if afterwards no completion would fit. As every token so far was admitted, the completion from the
    state before it does fit, so an output is always complete.

    The search is spared where it can be: while far more tokens remain than the grammar could need, and as
    long as the last completion found still completes the output, which costs some microseconds to see.

    Args:
        matcher: the output's state; the caller advances it.
        reserve: tokens below which every token is looked at; see `Grammar.reserve`.
    """

    def __init__(self, matcher: Matcher, reserve: int) -> None:
        self._matcher, self._reserve = matcher, reserve
        self._plan: list[int] | None = None

    def admit(self, token: int, remaining: int) -> list[int] | None:
        """None if `token` may be taken; otherwise the ids that complete the output without it.

        Args:
            token: legal id that was sampled, not yet taken.
            remaining: ids the budget has room for, `token` included.

        Raises:
            CapacityError: nothing completes the output within `remaining`.
        """
        known = len(self._plan) if self._plan is not None else 0
        if remaining > self._reserve + 2 * known:
            return None
        after = self._matcher.fork()
        if not after.advance(token):
            raise ValueError(f"token {token} is not legal here")
        plan = self._next(after, remaining - 1) if remaining > 0 else None
        if plan is not None:
            self._plan = plan
            return None
        plan = self._next(self._matcher, remaining)
        if plan is None:
            raise CapacityError(
                f"No complete output of this grammar was found within the {remaining} tokens left. Raise max_tokens."
            )
        return plan

    def _next(self, matcher: Matcher, limit: int) -> list[int] | None:
        """A completion from the state of `matcher`: the rest of the last one if that still serves."""
        plan = self._plan or []
        for at in range(min(len(plan), _LOOK)):  # the ids before that have been taken: sampled, or forced
            rest = plan[at:]
            if len(rest) <= limit and completes(matcher, rest):
                return rest
        return matcher.completion(limit)


def completes(matcher: Matcher, ids: Sequence[int]) -> bool:
    """Whether `matcher`, which is left as it is, may stop after `ids`."""
    if matcher.validate(ids[:1]) < 1:
        return False
    fork = matcher.fork()
    return all(map(fork.advance, ids)) and fork.can_stop()
