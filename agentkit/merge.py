"""One record out of those of a text's parts, in which whatever a part does not say is null.

A part is decoded under a wider schema, `lenient`, in which every field may be null, so that nothing has to be made up.
`merge` joins what the parts say, field by field. What it gives need not satisfy the schema: that is for its caller to
see.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from agentkit.document import Evidence, Leaf, Node, certainty, plain, step
from agentkit.schema import Json

_COMBINING = ("$ref", "anyOf", "oneOf", "allOf", "not", "if", "enum", "const", "$dynamicRef")
#: Keywords of an object or an array that the record of a part can break while the whole keeps them.
_OF_THE_WHOLE = {
    "minProperties",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "minItems",
    "contains",
    "minContains",
    "maxContains",
}
_NULL: Json = {"type": "null"}


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a schema says of the structure of its values.

    Attributes:
        kind: an object or an array is merged by its members; any other value is taken whole from one part.
        schema: without references and the alternative null.
        nullable: whether null is such a value.
    """

    kind: Literal["object", "array", "value"]
    schema: Json
    nullable: bool


def lenient(schema: Json) -> Json:
    """The schema of a part's record: every field of an object may be null as well, and no list needs items.

    Fields of objects are treated alike at any depth, but for what stands in lists: an item is found whole, or it is not
    one. A schema that is neither object nor list may be null itself.
    """
    shape = _shape(schema, schema)
    wide = _lenient(shape, schema, 0) if shape.kind != "value" else _nullable(schema)
    for key in ("$schema", "$defs", "definitions"):
        if key in schema:
            wide[key] = schema[key]
    return wide


#: An object that contains itself is opened no deeper.
_DEPTH = 8


def _lenient(shape: _Shape, root: Json, depth: int) -> Json:
    wide = {key: value for key, value in shape.schema.items() if key not in _OF_THE_WHOLE}
    if shape.kind == "object" and "properties" in wide:
        members = cast("dict[str, Any]", wide["properties"])
        wide["properties"] = {name: _nullable(_member(member, root, depth)) for name, member in members.items()}
    return wide


def _member(schema: Any, root: Json, depth: int) -> Any:
    shape = _shape(schema, root)
    if shape.kind == "value" or depth == _DEPTH:
        return schema
    return _lenient(shape, root, depth + 1)


def _nullable(schema: Any) -> Json:
    return {"anyOf": [schema, _NULL]}


def _shape(schema: Any, root: Json) -> _Shape:
    nullable = False
    part = schema
    for _ in range(64):  # references that go round in circles are no structure
        if not isinstance(part, dict):
            return _Shape("value", {}, nullable or part is True)
        part = cast("Json", part)
        kinds = part.get("type")
        options = part.get("anyOf", part.get("oneOf"))
        if isinstance(part.get("$ref"), str) and _only(part, "$ref"):
            part = _target(root, part["$ref"])
        elif isinstance(options, list) and _NULL in options and _only(part, "anyOf", "oneOf"):
            nullable = True
            others = [option for option in cast("list[Any]", options) if option != _NULL]
            if len(others) != 1:
                return _Shape("value", part, True)
            part = others[0]
        elif any(key in part for key in _COMBINING):
            return _Shape("value", part, nullable)
        elif kinds == "object" or (kinds is None and "properties" in part):
            return _Shape("object", part, nullable)
        elif kinds == "array" and "prefixItems" not in part and isinstance(part.get("items", {}), dict):
            return _Shape("array", part, nullable)
        else:
            null = kinds == "null" or (isinstance(kinds, list) and "null" in kinds)
            return _Shape("value", part, nullable or null)
    return _Shape("value", {}, nullable)


def _only(part: Json, *keys: str) -> bool:
    """Whether nothing but one of ``keys``, definitions and annotations stands in a schema."""
    others = {"$defs", "definitions", "$schema", "$id", "title", "description", "default", "examples", "deprecated"}
    return sum(key in part for key in keys) == 1 and part.keys() <= {*keys, *others}


def _target(root: Json, reference: str) -> Any:
    """What a local reference points to; None for others."""
    if not reference.startswith("#"):
        return None
    target: Any = root
    for token in reference[1:].split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        target = cast("Json", target).get(key) if isinstance(target, dict) else None
    return target


@dataclass(frozen=True, slots=True)
class Merged:
    """What the parts say together.

    Attributes:
        node: the record; None if no part says anything of it.
        missing: JSON pointers of the fields that are required and that no part says anything of.
    """

    node: Node | None
    missing: list[str]


