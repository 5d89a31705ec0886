"""Our front end and the three libraries behind Outlines, each as it comes, behind one face for the benches.

All see the same bytes of Qwen3's vocabulary and the same texts. The libraries are given the schema itself, with the
defaults that Outlines gives them; what they drop in silence, the benches find by instances.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import llguidance
import numpy as np
from numpy.typing import NDArray

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.grammar import Grammar, GrammarCompiler, JsonSpec
from agentkit.runtime.vocab import Vocabulary
from tests.qwen import qwen_folder

PADDED = 151_936  # width of Qwen3's logits
WORDS = PADDED // 32


class Refused(Exception):
    """The backend says that it cannot enforce the schema."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A schema that a backend has taken.

    Attributes:
        state: what `Backend.walk` begins with.
        status: ``exact`` or ``verified``: whether a finished document must be judged by jsonschema.
        reason: why it is not exact.
    """

    state: Any
    status: str = "exact"
    reason: str = ""


@dataclass(slots=True)
class Walk:
    """One text put to a grammar.

    Attributes:
        taken: ids accepted before the first that was not.
        accepted: all ids were, and the output may end there.
        masked: ids that could be taken although the mask excluded them, which no decoder would ever reach.
        broken: the backend gave up half-way, and said so.
        nanoseconds: thread CPU time of each mask.
    """

    taken: int = 0
    accepted: bool = False
    masked: int = 0
    broken: bool = False
    nanoseconds: list[int] = field(default_factory=list)


class Backend(Protocol):
    """One way from a schema to masks."""

    vocab: Vocabulary

    def compile(self, schema: str) -> Compiled:
        """Raises `Refused`."""
        ...

    def walk(self, compiled: Compiled, ids: list[int], masks: bool) -> Walk:
        """Put `ids` to a fresh state, with the mask of each step if `masks`."""
        ...


class Ours:
    """The engine's own way: front end, grammar, shortest completion."""

    def __init__(self) -> None:
        self.vocab = Vocabulary.from_folder(qwen_folder())
        self._compiler = GrammarCompiler(self.vocab, PADDED)
        self.compile('{"const": 0}')  # the first one builds the tables of the vocabulary

    def compile(self, schema: str) -> Compiled:
        try:
            grammar = self._compiler.submit(JsonSpec(schema)).result()
        except SchemaError as error:
            raise Refused(f"{error.pointer or 'the root'}: {error}") from None
        [(_, report)] = grammar.reports
        reason = "; ".join(str(finding) for finding in report.findings if finding.status != "exact")
        return Compiled(grammar, report.status, reason)

    def walk(self, compiled: Compiled, ids: list[int], masks: bool) -> Walk:
        grammar: Grammar = compiled.state
        matcher = grammar.matcher()
        try:
            return _walk(ids, masks, matcher.fill, matcher.advance, matcher.can_stop)
        except SchemaError:
            return Walk(broken=True)


class LLGuidance:
    """llguidance in its strict mode, alone."""

    def __init__(self) -> None:
        folder = qwen_folder()
        self.vocab = Vocabulary.from_folder(folder)
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        self._tokenizer = llguidance.LLTokenizer(text, n_vocab=PADDED, eos_token=self.vocab.end_id)

    def compile(self, schema: str) -> Compiled:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        root = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if root.is_error():
            raise Refused(root.get_error())
        return Compiled(root)

    def walk(self, compiled: Compiled, ids: list[int], masks: bool) -> Walk:
        matcher = compiled.state.deep_copy()

        def fill(row: NDArray[np.int32]) -> None:
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

        return _walk(ids, masks, fill, lambda token: matcher.try_consume_tokens([token]) == 1, matcher.is_accepting)


