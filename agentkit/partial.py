"""A value of an output type while its document is being decoded.

What has arrived is put together without validation: there is nothing to validate in half an object, and pydantic's own
partial mode knows lists and dictionaries but neither models nor unions. So a partial never raises. Each scalar is
turned into what its annotation says once, when it is complete; what has not arrived is None, and a model's
``model_fields_set`` tells which members have.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import AliasChoices, BaseModel, Field, RootModel, TypeAdapter
from pydantic_core import PydanticUndefined

from agentkit.fields import FieldDelta, FieldEvent, FieldReady, FieldStarted, Kind

Items = dict[str | int, Any]
_SEQUENCES = (list, Sequence, MutableSequence, Iterable)
_MAPPINGS = (dict, Mapping, MutableMapping)
_COLLECTIONS = (tuple, set, frozenset)
_SCALARS: dict[Any, tuple[Kind, ...]] = {int: ("number",), float: ("number",), bool: ("boolean",)}


class Draft:
    """Follows the events of a document.

    Args:
        output: an output type as `Agent` takes it.
    """

    def __init__(self, output: Any) -> None:
        self._root = _shape(output)
        self._open: list[_Open] = []  # from the root down to where the document grows, as far as its parts have a type
        self._value: Any = None

    def take(self, event: FieldEvent) -> None:
        """Take in an event; the beginning of another document puts an end to this one."""
        depth = len(event.path)
        if isinstance(event, FieldStarted):
            if depth == 0:
                self._open, self._value = [_Open(self._root.begin(event.kind))], None
            elif depth == len(self._open) and (shape := self._open[-1].shape.child(event.path[-1])) is not None:
                self._open.append(_Open(shape.begin(event.kind), event.path[-1]))
        elif depth == len(self._open) - 1:
            top = self._open[-1]
            if isinstance(event, FieldDelta):
                top.text.append(event.text)
            else:
                self._close(top.shape.ready(event, top.items))

    def value(self) -> Any:
        """The document as far as it has come, a copy; None while nothing of it can be told."""
        if not self._open:
            return self._value
        value, key, known = None, None, False
        for part in reversed(self._open):
            items = {**part.items, cast("str | int", key): value} if known else part.items
            value, key = part.shape.draft(items, "".join(part.text)), part.key
            known = value is not None
        return value

    def _close(self, value: Any) -> None:
        done = self._open.pop()
        if self._open:
            self._open[-1].items[cast("str | int", done.key)] = value
        else:
            self._value = value


@dataclass(slots=True)
class _Open:
    """A field that is not complete, and what of it is."""

    shape: _Shape
    key: str | int | None = None
    items: Items = field(default_factory=dict[str | int, Any])
    text: list[str] = field(default_factory=list[str])


class _Shape:
    """What becomes of one field: nothing until it is complete, then what its type makes of it."""

    kinds: tuple[Kind, ...]  #: of JSON values it may be written as

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self.kinds = _SCALARS[kind] if kind in (int, float, bool) else ("string", "number", "boolean")

    def begin(self, kind: Kind) -> _Shape:
        """The shape of a field that begins as a JSON value of this kind."""
        return _NULL if kind == "null" else self

    def child(self, key: str | int) -> _Shape | None:
        """The shape of a member or item; None where only the whole has one."""
        return None

    def draft(self, items: Items, text: str) -> Any:
        """The field as it stands; None where nothing can be told."""
        return None

    def ready(self, event: FieldReady, items: Items) -> Any:
        """The field when it is complete."""
        return self.convert(event.value)

    def convert(self, value: Any) -> Any:
        """What pydantic makes of a complete JSON value; None where a validator of the type does not take it."""
        try:
            return self._adapter.validate_json(json.dumps(value))
        except Exception:  # a validator is the caller's program; the result is where it is told, not a partial
            return None

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self._kind)


_NULL = _Shape(None)


class _Union(_Shape):
    """One of several types: which, is known at the beginning if only one of them is written so, else at the end.

    Args:
        kind: the union.
        members: of it, but for None.
    """

    def __init__(self, kind: Any, members: Sequence[Any]) -> None:
        super().__init__(kind)
        self._members = [_shape(member) for member in members]
        self.kinds = tuple(kind for member in self._members for kind in member.kinds)

    def begin(self, kind: Kind) -> _Shape:
        fitting = [member for member in self._members if kind in member.kinds]
        return _NULL if kind == "null" else fitting[0].begin(kind) if len(fitting) == 1 else _Shape(self._kind)


class _Text(_Shape):
    """A text, which is told while it grows."""

    def __init__(self, kind: Any) -> None:
        super().__init__(kind)
        self.kinds = ("string",)

    def draft(self, items: Items, text: str) -> Any:
        return text

    def ready(self, event: FieldReady, items: Items) -> Any:
        return event.value


class _Parts(_Shape):
    """An object or an array.

    Args:
        kind: which of the two.
        children: the type of each member or item.
        build: makes it of what has arrived; also told whether that is all.
    """

    def __init__(self, kind: Kind, children: Callable[[str | int], Any], build: Callable[[Items, bool], Any]) -> None:
        self.kinds = (kind,)
        self._children, self._build = children, build
        self._shapes: dict[int, _Shape] = {}  # by the identity of their types, which `children` holds

    def child(self, key: str | int) -> _Shape | None:
        kind = self._children(key)
        if id(kind) not in self._shapes:
            self._shapes[id(kind)] = _shape(kind)
        return self._shapes[id(kind)]

    def draft(self, items: Items, text: str) -> Any:
        return self._build(items, False)

    def ready(self, event: FieldReady, items: Items) -> Any:
        return self._build(items, True)


class _Json(_Shape):
    """JSON values as they are."""

    def __init__(self, kind: Any) -> None:
        super().__init__(kind)
        self.kinds = ("object", "array", "string", "number", "boolean")

    def child(self, key: str | int) -> _Shape | None:
        return self

    def draft(self, items: Items, text: str) -> Any:
        if not items:
            return text or None
        return dict(items) if isinstance(next(iter(items)), str) else list(items.values())

    def ready(self, event: FieldReady, items: Items) -> Any:
        return event.value


def _shape(kind: Any) -> _Shape:
    kind = _plain(kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _Union(kind, [arg for arg in args if arg is not types.NoneType])
    base = origin or kind
    if base is str:
        return _Text(kind)
    if base in _SEQUENCES:
        return _Parts("array", lambda _: args[0] if args else Any, lambda items, _: list(items.values()))
    if base in _COLLECTIONS:
        return _Parts("array", partial(_item, base, args), partial(_collection, base))
    if base in _MAPPINGS:
        keys = _Shape(args[0]) if args and args[0] is not str else None
        return _Parts("object", lambda _: args[1] if args else Any, partial(_mapping, keys))
    if base in (Any, object) or isinstance(base, Mapping) or type(kind).__module__.startswith("outlines."):
        return _Json(kind)
    return _record(kind, base) if isinstance(base, type) else _Shape(kind)


def _plain(kind: Any) -> Any:
    """The type behind annotations, aliases and new names."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif hasattr(kind, "__supertype__"):
            kind = kind.__supertype__
        elif type(kind).__name__ == "TypeAliasType":
            kind = kind.__value__
        else:
            return kind


