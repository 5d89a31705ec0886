"""One schema of JSONSchemaBench and its instances, put to one backend."""

from __future__ import annotations

import json
import math
import re
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import jsonschema
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY

from agentkit.runtime.vocab import Vocabulary
from bench.backends import Backend, Compiled, Refused, Walk, write

Json = dict[str, Any]

MOST_TOKENS = 4096  # of an instance; the rest is only judged by whether it is taken


@dataclass(frozen=True, slots=True)
class Trial:
    """One instance.

    Attributes:
        valid: what the bench says.
        judged: what jsonschema says.
        accepted: by the grammar, and where the schema is `verified` by jsonschema too.
        masked: tokens that the mask excluded although they could be taken.
        reason: why a valid instance was not accepted as it is. ``order``: in another order of keys it was; ``bound``: a
            number or a length beyond our own, an integer written 1.0; ``complex``: the backend gave up half-way;
            ``text``: no text can hold it; ``label``: jsonschema finds it invalid; ``judge``: it cannot tell; ``other``.
        where: the text up to the first token that was not taken.
    """

    valid: bool
    judged: bool
    accepted: bool
    masked: int = 0
    reason: str = ""
    where: str = ""

    @property
    def wrong(self) -> bool:
        """Invalid by the bench and by jsonschema, and it came through."""
        return self.accepted and not self.valid and not self.judged

    @property
    def mislabelled(self) -> bool:
        """Invalid by the bench, not by jsonschema, and it came through."""
        return self.accepted and not self.valid and self.judged

    @property
    def right(self) -> bool:
        """Valid and taken (in whatever order of keys), or invalid and not."""
        return (self.accepted or self.reason == "order") if self.valid else not self.accepted


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a backend made of one schema.

    Attributes:
        status: ``exact``, ``verified``, ``refused``, or how its process was lost.
        milliseconds: CPU time of compiling it, until the first mask can be asked for.
        masks: nanoseconds of each mask over valid instances, uint32.
    """

    group: str
    id: str
    status: str
    reason: str = ""
    milliseconds: float = 0.0
    masks: bytes = b""
    trials: tuple[Trial, ...] = ()


def examine(backend: Backend, group: str, line: str) -> Outcome:
    """Compile the schema of `line` and try its instances."""
    case = json.loads(line)
    schema = case["schema"]
    text = json.dumps(schema)
    begin = time.process_time()
    try:
        compiled = backend.compile(text)
    except Refused as error:
        return Outcome(group, case["id"], "refused", " ".join(str(error).split())[:300], _since(begin))
    spent = _since(begin)
    masks = array("I")
    judge = _judge(schema)
    trials = tuple(_trial(backend, compiled, schema, judge, test, masks) for test in case["tests"])
    return Outcome(group, case["id"], compiled.status, compiled.reason[:300], spent, masks.tobytes(), trials)


def status(backend: Backend, schema: str) -> str:
    """What becomes of a schema: ``exact``, ``verified`` or ``refused``."""
    try:
        return backend.compile(schema).status
    except Refused:
        return "refused"


def _since(begin: float) -> float:
    return 1e3 * (time.process_time() - begin)


def _judge(schema: Any) -> Validator:
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    # A registry of its own: the default one fetches what a $ref names from the network.
    return kind(schema, format_checker=kind.FORMAT_CHECKER, registry=REGISTRY)


def _trial(backend: Backend, compiled: Compiled, schema: Any, judge: Validator, test: Json, masks: array[int]) -> Trial:
    value, valid = test["data"], bool(test["valid"])
    try:
        judged = judge.is_valid(value)
        written = _written(value, backend.vocab)
        if written != value:  # the tokenizer normalises: what it writes is another instance
            value, valid = written, judge.is_valid(written)
            judged = valid
        value = ordered(value, schema, judge)
    except Exception as error:  # a $ref to nowhere, a pattern that Python does not read: then nobody judges
        if compiled.status == "verified":
            return Trial(valid, False, False, reason="judge" if valid else "", where=str(error)[:100])
        judged = valid

    def walk(text: str, timed: bool = False) -> tuple[Walk, list[int]]:
        try:
            ids = backend.vocab.encode(text)
        except UnicodeEncodeError:  # half a surrogate pair: JSON can escape it, no text can hold it
            return Walk(), []
        return backend.walk(compiled, ids, masks=timed and len(ids) <= MOST_TOKENS), ids

    first, ids = walk(write(value), timed=valid)
    if valid:
        masks.extend(min(nanoseconds, 2**32 - 1) for nanoseconds in first.nanoseconds)
    accepted = first.accepted and (judged or compiled.status == "exact")
    if accepted or not valid:
        return Trial(valid, judged, accepted, first.masked)
    where = backend.vocab.decode(ids[: first.taken])[-60:] + "⟂" + backend.vocab.decode(ids[first.taken :])[:20]
    if not judged:
        return Trial(valid, judged, False, first.masked, "label", where)
    if first.broken:
        return Trial(valid, judged, False, reason="complex")
    reason = _reason(value, lambda text: walk(text)[0], backend.vocab)
    return Trial(valid, judged, False, first.masked, reason, where)


def _written(value: object, vocab: Vocabulary) -> object:
    """`value` as it is after a tokenizer; itself where no text can hold it."""
    try:
        return json.loads(vocab.decode(vocab.encode(write(value))))
    except UnicodeEncodeError:  # half a surrogate pair
        return value


def _reason(value: object, walk: Callable[[str], Walk], vocab: Vocabulary) -> str:
    """What must be changed in a valid instance for it to be accepted."""
    try:
        write(value).encode()
    except UnicodeEncodeError:
        return "text"

    def begins(text: str) -> bool:
        return walk(text).taken == len(vocab.encode(text))

    for reason, other in (("order", value), ("bound", bounded(value))):
        found = next(Arrangements(begins).of(other, ""), None)
        if found is not None and walk(found).accepted:
            return reason
    return "other"


class Arrangements:
    """The ways to write a value with the keys of its objects in any order, as far as a grammar takes them.

    Args:
        begins: whether an output may begin with a text.
    """

    def __init__(self, begins: Callable[[str], bool]) -> None:
        self._begins, self._left = begins, 500  # questions to the grammar

    def of(self, value: object, text: str) -> Iterator[str]:
        """`text`, and `value` after it."""
        if isinstance(value, dict):
            yield from self._object(cast("Json", value), text + "{", ())
        elif isinstance(value, list):
            yield from self._array(cast("list[object]", value), text + "[")
        elif self._taken(text + write(value)):
            yield text + write(value)

    def _object(self, members: Json, text: str, written: tuple[str, ...]) -> Iterator[str]:
        if len(written) == len(members):
            yield text + "}"
            return
        for key in (key for key in members if key not in written):
            start = f"{text}{', ' if written else ''}{write(key)}: "
            if self._taken(start):
                for after in self.of(members[key], start):
                    yield from self._object(members, after, (*written, key))

    def _array(self, items: list[object], text: str) -> Iterator[str]:
        if not items:
            yield text + "]"
            return
        for after in self.of(items[0], text):
            yield from self._array(items[1:], f"{after}, ") if len(items) > 1 else (f"{after}]",)

    def _taken(self, text: str) -> bool:
        self._left -= 1
        return self._left >= 0 and self._begins(text)


def bounded(value: object) -> object:
    """`value` within the bounds that our front end sets of its own: digits of numbers, lengths of arrays."""
    if isinstance(value, dict):
        return {key: bounded(member) for key, member in cast("Json", value).items()}
    if isinstance(value, list):
        return [bounded(item) for item in cast("list[object]", value)[:1024]]
    if isinstance(value, float):
        rounded = round(value, 6) if math.isfinite(value) and abs(value) < 1e15 else 0.5
        return int(rounded) if rounded == int(rounded) else rounded
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-(10**14), min(10**14, value))
    return value


def ordered(value: object, schema: object, judge: Validator) -> object:
    """`value` with its keys in the order in which `schema` declares them, those it does not name after them."""
    return _ordered(value, list(_applying(schema, value, judge, set())), judge)


def _ordered(value: object, parts: list[Json], judge: Validator) -> object:
    if isinstance(value, dict):
        members = cast("Json", value)
        named = [name for part in parts for name in part.get("properties", {})]
        named += [name for part in parts for name in _names(part.get("required"))]
        rank = {name: i for i, name in enumerate(dict.fromkeys(named))}
        keys = sorted(members, key=lambda key: rank.get(key, len(rank)))
        return {key: _inner(members[key], [s for p in parts for s in _of_key(p, key)], judge) for key in keys}
    if isinstance(value, list):
        items = cast("list[object]", value)
        return [_inner(item, [s for p in parts for s in _of_item(p, i)], judge) for i, item in enumerate(items)]
    return value


def _inner(value: object, schemas: list[object], judge: Validator) -> object:
    return _ordered(value, [part for schema in schemas for part in _applying(schema, value, judge, set())], judge)


def _names(required: object) -> list[str]:
    return cast("list[str]", required) if isinstance(required, list) else []  # draft 3 had a boolean


def _of_key(part: Json, key: str) -> Iterator[object]:
    named = part.get("properties", {})
    if key in named:
        yield named[key]
    matching = [member for pattern, member in part.get("patternProperties", {}).items() if re.search(pattern, key)]
    yield from matching
    if key not in named and not matching:
        yield part.get("additionalProperties")
    yield part.get("unevaluatedProperties")


def _of_item(part: Json, i: int) -> Iterator[object]:
    items = part.get("items")
    leading = items if isinstance(items, list) else part.get("prefixItems", [])
    if i < len(leading):
        yield leading[i]
    else:
        yield part.get("additionalItems") if isinstance(items, list) else items
    yield part.get("contains")


def _applying(schema: object, value: object, judge: Validator, seen: set[int]) -> Iterator[Json]:
    """The schemas that say something about `value` itself: `schema`, what it refers to, and its branches that fit."""
    if not isinstance(schema, dict) or id(cast("object", schema)) in seen:
        return
    part = cast("Json", schema)
    seen.add(id(part))
    yield part
    for key in ("$ref", "$dynamicRef", "$recursiveRef"):
        if isinstance(reference := part.get(key), str) and reference.startswith("#"):
            yield from _applying(_target(judge.schema, reference), value, judge, seen)
    for key in ("allOf", "anyOf", "oneOf"):
        branches = part.get(key, [])
        fitting = [branch for branch in branches if key == "allOf" or judge.evolve(schema=branch).is_valid(value)]
        for branch in fitting or branches:
            yield from _applying(branch, value, judge, seen)
    if "if" in part:
        branch = part.get("then" if judge.evolve(schema=part["if"]).is_valid(value) else "else")
        yield from _applying(part["if"], value, judge, seen)
        yield from _applying(branch, value, judge, seen)
    if isinstance(value, dict):
        for key in ("dependentSchemas", "dependencies"):
            for name, dependent in part.get(key, {}).items():
                if name in value:
                    yield from _applying(dependent, value, judge, seen)


def _target(root: Any, reference: str) -> object:
    place: Any = root
    for key in reference[1:].split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~").replace("%25", "%")
        try:
            place = place[int(key) if isinstance(place, list) else key]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return place
