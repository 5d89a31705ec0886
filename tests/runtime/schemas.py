"""Random JSON schemas that the decoder can enforce, and random outputs under a grammar."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from agentkit.runtime.closing import Closer
from agentkit.runtime.grammar import Grammar, Matcher

Json = dict[str, Any]

_PATTERNS = (
    r"^[a-z]+$",
    r"^[A-Z]{2}-\d{2,4}$",
    r"^(north|south)-[0-9a-f]{4}$",
    r"^\S+@\S+\.(com|org)$",
    r"ab+c",
    r"^[ä-ü]{2,3}$",
)
_FORMATS = ("date", "date-time", "time", "email", "uuid", "ipv4", "ipv6", "duration", "uri", "hostname")
_WORDS = ("name", "total", "größe", "items", "is_open", "a b", "x", "date", "名前", 'quote"d')
_VALUES: tuple[Any, ...] = (
    "red",
    "green",
    "it's",
    'say "hi"',
    "back\\slash",
    0,
    -7,
    12,
    1.5,
    True,
    False,
    None,
    "日本語",
    "🫨",
)


def random_schema(rng: random.Random) -> Json:
    """A schema of nested objects and arrays, bounded and patterned strings and numbers, unions, recursion."""
    root = _object(rng, 3)
    root["$defs"] = {
        "tree": {
            "type": "object",
            "properties": {
                "value": _leaf(rng),
                "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": rng.randint(1, 3)},
                "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
            },
            "required": rng.sample(["value", "children", "next"], rng.randint(1, 3)),
            "additionalProperties": False,
        }
    }
    return root


def _schema(rng: random.Random, depth: int) -> Json:
    if depth == 0:
        return _leaf(rng)
    return rng.choices([_leaf, _union, _reference, _nested], [5, 2, 1, 3])[0](rng, depth)


def _nested(rng: random.Random, depth: int) -> Json:
    return rng.choice([_object, _object, _array])(rng, depth - 1)


def _reference(rng: random.Random, depth: int) -> Json:
    return {"$ref": "#/$defs/tree"}


def _union(rng: random.Random, depth: int) -> Json:
    branches = [_schema(rng, depth - 1) for _ in range(rng.randint(1, 2))]
    return {"anyOf": [*branches, {"type": "null"}]}


def _object(rng: random.Random, depth: int) -> Json:
    names = rng.sample(_WORDS, rng.randint(0, 4))
    schema: Json = {
        "type": "object",
        "properties": {name: _schema(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    match rng.randrange(4):
        case 0:
            schema["additionalProperties"] = _leaf(rng)
        case 1 if not names:
            schema |= {"additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3}
        case _:
            schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> Json:
    least = rng.randint(0, 3)
    schema: Json = {"type": "array", "items": _schema(rng, depth)}
    if rng.random() < 0.6:
        schema |= {"minItems": least, "maxItems": least + rng.randint(0, 4)}
    if rng.random() < 0.2:
        schema |= {"prefixItems": [_leaf(rng)], "minItems": max(least, 1), "maxItems": least + 4}
    return schema


def _leaf(rng: random.Random, depth: int = 0) -> Json:
    return rng.choice([_string, _string, _number, _integer, _enum, _const, _plain])(rng)


def _string(rng: random.Random) -> Json:
    match rng.randrange(4):
        case 0:
            return {"type": "string", "pattern": rng.choice(_PATTERNS)}
        case 1:
            return {"type": "string", "format": rng.choice(_FORMATS)}
        case 2:
            least = rng.choice([0, 1, 5, 40])
            return {"type": "string", "minLength": least, "maxLength": least + rng.choice([0, 3, 100])}
        case _:
            return {"type": "string"}


def _number(rng: random.Random) -> Json:
    low = rng.choice([-1000, -1.5, 0, 0.25, 99])
    return {"type": "number"} | rng.choice(
        [{}, {"minimum": low}, {"exclusiveMinimum": low, "maximum": low + 10.5}, {"multipleOf": 0.5}]
    )


def _integer(rng: random.Random) -> Json:
    low = rng.choice([-1000, -1, 0, 18, 1990])
    kind = rng.choice(["integer", ["integer", "null"]])
    return {"type": kind} | rng.choice(
        [{}, {"minimum": low}, {"exclusiveMaximum": low}, {"minimum": low, "maximum": low + 30}, {"multipleOf": 7}]
    )


def _enum(rng: random.Random) -> Json:
    return {"enum": rng.sample(_VALUES, rng.randint(1, 5))}


def _const(rng: random.Random) -> Json:
    return {"const": rng.choice([*_VALUES, {"a": [1, "b"]}, []])}


def _plain(rng: random.Random) -> Json:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {}, {"type": ["string", "null"]}])


def legal_ids(matcher: Matcher, vocab_size: int) -> np.ndarray:
    """The legal next ids, ascending."""
    row = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    matcher.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


class Bigrams:
    """A random model: the logits of the next id are a random row for each of a few kinds of last id.

    Args:
        vocab_size: width of the logits.
        temperature: of its normally distributed logits, of deviation 4.
    """

    KINDS = 16

    def __init__(self, vocab_size: int, seed: int, temperature: float) -> None:
        logits = np.random.default_rng(seed).normal(0.0, 4.0, (self.KINDS, vocab_size))
        self._weights = np.exp(logits / temperature)

    def draw(self, last: int, legal: np.ndarray, rng: random.Random) -> int:
        """One of the `legal` ids after the id `last`."""
        sums = np.cumsum(self._weights[last % self.KINDS, legal])
        return int(legal[min(np.searchsorted(sums, rng.random() * sums[-1]), len(legal) - 1)])


def random_output(
    grammar: Grammar, rng: random.Random, budget: int, vocab_size: int, model: Bigrams | None = None
) -> list[int]:
    """Ids drawn by a model, or evenly, from what is legal, within a budget, as the engine would: forced ids taken,
    closed in time.
    """
    matcher = grammar.matcher()
    closer = Closer(matcher, grammar.reserve)
    ids: list[int] = []
    while not matcher.finished():
        legal = legal_ids(matcher, vocab_size)
        token = model.draw(ids[-1] if ids else 0, legal, rng) if model is not None else int(rng.choice(legal))
        closing = closer.admit(token, budget - len(ids))
        certain = [token] if closing is None else closing
        while certain:
            for taken in certain:
                assert matcher.advance(taken)
                ids.append(taken)
            certain = matcher.forced() if closing is None else []
        if closing is not None:
            break
    return ids