def _record(kind: Any, base: type[Any]) -> _Shape:
    """A class with members; any other is a scalar."""
    if is_typeddict(base):
        hints = get_type_hints(base)
        return _Parts("object", lambda key: hints.get(str(key), Any), partial(_mapping, None))
    if issubclass(base, BaseModel):
        # A generic model is a class of its own for each of its arguments.
        fields = kind.model_fields
        if issubclass(base, RootModel):
            return _Root(kind, _shape(fields["root"].annotation))
        names = {_written(name, info): name for name, info in fields.items()}
        annotations = {key: fields[name].annotation for key, name in names.items()}
        return _Parts("object", lambda key: annotations.get(str(key), Any), partial(_model, kind, names))
    if dataclasses.is_dataclass(base):
        hints = get_type_hints(base, include_extras=True)
        extras = getattr(base, "__pydantic_fields__", {})
        names = {_written(f.name, extras.get(f.name)): f.name for f in dataclasses.fields(base)}
        return _Parts("object", lambda key: hints.get(names.get(str(key), ""), Any), partial(_dataclass, base, names))
    return _Shape(kind)


class _Root(_Shape):
    """A model that is written as its one member."""

    def __init__(self, kind: Any, inner: _Shape) -> None:
        super().__init__(kind)
        self._inner, self.kinds = inner, inner.kinds

    def child(self, key: str | int) -> _Shape | None:
        return self._inner.child(key)

    def draft(self, items: Items, text: str) -> Any:
        value = self._inner.draft(items, text)
        return None if value is None else _model(self._kind, {"root": "root"}, {"root": value}, False)

    def ready(self, event: FieldReady, items: Items) -> Any:
        return _model(self._kind, {"root": "root"}, {"root": self._inner.ready(event, items)}, True)


