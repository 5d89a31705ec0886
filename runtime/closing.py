"""The way from an unfinished output to a complete one, and when it must be taken.

No document is ever cut: when the token budget runs out, the engine stops sampling and emits a completion, a
short list of ids after which the output may end. `complete` finds one by best-first search over forks of
the matcher. What the grammar forces costs no choice; where there is one, only a few tokens are tried: those
of JSON's own punctuation inside JSON, and one token of each kind (a letter, a digit, a long word …)
elsewhere. The search knows only where in JSON it stands; what is legal it asks the matcher, so whatever it
finds is proven, and at worst it finds nothing.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentkit.runtime.errors import CapacityError

if TYPE_CHECKING:
    from agentkit.runtime.grammar import Matcher
    from agentkit.runtime.vocab import Vocabulary

#: States either way of searching may look at before it gives up (the second one more for each token allowed); about
#: 0.2 ms each.
EXPANSIONS = 2000
#: Levels of nesting that a completion may open beyond those that are open. A schema that asks for more asks for endless
#: ones: each level costs the matcher more than the one above it.
_NESTED = 64
#: States that wait to be gone on from, the best ones. Each holds a matcher, which grows with what it has taken.
_WAITING = 256

# One token's worth of JSON without content: an end, a separator and a beginning or one of the shortest values.
_PUNCTUATION = re.compile(rb' ?"?[}\]]{0,4}\n?[,:]? ?(?:""|\[\]|{}|[\[{]{0,2}"?|null|true|false|[0-9])?', re.DOTALL)
_STARTS = b'{["-0123456789tfn'
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_ENDING = (b",", b":", b"}", b"]")
_MARKS, _ENDS, _LOOK = 8, 3, 32
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


def complete(matcher: Matcher, search: Search, text: bytes, limit: int) -> list[int] | None:
    """A short list of at most `limit` ids after which `matcher` may stop, or None if none was found.

    Args:
        matcher: state of the output; left as it is.
        search: how to look.
        text: bytes of the output so far.
        limit: most ids.
    """
    return [] if matcher.can_stop() else search.run(matcher, text, limit)


@dataclass(slots=True)
class _Node:
    """A state the search has reached: the path to it, what that costs, and where in JSON it is.

    `text` is the end of what was written, from which the beginning of JSON is told; kept outside JSON only.
    """

    matcher: Matcher
    path: list[int]
    cost: float
    context: Context | None
    text: bytes = b""

    def __lt__(self, other: _Node) -> bool:
        return len(self.path) > len(other.path)  # of equals the one that has come furthest


_Heap = list[tuple[float, _Node]]


class Search:
    """Best-first search for completions under one grammar. Holds no state of an output.

    It works on two levels. The outer one chooses among punctuation and the shortest values; the inner one
    finds the nearest end of a string, a number or free text, whatever pattern or length it must have.

    Args:
        candidates: tokens to try.
        hints: about the grammar.
        words: int32 words of a mask row.
    """

    def __init__(self, candidates: Candidates, hints: Hints, words: int) -> None:
        self._candidates, self._hints, self._words = candidates, hints, words
        self._bytes = candidates.vocab.token_bytes
        self._literals = [[token] for token in hints.tokens]
        self._literals += [ids for text in hints.literals if (ids := candidates.encode(text))]
        tails = {text[at:] for text in hints.examples for at in range(len(text))}
        self._endings = sorted(map(candidates.encode, sorted(tails)), key=len)

    def run(self, matcher: Matcher, text: bytes, limit: int) -> list[int] | None:
        """A path of at most `limit` ids to a state that may stop.

        First the best of all states is gone on from, which finds a short path. Where so much has to be written that
        this loses its way among alternatives, the first choice is followed to its end.
        """
        path = self._explore(matcher, text, limit, deep=False)
        return self._explore(matcher, text, limit, deep=True) if path is None else path

    def _explore(self, matcher: Matcher, text: bytes, limit: int, deep: bool) -> list[int] | None:
        start = _Node(matcher.fork(), [], 0.0, self._hints.context(text), text)
        deepest = _NESTED + (start.context.depth if start.context is not None else 0)
        heap: _Heap = []
        seen: set[tuple[object, ...]] = set()
        self._push(heap, start, limit, deepest=deepest)
        for turn in range(EXPANSIONS + deep * limit):
            if not heap:
                return None
            if len(heap) > 2 * _WAITING:
                heap = heapq.nsmallest(_WAITING, heap)  # sorted, which is a heap
            node = heapq.heappop(heap)[1]
            if node.matcher.can_stop():
                return node.path
            row, legal = self._legal(node.matcher)
            # The mask alone does not tell an array of two items from one of three.
            key = (node.context, hash(row.tobytes()))
            if node.context is not None and key in seen:
                continue
            seen.add(key)
            for place, move in enumerate(self._moves(node, legal, limit - len(node.path))):
                child = node.matcher.fork()
                if all(map(child.advance, move)):
                    # A text that must be long, as of a format, is no reason to turn back.
                    step = self._step(node, child, move, min(len(move), 4) + len(move) / 8)
                    self._push(heap, step, limit, place / _LOOK - turn if deep else None, deepest)
        return None

    def _moves(self, node: _Node, legal: NDArray[np.bool_], limit: int) -> Iterable[Sequence[int]]:
        context = node.context
        if context is not None and not context.escape:
            marks = self._candidates.punctuation(context, legal)
            if marks:
                return [[i] for i in marks]
        return self._contents(node, limit)

    def _push(self, heap: _Heap, node: _Node, limit: int, rank: float | None = None, deepest: float = math.inf) -> None:
        """Take what is forced, then put the node in line, by rank or by merit, unless it is too long or too deep."""
        while forced := node.matcher.forced():
            if len(node.path) + len(forced) > limit or not all(map(node.matcher.advance, forced)):
                return
            node = self._step(node, node.matcher, forced, len(forced) / 4)
            if node.context is not None and node.context.depth > deepest:
                return
        if len(node.path) > limit or (node.context is not None and node.context.depth > deepest):
            return
        estimate = node.cost if rank is None else rank
        if node.context is not None and rank is None:
            # What is left open is charged, members passed are credited: else every alternative to the first
            # choice would be tried before the last is made. The credit is less than the charge for one more
            # level of nesting, so that a recursive branch loses to one that is not.
            estimate += node.context.open - 4 * node.context.passed
        heapq.heappush(heap, (estimate, node))

    def _step(self, node: _Node, matcher: Matcher, move: Sequence[int], cost: float) -> _Node:
        text = b"".join(map(self._bytes, move))
        if node.context is not None:
            context, text = node.context.after(text), b""
        else:
            text = node.text + text
            context = self._hints.context(text) if self._hints.marker else None
        return _Node(matcher, [*node.path, *move], node.cost + cost, context, text)

    def _contents(self, node: _Node, limit: int) -> list[list[int]]:
        """Short paths to where the string, number or free text that `node` stands in may end."""
        return (
            self._open(node, limit)
            or self._recite(node, limit)
            or self._fill_up(node, min(limit, 4))
            or self._spell(node, limit, 40)
            or self._fill_up(node, min(limit, 64))
            or self._spell(node, limit, 400)
            or self._fill_up(node, limit)
        )

    def _open(self, node: _Node, limit: int) -> list[list[int]]:
        """A tag that begins JSON in the middle of free text."""
        for ids in self._literals if node.context is None else ():
            inner = node.matcher.fork()
            if len(ids) <= limit and all(map(inner.advance, ids)):
                return [ids]
        return []

    def _recite(self, node: _Node, limit: int) -> list[list[int]]:
        """The shortest end that an example has from some place on."""
        for ids in self._endings:
            if len(ids) <= limit and node.matcher.validate(ids) == len(ids):
                inner = _Node(node.matcher.fork(), [], 0.0, node.context, node.text)
                if all(map(inner.matcher.advance, ids)):
                    inner = self._step(inner, inner.matcher, ids, 0)
                    if self._ends(inner, self._legal(inner.matcher)[1]):
                        return [ids]
        return []

    def _spell(self, node: _Node, limit: int, expansions: int) -> list[list[int]]:
        """Ends found byte by byte, those of different kinds first."""
        heap: _Heap = []
        seen: set[tuple[int, int]] = set()
        found: list[list[int]] = []
        self._push(heap, _Node(node.matcher.fork(), [], 0.0, node.context, node.text), limit)
        for _ in range(expansions):
            if not heap or len(found) == _ENDS:
                break
            inner = heapq.heappop(heap)[1]
            row, legal = self._legal(inner.matcher)
            if inner.path and self._ends(inner, legal):
                found.append(inner.path)
                continue
            key = (sum(len(self._bytes(i)) for i in inner.path), hash(row.tobytes()))
            if key in seen:
                continue
            seen.add(key)
            for token in self._candidates.kinds(legal):
                child = inner.matcher.fork()
                if child.advance(token):
                    again = 0.5 if token in inner.path else 0.0
                    self._push(heap, self._step(inner, child, [token], 1.0 + again), limit)
        return found

    def _fill_up(self, node: _Node, limit: int) -> list[list[int]]:
        """An end found by taking the longest legal words, as a least length wants it."""
        inner = _Node(node.matcher.fork(), [], 0.0, node.context, node.text)
        while len(inner.path) < limit:
            legal = self._legal(inner.matcher)[1]
            if inner.path and self._ends(inner, legal):
                return [inner.path]
            word = self._candidates.word(legal)
            if word is None or not inner.matcher.advance(word):
                break
            inner.path.append(word)
            if inner.context is not None:
                inner.context = inner.context.after(self._bytes(word))
        return []

    def _ends(self, node: _Node, legal: NDArray[np.bool_]) -> bool:
        """Whether the outer level can go on from here."""
        if node.matcher.can_stop():
            return True
        if node.context is None or node.context.escape:
            return False
        return bool(self._candidates.punctuation(node.context, legal))

    def _legal(self, matcher: Matcher) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        row = np.zeros(self._words, dtype=np.int32)
        matcher.fill(row)
        return row, np.unpackbits(row.view(np.uint8), bitorder="little").view(np.bool_)


_PIECE = re.compile(
    r"\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|[bBAzZ]|p\{\^?\w+\}|(?P<kind>[dDwWsS])|(?P<escaped>.))"
    r"|\[(?P<negated>\^?)(?P<members>(?:\\.|[^\]\\])(?:\\.|[^\]\\])*)\]"
    r"|(?P<open>\((?:\?(?:P?<\w+>|[a-z]*:))?)|(?P<close>\))|(?P<or>\|)|[\^$]|(?P<any>\.)|(?P<plain>[^\\])",
    re.DOTALL,
)
_COUNT = re.compile(r"(?:([*?])|(\+)|\{(\d*),?\d*\})[?+]?")
_KINDS = {"d": "0", "D": "a", "w": "a", "W": " ", "s": " ", "S": "a"}


def example(pattern: str) -> str:
    """A short text that `pattern` probably matches: first branches, first members, least repetitions.

    It understands what schemas usually hold. A wrong guess costs nothing, since the grammar is asked.
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
            group *= 0 if count[1] else 1 if count[2] else int(count[3] or 0)
        text += group
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
