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
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast

import jsonschema
import llguidance
import numpy as np
from agentkit.runtime.closing import Candidates, Hints, Search, complete, example
from agentkit.runtime.errors import EngineError, SchemaError
from agentkit.runtime.vocab import Vocabulary
from jsonschema.validators import validator_for
from numpy.typing import NDArray

Style = Literal["call", "document"]
Json = dict[str, Any]

#: Limits on a schema, so that none can keep the compiler busy or run it out of stack.
MAX_BYTES, MAX_DEPTH = 256 * 1024, 64
#: Defaults for what a schema leaves open, so that no document grows without end.
MAX_LENGTH, MAX_ITEMS, MAX_INTEGER, MAX_NUMBER, RESOLUTION = 32768, 1024, 10**18, 10**15, 1e-9
_CACHE = 512
_LONGEST_MINIMUM = 8192

# One space, or a new line with indentation: what models write, and no way to go on for ever.
_STYLES: dict[Style, Json] = {
    "call": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "document": {"whitespace_pattern": r" |\n[ \t]{0,24}"},
}


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
class LarkSpec:
    """A grammar in llguidance's dialect of Lark.

    Attributes:
        text: the grammar.
        control: control tokens that it names (``<[151657]>``); all others are never legal.
        hints: for completing an output.
        warnings: of the schemas inside it, see `inline`.
    """

    text: str
    control: frozenset[int] = frozenset()
    hints: Hints = field(default_factory=Hints)
    warnings: tuple[str, ...] = ()


GrammarSpec = JsonSpec | RegexSpec | ChoiceSpec | LarkSpec