def _written(name: str, info: Any) -> str:
    """The name of a member in JSON."""
    alias = None if info is None else info.validation_alias or info.alias
    if isinstance(alias, AliasChoices):
        alias = alias.choices[0]
    return alias if isinstance(alias, str) else name


def _model(kind: Any, names: Mapping[str, str], items: Items, complete: bool) -> BaseModel:
    """A model as unpickling makes it: no validator and no ``model_post_init`` sees what is not there."""
    arrived = {names[str(key)]: value for key, value in items.items() if key in names}
    extra = {str(key): value for key, value in items.items() if key not in names}
    made = kind.__new__(kind)
    made.__setstate__(
        {
            "__dict__": {
                name: arrived[name] if name in arrived else _default(info) if complete else None
                for name, info in kind.model_fields.items()
            },
            "__pydantic_fields_set__": set(arrived),
            "__pydantic_extra__": extra if kind.model_config.get("extra") == "allow" else None,
            "__pydantic_private__": None,
        }
    )
    return made


def _default(info: Any) -> Any:
    """What a member is that the model has left out."""
    try:
        value = info.get_default(call_default_factory=True, validated_data={})
    except Exception:  # a factory that wants the other members
        return None
    return None if value is PydanticUndefined else value


def _dataclass(kind: Any, names: Mapping[str, str], items: Items, complete: bool) -> Any:
    described = getattr(kind, "__pydantic_fields__", {})
    made = object.__new__(kind)
    for member, key in zip(dataclasses.fields(kind), names, strict=True):
        value = items.get(key)
        if complete and key not in items:
            value = _default(described.get(member.name) or Field(**_given(member)))
        object.__setattr__(made, member.name, value)
    return made


def _given(member: dataclasses.Field[Any]) -> dict[str, Any]:
    """The default of a dataclass's member, as pydantic's `Field` takes it."""
    given = {"default": member.default, "default_factory": member.default_factory}
    return {name: value for name, value in given.items() if value is not dataclasses.MISSING}


def _item(base: type[Any], args: tuple[Any, ...], key: str | int) -> Any:
    """The type of an item of a tuple or a set."""
    if base is not tuple or args[1:] == (...,):
        return args[0] if args else Any
    return args[int(key)] if int(key) < len(args) else Any


def _collection(base: Callable[[Iterable[Any]], Any], items: Items, complete: bool) -> Any:
    try:
        return base(items.values())
    except TypeError:  # a set whose items are not hashable while they are dicts and models without validation
        return list(items.values())


def _mapping(keys: _Shape | None, items: Items, complete: bool) -> dict[Any, Any]:
    return {key if keys is None else keys.convert(key): value for key, value in items.items()}
