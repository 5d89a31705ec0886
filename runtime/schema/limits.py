"""What a schema may ask for at most, so that none keeps the compiler busy or runs it out of memory or stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from agentkit.runtime.errors import SchemaError

#: Levels of nesting, of a schema's JSON text.
MAX_DEPTH = 64
#: Members of one object, items of one list other than an enum, and branches. llguidance's time grows with their square.
MAX_MEMBERS, MAX_BRANCHES = 2000, 500
#: Characters of a pattern, and groups inside each other in it.
MAX_PATTERN, MAX_GROUPS = 4096, 32
#: Items, members or characters that a schema may demand at least: no output is as long as that.
MAX_DEMAND = 8192
#: Values in what llguidance is given, and levels of it, references followed: 8 MB of stack take some 2,000.
MAX_WRITTEN, MAX_CHAIN = 100_000, 256

_BRANCHES = ("allOf", "anyOf", "oneOf")
_DEMANDS = ("minItems", "minLength", "minProperties", "minContains")


def require_bounded(schema: object) -> None:
    """Look at every object and list of a schema, in no deeper recursion than its own.

    Raises:
        SchemaError: it is nested too deeply, too wide somewhere, or asks for more than an output can hold.
    """
    level: list[tuple[str, object]] = [("", schema)]
    for _ in range(MAX_DEPTH):
        level = [inner for pointer, part in level for inner in _members(pointer, part)]
        if not level:
            return
    raise SchemaError(f"The schema is nested deeper than {MAX_DEPTH} levels. Use $defs and $ref.")


def _members(pointer: str, part: object) -> Iterator[tuple[str, object]]:
    """What is directly inside an object or a list, with pointers, after a look at it."""
    if isinstance(part, dict):
        members = cast("dict[str, Any]", part)
        _require_narrow(pointer, len(members))
        _require_modest(pointer, members)
        for key, value in members.items():
            if isinstance(value, (dict, list)):
                yield f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}", cast("object", value)
    elif isinstance(part, list):
        items = cast("list[object]", part)
        keyword = pointer.rpartition("/")[2]
        if keyword != "enum":
            _require_narrow(pointer, len(items), MAX_BRANCHES if keyword in _BRANCHES else MAX_MEMBERS)
        for i, item in enumerate(items):
            if isinstance(item, (dict, list)):
                yield f"{pointer}/{i}", cast("object", item)


def _require_narrow(pointer: str, count: int, limit: int = MAX_MEMBERS) -> None:
    if count > limit:
        raise SchemaError(f"{count:,} members at {pointer or 'the root'}; the limit is {limit:,}. Use fewer.", pointer)


def _require_modest(pointer: str, part: dict[str, Any]) -> None:
    for key in _DEMANDS:
        demand = part.get(key)
        if isinstance(demand, (int, float)) and demand > MAX_DEMAND:
            raise SchemaError(
                f"{key} at {pointer or 'the root'} is {demand:,}; the limit is {MAX_DEMAND:,}. Ask for less.", pointer
            )
    patterns = part.get("patternProperties")
    named = list(cast("dict[str, object]", patterns)) if isinstance(patterns, dict) else []
    for pattern in (part.get("pattern"), *named):
        if isinstance(pattern, str):
            require_short(pattern, pointer)


def require_short(pattern: str, pointer: str = "") -> None:
    """Raises SchemaError where a regular expression is too long, or its groups are nested too deeply."""
    if len(pattern) > MAX_PATTERN:
        raise SchemaError(
            f"A pattern of {len(pattern):,} characters at {pointer or 'the root'}; the limit is {MAX_PATTERN:,}. "
            "Use a shorter one, or an enum.",
            pointer,
        )
    depth = deepest = 0
    escaped = False
    for character in pattern:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "()":
            depth += 1 if character == "(" else -1
            deepest = max(deepest, depth)
    if deepest > MAX_GROUPS:
        raise SchemaError(
            f"{deepest:,} groups inside each other in a pattern at {pointer or 'the root'}; the limit is {MAX_GROUPS}. "
            "Write it with fewer.",
            pointer,
        )


def require_writable(schema: dict[str, Any]) -> None:
    """Look at a schema that is to be given to llguidance, whose parts may each stand in many places.

    Raises:
        SchemaError: it is too large once each part is written out wherever it stands, or its references lead so far
            that llguidance, which follows them by recursion in native code, would overflow the stack.
    """
    if (size := _written(schema, {})) > MAX_WRITTEN:
        raise SchemaError(
            f"The schema becomes {size:,} values when its combinations are written out; the limit is {MAX_WRITTEN:,}. "
            "Use fewer conditions and alternatives beside each other."
        )
    if _longest(schema) > MAX_CHAIN:
        raise SchemaError(f"The schema's references lead more than {MAX_CHAIN} levels deep. Use fewer levels.")


def _written(value: object, known: dict[int, int]) -> int:
    """Values inside a value, itself included, with those that are shared counted each time."""
    if not isinstance(value, (dict, list)):
        return 1
    found = cast("dict[str, object] | list[object]", value)
    if id(found) not in known:
        inner = found.values() if isinstance(found, dict) else found
        known[id(found)] = 1 + sum(_written(each, known) for each in inner)
    return known[id(found)]


def _longest(schema: dict[str, Any]) -> int:
    """The most levels that whoever goes through a schema is in, if each reference is followed where it is first met."""
    definitions: dict[str, object] = schema.get("$defs", {})
    met: set[int] = set()
    ways: list[Iterator[object]] = [iter([schema])]
    longest = 0
    while ways:
        value = next(ways[-1], None)
        if value is None:
            ways.pop()
        elif id(value) not in met:
            met.add(id(value))
            longest = max(longest, len(ways))
            ways.append(_inside(value, definitions))
    return longest


def _inside(value: object, definitions: dict[str, object]) -> Iterator[object]:
    """Objects and lists right inside one, and what it refers to."""
    if isinstance(value, dict):
        for key, each in cast("dict[str, object]", value).items():
            if key == "$ref" and isinstance(each, str):
                target = definitions.get(each.removeprefix("#/$defs/"))
                if target is not None:
                    yield target
            elif key != "$defs" and isinstance(each, (dict, list)):
                yield cast("object", each)
    elif isinstance(value, list):
        yield from (each for each in cast("list[object]", value) if isinstance(each, (dict, list)))