class Grammar:
    """A compiled grammar. Immutable and shared.

    Attributes:
        key: identity of vocabulary and spec.
        warnings: what the grammar does not enforce, one sentence each; check the document at the end.
        minimum: tokens of a short complete output, of about the least that a request must allow.
        reserve: budget left below which `Closer` looks at every token.
    """

    def __init__(
        self,
        key: str,
        root: llguidance.LLMatcher,
        tables: _Tables,
        hints: Hints,
        warnings: Sequence[str],
        size: int,
    ) -> None:
        self.key, self.warnings = key, tuple(warnings)
        self._root, self._tables = root, tables
        self._search = Search(tables.candidates, hints, tables.words)
        # What is open at any time can hardly need more tokens than the whole schema has.
        self.reserve = min(max(128, size // 3), 2048)
        shortest = self.matcher().completion(_LONGEST_MINIMUM)
        if shortest is None:
            raise SchemaError(
                "No output satisfies this grammar, or only one that is too long. Look for limits that "
                "contradict each other (required properties, patterns with lengths)."
            )
        self.minimum = len(shortest)

    def matcher(self) -> Matcher:
        """State of a new output."""
        return Matcher(self._root.deep_copy(), self._tables, self._search)


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

    An end id is legal wherever the output may stop; after it nothing is.
    """

    __slots__ = ("_ended", "_ids", "_llm", "_search", "_tables")

    def __init__(self, llm: llguidance.LLMatcher, tables: _Tables, search: Search) -> None:
        self._llm, self._tables, self._search = llm, tables, search
        self._ids: list[int] = []  # the journal
        self._ended = False

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

    def advance(self, token: int) -> bool:
        """Take `token`; False, and nothing is changed, if it is not legal."""
        if self._ended or not 0 <= token < self._tables.vocab.size:
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
        plain = next((i for i, t in enumerate(draft) if t in vocab.end_ids or not 0 <= t < vocab.size), len(draft))
        legal = self._llm.validate_tokens(list(draft[:plain])) if plain else 0
        if legal == plain < len(draft) and draft[plain] in vocab.end_ids:
            fork = self.fork()
            legal += all(map(fork.advance, draft[: plain + 1]))
        return legal

    def rollback(self, n: int) -> None:
        """Undo the last `n` ids, forced ones and an end id included.

        Raises:
            ValueError: fewer have been taken.
        """
        if not 0 <= n <= len(self._ids):
            raise ValueError(f"cannot undo {n} of {len(self._ids)} ids")
        if n == 0:
            return
        plain = n - self._ended
        self._ended = False
        if plain and not self._llm.rollback(plain):
            raise EngineError(f"The grammar could not be rolled back: {self._llm.get_error()}")
        del self._ids[-n:]

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
        fork = Matcher(self._llm.deep_copy(), self._tables, self._search)
        fork._ids, fork._ended = self._ids.copy(), self._ended
        return fork

    def completion(self, limit: int) -> list[int] | None:
        """A short list of at most `limit` ids after which the output may stop; None if none was found."""
        text = b"".join(map(self._tables.vocab.token_bytes, self._ids))
        return complete(self, self._search, text, limit)

    def _require_sound(self) -> None:
        if self._llm.is_error():
            raise SchemaError(
                f"The grammar became too complex ({_summary(self._llm.get_error())}). Simplify its patterns."
            )


class GrammarCompiler:
    """Compiles grammars for one vocabulary on a thread of its own, and remembers the last 512.

    Args:
        vocab: the tokens.
        vocab_size: width of the model's logits, at least ``vocab.size``.
    """

    def __init__(self, vocab: Vocabulary, vocab_size: int) -> None:
        if vocab_size < vocab.size:
            raise ValueError(f"vocab_size {vocab_size} is less than the tokenizer's {vocab.size} ids")
        self._vocab, self._vocab_size = vocab, vocab_size
        self._cache: OrderedDict[str, Future[Grammar]] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="agentkit-grammar")

    def submit(self, spec: GrammarSpec) -> Future[Grammar]:
        """The grammar of `spec`, shared with whoever asks for the same; its future may raise `SchemaError`.

        Raises:
            EngineError: the compiler is closed.
        """
        key = hashlib.sha256(f"{self._vocab.digest}\0{spec!r}".encode()).hexdigest()
        with self._lock:
            future = self._cache.get(key)
            if future is None or future.cancelled():
                try:
                    future = self._thread.submit(self._compile, key, spec)
                except RuntimeError:
                    raise EngineError("The engine is closed. Open a new one.") from None
                self._cache[key] = future
                future.add_done_callback(lambda done: self._forget(key, done))
            if key in self._cache:  # a compilation that has failed meanwhile has already been forgotten
                self._cache.move_to_end(key)
            while len(self._cache) > _CACHE:
                self._cache.popitem(last=False)
        return future

    def close(self) -> None:
        """Stop the thread; grammars not yet begun are cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _forget(self, key: str, done: Future[Grammar]) -> None:
        """Do not remember failures: the next request is told of it by its own compilation."""
        if done.cancelled() or done.exception() is not None:
            # Not under the lock: a future that is already done calls back inside `submit`.
            self._cache.pop(key, None)

    def _compile(self, key: str, spec: GrammarSpec) -> Grammar:
        hints, control, size = Hints(), frozenset[int](), len(repr(spec))
        match spec:
            case JsonSpec(text, style):
                schema, warnings = inline(text, style)
                root = self._root(llguidance.LLMatcher.grammar_from_json_schema(schema))
                hints = Hints(json=True, examples=examples(text))
            case RegexSpec(pattern):
                root, warnings = self._root(llguidance.LLMatcher.grammar_from_regex(pattern)), []
                hints = Hints(examples=tuple(filter(None, [example(pattern)])))
            case ChoiceSpec(options):
                if not options or "" in options:
                    raise SchemaError("A choice needs at least one option and no empty text. Remove the empty one.")
                alternatives = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
                lark = f"start: OPTION\nOPTION: {alternatives}"
                root, warnings = self._root(llguidance.LLMatcher.grammar_from_lark(lark)), []
                hints = Hints(examples=options)
            case LarkSpec(text, control, hints, noted):
                root, warnings = self._root(llguidance.LLMatcher.grammar_from_lark(text)), list(noted)
        return Grammar(key, root, self._tables(control), hints, warnings, size)

    def _root(self, grammar: str) -> llguidance.LLMatcher:
        root = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits())
        if root.is_error():
            raise SchemaError(f"This grammar cannot be compiled: {_summary(root.get_error())}. Change that part.")
        return root

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        # Only used on the compiler's own thread.
        wrapper = llguidance.TokenizerWrapper(_Tokens(self._vocab))
        return llguidance.LLTokenizer(wrapper, eos_token=self._vocab.end_id)

    @cached_property
    def _candidates(self) -> Candidates:
        return Candidates(self._vocab)

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


def _limits() -> llguidance.LLParserLimits:
    """A tenth of a second and some tens of megabytes for a grammar, at most."""
    return llguidance.LLParserLimits(max_grammar_size=200_000, max_lexer_states=100_000, verbose_errors=False)


def _summary(message: str) -> str:
    """An error of llguidance on one line."""
    return " ".join(message.split())[:300].rstrip(".")


# Schemas ----------------------------------------------------------------------------------------------------

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = (
    "items",
    "additionalProperties",
    "additionalItems",
    "contains",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
)
_COMBINING = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
#: Formats that llguidance enforces. JSON Schema lets every other one be an annotation.
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}