class XGrammar:
    """xgrammar as Outlines calls it: strict mode, any white space; no cache between schemas."""

    def __init__(self) -> None:
        import xgrammar

        self.vocab = Vocabulary.from_folder(qwen_folder())
        tokens = [self.vocab.token_bytes(i) for i in range(self.vocab.size)]
        info = xgrammar.TokenizerInfo(
            tokens, vocab_type=xgrammar.VocabType.RAW, vocab_size=PADDED, stop_token_ids=[self.vocab.end_id]
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._bitmask = xgrammar.allocate_token_bitmask(1, PADDED)
        self._row: NDArray[np.int32] = self._bitmask.numpy()[0]
        self._matcher = xgrammar.GrammarMatcher

    def compile(self, schema: str) -> Compiled:
        try:
            return Compiled(self._compiler.compile_json_schema(schema))
        except RuntimeError as error:
            raise Refused(str(error)) from None

    def walk(self, compiled: Compiled, ids: list[int], masks: bool) -> Walk:
        matcher = self._matcher(compiled.state)

        def fill(row: NDArray[np.int32]) -> None:
            if not matcher.fill_next_token_bitmask(self._bitmask):
                self._row[:] = -1

        def may_end() -> bool:
            return matcher.is_terminated() or matcher.accept_token(self.vocab.end_id)

        return _walk(ids, masks, fill, matcher.accept_token, may_end, self._row)


class OutlinesCore:
    """outlines_core: the schema as one regular expression, over the tokens' bytes."""

    def __init__(self) -> None:
        import outlines_core
        from outlines_core.json_schema import build_regex_from_schema

        self.vocab = Vocabulary.from_folder(qwen_folder())
        tokens: dict[bytes, list[int]] = {}
        for i in set(range(self.vocab.size)) - set(self.vocab.control.values()):
            tokens.setdefault(self.vocab.token_bytes(i), []).append(i)
        self._vocabulary = outlines_core.Vocabulary(self.vocab.end_id, tokens)
        self._regex, self._library = build_regex_from_schema, outlines_core

    def compile(self, schema: str) -> Compiled:
        try:
            return Compiled(self._library.Index(self._regex(schema), self._vocabulary))
        except Exception as error:  # it raises what it likes, BaseException aside
            raise Refused(str(error)) from None

    def walk(self, compiled: Compiled, ids: list[int], masks: bool) -> Walk:
        guide = self._library.Guide(compiled.state)

        def fill(row: NDArray[np.int32]) -> None:
            guide.write_mask_into(row.ctypes.data, row.size, 4)

        def advance(token: int) -> bool:
            try:
                guide.advance(token, return_tokens=False)
            except ValueError:
                return False
            return True

        return _walk(ids, masks, fill, advance, lambda: guide.accepts_tokens([self.vocab.end_id]))


def _walk(
    ids: list[int],
    masks: bool,
    fill: Callable[[NDArray[np.int32]], None],
    advance: Callable[[int], bool],
    may_end: Callable[[], bool],
    row: NDArray[np.int32] | None = None,
) -> Walk:
    walk = Walk()
    row = np.zeros(WORDS, dtype=np.int32) if row is None else row
    for token in ids:
        excluded = False
        if masks:
            begin = time.thread_time_ns()
            fill(row)
            walk.nanoseconds.append(time.thread_time_ns() - begin)
            excluded = not row[token >> 5] >> (token & 31) & 1
        if not advance(token):
            return walk
        walk.masked += excluded
        walk.taken += 1
    walk.accepted = may_end()
    return walk


BACKENDS: dict[str, type[Backend]] = {
    "ours": Ours,
    "llguidance": LLGuidance,
    "xgrammar": XGrammar,
    "outlines_core": OutlinesCore,
}


def installed() -> list[str]:
    """Names of the backends that can be imported here, ours first."""
    return [name for name in BACKENDS if name == "ours" or importlib.util.find_spec(name) is not None]


def write(value: object) -> str:
    """An instance as it is put to every grammar."""
    return json.dumps(value, ensure_ascii=False)
