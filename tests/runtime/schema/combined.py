"""Random schemas of combined keywords, and small documents near them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, permutations, product
from typing import Any

Json = dict[str, Any]

NAMES = ("a", "b", "ab", "c")
_SCALARS: tuple[Any, ...] = (None, True, False, 0, 1, 2, 5, -1, 1.5, "", "a", "b", "ab", "abc")


@dataclass(frozen=True)
class _Draw:
    rng: random.Random
    modern: bool
    references: tuple[str, ...]


def random_combined(rng: random.Random, modern: bool = True) -> Json:
    """A schema of a few levels. Two of its parts have names and refer to each other.

    Args:
        rng: decides.
        modern: in draft 2020-12; else in draft 7.
    """
    # No part leads to itself in place: what `y` says of itself, it says of a property.
    draw = _Draw(rng, modern, ("#/$defs/x", "#/$defs/y"))
    schema = _schema(draw, 3)
    if not isinstance(schema, dict):
        schema = {"allOf": [schema]}
    definitions = {"x": _schema(_Draw(rng, modern, ("#/$defs/y",)), 2), "y": _object(draw, 2)}
    definitions["y"]["properties"] = {"a": {"$ref": "#/$defs/y"}, **definitions["y"].get("properties", {})}
    if modern and rng.random() < 0.2:
        schema["unevaluatedProperties"] = rng.choice([False, {"type": "integer"}])
    if modern and rng.random() < 0.1:
        schema["unevaluatedItems"] = rng.choice([False, {"type": "integer"}])
    return {
        **schema,
        "$defs": definitions,
        **({} if modern else {"$schema": "http://json-schema.org/draft-07/schema#"}),
    }


def _schema(draw: _Draw, depth: int) -> Any:
    if depth <= 0:
        return _leaf(draw.rng)
    match draw.rng.randrange(16):
        case 0 | 1:
            return {draw.rng.choice(["allOf", "anyOf", "oneOf"]): _several(draw, depth)}
        case 2 | 3:
            return {
                **_object(draw, depth),
                draw.rng.choice(["allOf", "anyOf", "oneOf"]): _several(draw, depth),
            }
        case 4:
            return {"not": _schema(draw, depth - 1)}
        case 5:
            return {**_object(draw, depth), "not": _schema(draw, depth - 1)}
        case 6:
            branches = {key: _schema(draw, depth - 1) for key in ("then", "else") if draw.rng.random() < 0.7}
            return {"if": _schema(draw, depth - 1), **branches}
        case 7 if draw.modern:
            needs = {draw.rng.choice(NAMES): draw.rng.sample(NAMES, draw.rng.randint(0, 2)) for _ in range(2)}
            return {**_object(draw, depth), "dependentRequired": needs}
        case 7 | 8:
            key = "dependentSchemas" if draw.modern else "dependencies"
            return {**_object(draw, depth), key: {draw.rng.choice(NAMES): _schema(draw, depth - 1)}}
        case 9:
            return {"$ref": draw.rng.choice(draw.references), **(_object(draw, depth) if draw.modern else {})}
        case 10:
            return _array(draw, depth)
        case 11:
            return draw.rng.choice([True, False, {}, _leaf(draw.rng)])
        case _:
            return _object(draw, depth)


def _several(draw: _Draw, depth: int) -> list[Any]:
    return [_schema(draw, depth - 1) for _ in range(draw.rng.randint(1, 3))]


def _object(draw: _Draw, depth: int) -> Json:
    schema: Json = {"type": "object"} if draw.rng.random() < 0.7 else {}
    names = draw.rng.sample(NAMES, draw.rng.randint(0, 3))
    if names:
        schema["properties"] = {name: _schema(draw, depth - 2) for name in names}
    if draw.rng.random() < 0.5:
        schema["required"] = draw.rng.sample(NAMES, draw.rng.randint(1, 2))
    if draw.rng.random() < 0.15:
        schema["patternProperties"] = {draw.rng.choice(["^a", "b$"]): _leaf(draw.rng)}
    if draw.rng.random() < 0.4:
        schema["additionalProperties"] = draw.rng.choice([False, False, _leaf(draw.rng)])
    return schema


def _array(draw: _Draw, depth: int) -> Json:
    schema: Json = {"type": "array"} if draw.rng.random() < 0.7 else {}
    inner = _schema(draw, depth - 2)
    if draw.rng.random() < 0.5:
        prefix = [_leaf(draw.rng) for _ in range(draw.rng.randint(1, 2))]
        schema |= (
            {"prefixItems": prefix, "items": inner} if draw.modern else {"items": prefix, "additionalItems": inner}
        )
    else:
        schema["items"] = inner
    if draw.rng.random() < 0.5:
        schema["minItems"] = draw.rng.randint(0, 2)
    if draw.rng.random() < 0.5:
        schema["maxItems"] = draw.rng.randint(1, 3)
    return schema


def _leaf(rng: random.Random) -> Any:
    match rng.randrange(8):
        case 0:
            return {"enum": rng.sample(_SCALARS, rng.randint(1, 4))}
        case 1:
            return {"const": rng.choice(_SCALARS)}
        case 2:
            return {"type": rng.choice(["string", "integer", "number", "boolean", "null", ["string", "null"]])}
        case 3:
            return {"type": "integer", rng.choice(["minimum", "maximum", "exclusiveMinimum"]): rng.randint(-1, 3)}
        case 4:
            return {rng.choice(["minimum", "maximum", "exclusiveMaximum"]): rng.choice([0, 1, 1.5])}
        case 5:
            return {"type": "string", rng.choice(["minLength", "maxLength"]): rng.randint(0, 2)}
        case 6:
            return {"pattern": rng.choice(["^a", "b$", "^ab?$", "b"])}
        case _:
            return rng.choice([{}, {"type": "object"}, {"type": "array"}])


def random_document(rng: random.Random, depth: int = 2) -> Any:
    """A small value over the same names."""
    kind = rng.random() if depth else 1.0
    if kind < 0.5:
        return {name: random_document(rng, depth - 1) for name in rng.sample((*NAMES, "d"), rng.randint(0, 3))}
    if kind < 0.65:
        return [random_document(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return rng.choice(_SCALARS)


def orders(value: Any, limit: int = 200) -> list[Any]:
    """The same value with its keys in all orders, up to a limit: a grammar asks for that of the schema."""
    return list(islice(_orders(value), limit))


def _orders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for names in permutations(value):
            for members in product(*(list(_orders(value[name])) for name in names)):
                yield dict(zip(names, members, strict=True))
    elif isinstance(value, list):
        for members in product(*map(list, map(_orders, value))):
            yield list(members)
    else:
        yield value