_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = r"(([0-9]{2}(0[48]|[2468][048]|[13579][26]))|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    rf"|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
# llguidance's own let through days that no month has, and any number of digits of a second.
_SAMPLES = {
    "date": "2000-01-01",
    "time": "00:00:00Z",
    "date-time": "2000-01-01T00:00:00Z",
    "duration": "P1D",
    "email": "a@a.aa",
    "hostname": "a.aa",
    "ipv4": "0.0.0.0",
    "ipv6": "::1",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "uri": "a:a",
}
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def prepare(text: str) -> tuple[Json, list[str]]:
    """The schema in `text` checked, and without what is an annotation; and warnings about the latter.

    Raises:
        SchemaError: not JSON, not a valid schema, too large or too deep, or it refers to another document.
    """
    if len(text) > MAX_BYTES:
        raise SchemaError(f"The schema has {len(text):,} characters; the limit is {MAX_BYTES:,}. Split it.")
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"The schema is not JSON ({error}). Pass JSON text.") from None
    _require_shallow(value)
    if value is False:
        raise SchemaError("The schema is `false`: nothing satisfies it. Pass another schema.")
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise SchemaError("A schema is a JSON object. Pass one.")
    schema = cast("Json", value)
    validator = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        pointer = _pointer(error.absolute_path)
        raise SchemaError(
            f"The schema is not valid at {pointer or 'the root'}: {error.message[:300]}. Correct it.", pointer
        ) from None
    warnings: list[str] = []
    schema.pop("x-guidance", None)  # would change how llguidance compiles it
    for pointer, part in _parts(schema):
        _require_local(part, pointer)
        kind = part.get("format")
        if isinstance(kind, str) and kind not in _FORMATS:
            del part["format"]
            warnings.append(f"{pointer or 'the root'}: format {kind!r} is not enforced.")
    return schema, warnings


def inline(text: str, style: Style) -> tuple[Json, list[str]]:
    """The schema in `text` as llguidance is given it, alone or after ``%json`` in a grammar; and warnings.

    First exact, then with ``oneOf`` taken as ``anyOf``, which is among the warnings; never more lenient.

    Raises:
        SchemaError: as `prepare`, or llguidance cannot enforce a part of it, which the message names.
    """
    schema, warnings = prepare(text)
    narrowed = narrow(schema)
    error = ""
    for coerce in (False, True):
        options = {**_STYLES[style], "coerce_one_of": coerce}
        # A bound of ours may contradict one that stands elsewhere (behind a $ref): then do without ours.
        for candidate in (narrowed, schema):
            compiled = {**candidate, "x-guidance": options}
            refusal = _refusal(compiled)
            if not refusal:
                if coerce:
                    warnings.append("oneOf: that exactly one branch fits is not enforced, only that one does.")
                return compiled, warnings
            error = error or refusal
    pointer = _locate(schema, lambda part: bool(_refusal({**part, "x-guidance": options})))
    raise SchemaError(
        f"The schema cannot be enforced at {pointer or 'its root'}: {error}. Leave that keyword out "
        "or write it otherwise.",
        pointer,
    )


def _refusal(schema: Json) -> str:
    """Why llguidance does not take a schema; empty if it does."""
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=_limits())
    return _summary(messages[0]) if failed else ""


def _require_shallow(value: object) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise SchemaError(f"The schema is nested deeper than {MAX_DEPTH}. Use $defs and $ref.")
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += cast("Json", item).values()
            elif isinstance(item, list):
                inner += cast("list[object]", item)
        level = inner


def _require_local(part: Json, pointer: str) -> None:
    target = part.get("$ref")
    if isinstance(target, str) and not target.startswith("#"):
        raise SchemaError(
            f"At {pointer or 'the root'}: $ref to {target!r}, another document. Copy what it refers to into $defs.",
            pointer,
        )


def _pointer(path: Sequence[str | int]) -> str:
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)