def merge(schema: Json, records: Sequence[Node], keys: Mapping[str, str]) -> Merged:
    """Join the records of a text's parts.

    - Of a single value the one with the highest confidence is taken that is not null, of equals the first.
    - Objects are joined field by field, in the order of the schema. One that is optional is left out, and one that may
      be null is null, where no part has a field that it requires.
    - Lists are joined in the order of the parts. An item that an earlier part has as well is taken once, as often as
      the part has it that has it most often: parts overlap, but within one part a repetition is meant. Items of a list
      with a key are the same if they have the same key, and are joined like other objects.

    Args:
        schema: the record's, not the lenient one.
        records: of the parts, in their order.
        keys: of lists of objects the field that tells the items apart, by the JSON pointer of the list.
    """
    missing: list[str] = []
    node, shape = _Merger(schema, keys).join(schema, list(records), "", missing)
    if node is None and shape.kind == "array":
        node = []
    return Merged(node, missing if node is not None else [""])


@dataclass(frozen=True, slots=True)
class _Merger:
    root: Json
    keys: Mapping[str, str]

    def join(self, schema: Any, nodes: list[Node], pointer: str, missing: list[str]) -> tuple[Node | None, _Shape]:
        """What the parts say of one field, None if nothing; and what it may be."""
        shape = _shape(schema, self.root)
        said = [node for node in nodes if not (isinstance(node, Leaf) and node.value is None)]
        if not said:
            return None, shape
        if shape.kind == "object" and all(isinstance(node, dict) for node in said):
            return self._objects(shape.schema, cast("list[dict[str, Node]]", said), pointer, missing), shape
        if shape.kind == "array" and all(isinstance(node, list) for node in said):
            return self._lists(shape.schema.get("items", {}), cast("list[list[Node]]", said), pointer, missing), shape
        return max(said, key=certainty), shape

    def _objects(self, schema: Json, nodes: list[dict[str, Node]], pointer: str, missing: list[str]) -> dict[str, Node]:
        properties = cast("dict[str, Any]", schema.get("properties", {}))
        required = cast("list[str]", schema.get("required", []))
        others = schema.get("additionalProperties", True)
        joined: dict[str, Node] = {}
        for name in dict.fromkeys([*properties, *required, *(name for node in nodes for name in node)]):
            lacking: list[str] = []
            here = pointer + step(name)
            values = [node[name] for node in nodes if name in node]
            node, shape = self.join(properties.get(name, others), values, here, lacking)
            if node is not None and (not lacking or (name in required and not shape.nullable)):
                joined[name] = node
                missing += lacking
            elif name in required:  # and nothing is said of it, or not enough
                if shape.nullable:
                    joined[name] = next((value for value in values if isinstance(value, Leaf)), _NOTHING)
                elif shape.kind == "array":
                    joined[name] = []
                else:
                    missing.append(here)
        return joined

    def _lists(self, items: Any, lists: list[list[Node]], pointer: str, missing: list[str]) -> list[Node]:
        key = self.keys.get(pointer)
        if key is None:
            return list(_union(lists))
        groups: dict[str, list[Node]] = {}
        for number, item in enumerate(item for nodes in lists for item in nodes):
            name = item.get(key) if isinstance(item, dict) else None
            known = json.dumps(_folded(plain(name))) if name is not None else f"item {number}"  # no JSON: as no other
            groups.setdefault(known, []).append(item)
        joined = [self.join(items, group, pointer + step(i), missing)[0] for i, group in enumerate(groups.values())]
        return [item for item in joined if item is not None]


#: Stands where the schema wants a field, allows null, and no part says anything.
_NOTHING = Leaf(None, Evidence(None, 1.0))


def _union(lists: list[list[Node]]) -> Iterator[Node]:
    """The items of several lists, those that are equal as often as the list has them that has most of them."""
    most: dict[str, int] = {}
    for nodes in lists:
        here: dict[str, int] = {}
        for item in nodes:
            known = json.dumps(_folded(plain(item)), sort_keys=True)
            here[known] = here.get(known, 0) + 1
            if here[known] > most.get(known, 0):
                most[known] = here[known]
                yield item


def _folded(value: Any) -> Any:
    """A JSON value whose texts are told apart by neither case nor white space, and 1 not from 1.0."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_folded(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: _folded(member) for key, member in cast("Json", value).items()}
    return value


def require_keys(schema: Json | None, keys: Mapping[str, str]) -> None:
    """Check the keys given to `merge`.

    Raises:
        ValueError: a pointer leads to no list of objects that have the field.
    """
    for pointer, key in keys.items():
        shape = None if schema is None else _shape(schema, schema)
        for token in pointer.split("/")[1:]:
            name = token.replace("~1", "/").replace("~0", "~")
            members: Json = shape.schema.get("properties", {}) if shape is not None and shape.kind == "object" else {}
            shape = _shape(members[name], cast("Json", schema)) if name in members else None
        items = (
            None if shape is None or shape.kind != "array" else _shape(shape.schema.get("items"), cast("Json", schema))
        )
        if items is None or items.kind != "object" or key not in items.schema.get("properties", {}):
            raise ValueError(f"keys: {pointer!r} is no list of objects with the field {key!r}; write it as '/items'")
