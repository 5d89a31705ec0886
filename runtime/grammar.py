"""Grammars: what an output must match, compiled once, and the state of one output against it.

llguidance (https://github.com/guidance-ai/llguidance) computes which tokens may come next: a lexer made of
derivatives of regular expressions under an Earley parser, walked along a trie of the vocabulary. This module
decides what it is given. A schema is only ever narrowed, so that every output satisfies the user's own; what
llguidance cannot enforce is refused, never ignored in silence.

llguidance is told of every control token and encodes with `Vocabulary.encode`. With its own reading of the
tokenizer, a constant such as ``"<tool_call>"`` in a schema would be forced as the control token.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial

import llguidance
import numpy as np
from numpy.typing import NDArray

from agentkit.runtime.cache import Cache
from agentkit.runtime.closing import Candidates, Hints, example
from agentkit.runtime.errors import EngineError, SchemaError
from agentkit.runtime.review import Case, Review
from agentkit.runtime.schema.backend import limits, summary
from agentkit.runtime.schema.front import Style, examples, inline
from agentkit.runtime.schema.judge import Judge
from agentkit.runtime.schema.report import SchemaReport
from agentkit.runtime.search import Search
from agentkit.runtime.spelling import Spellings
from agentkit.runtime.vocab import Vocabulary

#: Bytes of compiled grammars that are remembered, by estimate: measured were 0.25 MB, and 160 for each byte of text.
_CACHE_BYTES, _GRAMMAR_BYTES, _TEXT_FACTOR = 256 << 20, 256 << 10, 160
#: Characters of a grammar of any kind; a JSON schema has a limit of its own.
_MOST_TEXT = 1 << 20
#: Tokens of the shortest output, and seconds of CPU time that finding it may take: else the schema asks for too much.
_LONGEST_MINIMUM, _PATIENCE = 8192, 1.0
_ROOM = 64  # ids that a valid output may have beyond four times as many as the shortest one
#: Documents that are judged to find a short valid one.
_TRIES = 9


@dataclass(frozen=True, slots=True)
class JsonSpec:
    """A JSON document that satisfies a JSON schema.

    Attributes:
        schema: JSON text; the order of its keys is the order in which fields are written.
        style: ``call``: separators exactly ``", "`` and ``": "``, as chat templates write calls.
            ``document``: one space, or a new line and up to 24 blanks, wherever JSON allows white space.
    """

    schema: str
    style: Style = "document"


@dataclass(frozen=True, slots=True)
class RegexSpec:
    """A text that a regular expression matches as a whole. No look-around, no back-references."""

    pattern: str


@dataclass(frozen=True, slots=True)
class ChoiceSpec:
    """One of several texts."""

    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """A JSON value inside an output that is validated once it is complete, and decoded again where it fails.

    Attributes:
        schema: JSON text of the schema it must satisfy.
        header: text that stands right before the value; ``""`` for a value that the output begins with.
        control: control token that the header follows; None for a header anywhere in the text.
    """

    schema: str
    header: str = ""
    control: int | None = None


@dataclass(frozen=True, slots=True)
class LarkSpec:
    """A grammar in llguidance's dialect of Lark.

    Attributes:
        text: the grammar.
        control: control tokens that it names (``<[151657]>``); all others are never legal.
        hints: for completing an output.
        reports: on the schemas inside it, each with a word on what it is for.
        judged: the values of which it admits more than their schemas do.
    """

    text: str
    control: frozenset[int] = frozenset()
    hints: Hints = field(default_factory=Hints)
    reports: tuple[tuple[str, SchemaReport], ...] = ()
    judged: tuple[Judged, ...] = ()


GrammarSpec = JsonSpec | RegexSpec | ChoiceSpec | LarkSpec


class Grammar:
    """A compiled grammar. Immutable and shared.

    Attributes:
        key: identity of vocabulary and spec.
        reports: on the schemas inside it, each with a word on what it is for; ``""`` where it is the whole output.
        minimum: tokens of a short complete output, of about the least that a request must allow. Where values are
            judged, of one that is valid too, if a few tries have found one.
        reserve: budget left below which `Closer` looks at every token.
    """

    def __init__(
        self,
        key: str,
        root: llguidance.LLMatcher,
        tables: _Tables,
        hints: Hints,
        reports: Sequence[tuple[str, SchemaReport]],
        reviewing: Callable[[], Review] | None,
        size: int,
    ) -> None:
        self.key, self.reports = key, tuple(reports)
        self._root, self._tables = root, tables
        self._reviewing = reviewing
        self._search = Search(tables.candidates, hints, tables.words)
        # What is open at any time can hardly need more tokens than the whole schema has.
        self.reserve = min(max(128, size // 3), 2048)
        shortest = self.matcher().completion(_LONGEST_MINIMUM, _PATIENCE)
        if shortest is None:
            raise SchemaError(
                "No output satisfies this grammar, or only one that is too long. Look for limits that "
                "contradict each other (required properties, patterns with lengths), and for large minima."
            )
        # At least what a completion from the beginning takes: the search may find the valid one behind bans only.
        self.minimum = max(len(shortest), len(self._valid(4 * len(shortest) + _ROOM) or ()))

    def matcher(self) -> Matcher:
        """State of a new output."""
        return Matcher(self._root, self._root.deep_copy(), self._tables, self._search)

    def review(self) -> Review | None:
        """The judge of a new output; None where the grammar alone makes it valid."""
        return self._reviewing() if self._reviewing is not None else None

    def _valid(self, limit: int) -> list[int] | None:
        """An output of at most `limit` ids whose judged values are valid, if a few tries find one."""
        review, matcher = self.review(), self.matcher()
        if review is None:
            return None
        until = time.thread_time() + _PATIENCE
        for _ in range(_TRIES):
            rest = matcher.completion(limit - len(matcher.ids), until - time.thread_time())
            if rest is None or not all(map(matcher.advance, rest)):
                return None
            if review.hear(rest, ended=True):
                return list(matcher.ids)
            if not review.back(matcher, limit, 0):
                return None
        return None


@dataclass(frozen=True, eq=False)
class _Tables:
    """What all matchers of one vocabulary and one set of control tokens share.

    Attributes:
        words: int32 words of a mask row.
        allowed: int32 ``[words]``, ids that any output may hold: no padding, no unnamed control token.
        ends: int32 ``[words]``, the end ids.
    """

    vocab: Vocabulary
    candidates: Candidates
    words: int
    allowed: NDArray[np.int32]
    ends: NDArray[np.int32]


class Matcher:
    """State of one output. Not thread-safe, except that `fill` may run beside nothing else of the same matcher.

    An end id is legal wherever the output may stop; after it nothing is. What is banned at a place is illegal there, as
    if the grammar excluded it.
    """

    __slots__ = ("_bans", "_ended", "_ids", "_llm", "_root", "_search", "_tables")

    def __init__(self, root: llguidance.LLMatcher, llm: llguidance.LLMatcher, tables: _Tables, search: Search) -> None:
        self._root, self._llm, self._tables, self._search = root, llm, tables, search
        self._ids: list[int] = []  # the journal
        self._bans: dict[int, NDArray[np.int32]] = {}  # by how many ids come before; never of what is in the journal
        self._ended = False

    @property
    def ids(self) -> Sequence[int]:
        """All ids so far."""
        return self._ids

    def fill(self, row: NDArray[np.int32]) -> None:
        """Write the legal next ids into `row`, int32 ``[ceil(vocab_size / 32)]``: bit i % 32 of word i // 32.

        Raises:
            SchemaError: the grammar became too complex to go on with.
        """
        tables = self._tables
        if row.shape != (tables.words,) or row.dtype != np.int32 or not row.flags.c_contiguous:
            raise ValueError(f"a mask row is contiguous int32 [{tables.words}], not {row.dtype} {row.shape}")
        row[:] = 0
        if self._ended:
            return
        used = 4 * -(-tables.vocab.size // 32)
        self._llm.unsafe_compute_mask_ptr(row.ctypes.data, used)
        self._require_sound()
        row &= tables.allowed
        if self._llm.is_accepting():
            row |= tables.ends
        banned = self._bans.get(len(self._ids))
        if banned is not None:
            row &= ~banned

    def ban(self, tokens: Iterable[int]) -> bool:
        """Exclude ids from coming next, beside those already excluded here; False if nothing is legal then.

        It lasts for this place only, and until a `rollback` to a place before it.
        """
        at = len(self._ids)
        row = _row(tokens, self._tables.words)
        self._bans[at] = row | self._bans[at] if at in self._bans else row
        legal = np.zeros_like(row)
        self.fill(legal)
        return bool(legal.any())

    def _banned(self, at: int, token: int) -> bool:
        row = self._bans.get(at)
        return row is not None and bool(row[token >> 5] >> (token & 31) & 1)

    def advance(self, token: int) -> bool:
        """Take `token`; False, and nothing is changed, if it is not legal."""
        if self._ended or not 0 <= token < self._tables.vocab.size or self._banned(len(self._ids), token):
            return False
        if token in self._tables.vocab.end_ids:
            self._ended = self._llm.is_accepting()
            legal = self._ended
        else:
            legal = self._llm.try_consume_tokens([token]) == 1
        if legal:
            self._ids.append(token)
        return legal

    def validate(self, draft: Sequence[int]) -> int:
        """How many leading ids of `draft` are legal one after the other. Nothing is changed."""
        if self._ended:
            return 0
        vocab = self._tables.vocab
        if draft and 0 <= draft[0] < vocab.size and self._banned(len(self._ids), draft[0]):
            return 0
        plain = next((i for i, t in enumerate(draft) if t in vocab.end_ids or not 0 <= t < vocab.size), len(draft))
        legal = self._llm.validate_tokens(list(draft[:plain])) if plain else 0
        if legal == plain < len(draft) and draft[plain] in vocab.end_ids:
            fork = self.fork()
            legal += all(map(fork.advance, draft[: plain + 1]))
        return legal

    def rollback(self, n: int) -> None:
        """Undo the last `n` ids, forced ones and an end id included, and with them what they led to: a grammar that
        became too complex there is sound again.

        Raises:
            ValueError: fewer have been taken.
        """
        if not 0 <= n <= len(self._ids):
            raise ValueError(f"cannot undo {n} of {len(self._ids)} ids")
        plain = n - (self._ended and n > 0)
        self._ended &= n == 0
        del self._ids[len(self._ids) - n :]
        if self._bans:
            self._bans = {at: row for at, row in self._bans.items() if at <= len(self._ids)}
        if self._llm.is_error():  # llguidance goes nowhere from an error: begin anew
            self._llm = self._root.deep_copy()
            sound = self._llm.try_consume_tokens(self._ids) == len(self._ids)
        else:
            sound = plain == 0 or self._llm.rollback(plain)
        if not sound:
            raise EngineError(f"The grammar could not be rolled back: {self._llm.get_error()}")

    def forced(self) -> list[int]:
        """Ids that must come next, as `Vocabulary.encode` would write them; [] where there is a choice."""
        if self._ended or self._llm.is_stopped():
            return []
        ids = self._llm.compute_ff_tokens()
        # Text that the vocabulary writes otherwise than the grammar wants it (normalised) is not forced.
        return ids[: self.validate(ids)] if ids else []

    def can_stop(self) -> bool:
        """Whether the output so far is complete."""
        return self._ended or self._llm.is_accepting()

    def finished(self) -> bool:
        """Whether the output is complete and nothing may follow."""
        return self._ended or (self._llm.is_stopped() and self._llm.is_accepting())

    def fork(self) -> Matcher:
        """An independent copy."""
        fork = Matcher(self._root, self._llm.deep_copy(), self._tables, self._search)
        fork._ids, fork._bans, fork._ended = self._ids.copy(), self._bans.copy(), self._ended
        return fork

    def completion(self, limit: int, seconds: float = math.inf) -> list[int] | None:
        """A short list of at most `limit` ids after which the output may stop; None if none was found.

        Args:
            seconds: of CPU time that finding it may take.
        """
        text = b"".join(map(self._tables.vocab.token_bytes, self._ids))
        return self._search.run(self, text, limit, seconds)

    def _require_sound(self) -> None:
        if self._llm.is_error():
            raise SchemaError(
                f"The grammar became too complex ({summary(self._llm.get_error())}). Simplify its patterns."
            )


class GrammarCompiler:
    """Compiles grammars for one vocabulary on a thread of its own, and remembers the last 256 MB of them.

    Args:
        vocab: the tokens.
        vocab_size: width of the model's logits, at least ``vocab.size``.
    """

    def __init__(self, vocab: Vocabulary, vocab_size: int) -> None:
        if vocab_size < vocab.size:
            raise ValueError(f"vocab_size {vocab_size} is less than the tokenizer's {vocab.size} ids")
        self._vocab, self._vocab_size = vocab, vocab_size
        self._cache: Cache[Future[Grammar]] = Cache(_CACHE_BYTES)
        self._lock = threading.RLock()  # a future that is already done calls `_forget` inside `submit`
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="agentkit-grammar")

    def submit(self, spec: GrammarSpec) -> Future[Grammar]:
        """The grammar of `spec`, shared with whoever asks for the same; its future may raise `SchemaError`.

        Raises:
            EngineError: the compiler is closed.
        """
        text = repr(spec)
        key = hashlib.sha256(f"{self._vocab.digest}\0{text}".encode()).hexdigest()
        with self._lock:
            future = self._cache.get(key)
            if future is None or future.cancelled():
                try:
                    future = self._thread.submit(self._compile, key, spec)
                except RuntimeError:
                    raise EngineError("The engine is closed. Open a new one.") from None
                self._cache.put(key, future, _GRAMMAR_BYTES + _TEXT_FACTOR * len(text))
                future.add_done_callback(lambda done: self._forget(key, done))
        return future

    def close(self) -> None:
        """Stop the thread; grammars not yet begun are cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _forget(self, key: str, done: Future[Grammar]) -> None:
        """Do not remember failures: the next request is told of it by its own compilation."""
        if done.cancelled() or done.exception() is not None:
            with self._lock:
                self._cache.drop(key)

    def _compile(self, key: str, spec: GrammarSpec) -> Grammar:
        hints, control, size = Hints(), frozenset[int](), len(repr(spec))
        reports, judged = tuple[tuple[str, SchemaReport], ...](), tuple[Judged, ...]()
        if not isinstance(spec, JsonSpec) and size > _MOST_TEXT:
            raise SchemaError(f"The grammar has {size:,} characters; the limit is {_MOST_TEXT:,}. Use a smaller one.")
        match spec:
            case JsonSpec(text, style):
                front = inline(text, style)
                judged = (Judged(text),) if front.report.status == "verified" else ()
                written = json.dumps(front.schema)
                root = self._root(llguidance.LLMatcher.grammar_from_json_schema(written))
                reports = (("", front.report),)
                hints = Hints(json=True, examples=examples(written))
            case RegexSpec(pattern):
                root = self._root(llguidance.LLMatcher.grammar_from_regex(pattern))
                hints = Hints(examples=tuple(filter(None, [example(pattern)])))
            case ChoiceSpec(options):
                if not options or "" in options:
                    raise SchemaError("A choice needs at least one option and no empty text. Remove the empty one.")
                alternatives = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
                lark = f"start: OPTION\nOPTION: {alternatives}"
                root = self._root(llguidance.LLMatcher.grammar_from_lark(lark))
                hints = Hints(examples=options)
            case LarkSpec(text, control, hints, reports, judged):
                root = self._root(llguidance.LLMatcher.grammar_from_lark(text))
        reviewing = None
        if judged:
            cases = [Case(value.header.encode(), value.control, Judge(value.schema)) for value in judged]
            reviewing = partial(Review, cases, self._vocab, self._spellings)
        return Grammar(key, root, self._tables(control), hints, reports, reviewing, size)

    def _root(self, grammar: str) -> llguidance.LLMatcher:
        root = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits())
        if root.is_error():
            raise SchemaError(f"This grammar cannot be compiled: {summary(root.get_error())}. Change that part.")
        return root

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        # Only used on the compiler's own thread.
        wrapper = llguidance.TokenizerWrapper(_Tokens(self._vocab))
        return llguidance.LLTokenizer(wrapper, eos_token=self._vocab.end_id)

    @cached_property
    def _candidates(self) -> Candidates:
        return Candidates(self._vocab)

    @cached_property
    def _spellings(self) -> Spellings:
        return Spellings(self._vocab)

    def _tables(self, control: frozenset[int]) -> _Tables:
        vocab, words = self._vocab, -(-self._vocab_size // 32)
        return _Tables(
            vocab,
            self._candidates,
            words,
            self._text | _row(control - vocab.end_ids, words),
            _row(vocab.end_ids, words),
        )

    @cached_property
    def _text(self) -> NDArray[np.int32]:
        """Row of the ids of ordinary text."""
        words = -(-self._vocab_size // 32)
        unwanted = _row({*self._vocab.control.values(), *self._vocab.end_ids}, words)
        return _row(range(self._vocab.size), words) & ~unwanted


class _Tokens:
    """The vocabulary in the form that llguidance asks for."""

    bos_token_id = None

    def __init__(self, vocab: Vocabulary) -> None:
        self.eos_token_id = vocab.end_id
        self.tokens = [vocab.token_bytes(i) for i in range(vocab.size)]
        self.special_token_ids = sorted(vocab.control.values())
        self._encode = vocab.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _row(ids: Iterable[int], words: int) -> NDArray[np.int32]:
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[sorted(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