def _children(part: Json) -> Iterator[tuple[tuple[str | int, ...], Json]]:
    """The schemas directly inside a schema, with their places."""
    for key, value in part.items():
        if key in _MAPS and isinstance(value, dict):
            for name, member in cast("Json", value).items():
                if isinstance(member, dict):
                    yield (key, name), cast("Json", member)
        elif key in _LISTS and isinstance(value, list):
            for i, member in enumerate(cast("list[object]", value)):
                if isinstance(member, dict):
                    yield (key, i), cast("Json", member)
        elif key in _SINGLE and isinstance(value, dict):
            yield (key,), cast("Json", value)


def _parts(schema: Json, pointer: str = "") -> Iterator[tuple[str, Json]]:
    """Every schema inside `schema`, itself included, with its pointer."""
    yield pointer, schema
    for place, child in _children(schema):
        yield from _parts(child, pointer + _pointer(place))


def examples(text: str) -> tuple[str, ...]:
    """Short strings that the patterns and formats of a schema allow, written as in JSON."""
    schema: object = json.loads(text)
    found: dict[str, None] = {}
    for _, part in _parts(cast("Json", schema)) if isinstance(schema, dict) else ():
        if isinstance(pattern := part.get("pattern"), str):
            found[example(pattern)] = None
        elif part.get("format") in _SAMPLES:
            found[_SAMPLES[part["format"]]] = None
    return tuple(json.dumps(sample, ensure_ascii=False)[1:-1] for sample in found if sample)[:32]


def _locate(schema: Json, refuses: Callable[[Json], bool]) -> str:
    """Pointer of the innermost part that is refused on its own, after at most 200 compilations."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    pointer, part, left = "", schema, 200
    while True:
        for place, child in _children(part):
            left -= 1
            if left < 0:
                return pointer
            if refuses({**definitions, **child}):
                pointer, part = pointer + _pointer(place), child
                break
        else:
            return pointer


def narrow(schema: Json) -> Json:
    """A copy in which numbers, strings and arrays are bounded, so that no document grows without end.

    It admits less than `schema`, never more. A branch of ``oneOf`` itself is left alone: there less can be
    more, as branches that overlapped would no longer do so.
    """
    return _narrow(schema, True)


def _narrow(schema: Json, bound: bool) -> Json:
    copy: Json = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            copy[key] = {name: _narrowed(member) for name, member in cast("Json", value).items()}
        elif key in _LISTS and isinstance(value, list):
            copy[key] = [_narrowed(member, key != "oneOf") for member in cast("list[object]", value)]
        elif key in _SINGLE and key != "not" and isinstance(value, dict):
            copy[key] = _narrowed(value)
        else:
            copy[key] = value
    if bound and _COMBINING.isdisjoint(copy):
        kinds = copy.get("type")
        for kind in cast("list[str]", kinds if isinstance(kinds, list) else [kinds]):
            if kind in ("number", "integer"):
                _bound_number(copy, kind)
            elif kind == "string":
                _bound_string(copy)
            elif kind == "array":
                copy.setdefault("maxItems", max(MAX_ITEMS, int(copy.get("minItems", 0))))
    return copy


def _narrowed(value: object, bound: bool = True) -> object:
    if not isinstance(value, dict):
        return value
    return _narrow(cast("Json", value), bound)


def _bound_number(part: Json, kind: str) -> None:
    """Bounds on both sides and, for a fraction, on its digits; both written without an exponent."""
    given = [part[k] for k in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if k in part]
    limit = MAX_INTEGER if kind == "integer" else MAX_NUMBER
    if any(isinstance(value, bool) or abs(value) >= limit for value in given):
        return  # draft 4, or beyond our bounds
    if "minimum" not in part and "exclusiveMinimum" not in part:
        part["minimum"] = -limit
    if "maximum" not in part and "exclusiveMaximum" not in part:
        part["maximum"] = limit
    if kind == "number" and "multipleOf" not in part and all(round(v, 6) == v for v in given):
        part["multipleOf"] = RESOLUTION


def _bound_string(part: Json) -> None:
    kind = part.get("format")
    if "pattern" in part:
        return  # with a length beside it a mask takes a millisecond instead of microseconds
    if kind in _PATTERNS:
        part["pattern"] = _PATTERNS[part.pop("format")]
    elif kind is None:
        part.setdefault("maxLength", max(MAX_LENGTH, int(part.get("minLength", 0))))
