"""Objects: which names they may have, and how many, in the forms llguidance has.

llguidance writes declared properties in their order, then names that match a pattern, then all others. It counts
properties where all declared ones are required, and takes patterns no two of which match the same name.
"""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import cast

from agentkit.runtime.schema.automaton import Automaton, listed, searched
from agentkit.runtime.schema.kinds import COMBINING, Json, admits, lasting, met, satisfies, whole, without
from agentkit.runtime.schema.patterns import Untranslatable
from agentkit.runtime.schema.report import Note
from agentkit.runtime.schema.strings import matches, translated

_KEYWORDS = (
    "properties",
    "patternProperties",
    "additionalProperties",
    "required",
    "minProperties",
    "maxProperties",
    "propertyNames",
)

# Any name, in the spelling for which llguidance's masks are fast (see `patterns.written`).
_ANY = "^(?s:.*)$"
# Declared names that a pattern of all others spells out. Its masks take 1.5 ms where a name begins.
_DECLARED = 8
# Members in all branches of an object whose properties are counted. 400 compile in 3 ms.
_MEMBERS = 400


def rewrite(part: Json, note: Note) -> Json:
    """A part whose object keywords llguidance takes."""
    if not admits(part, "object"):
        return without(part, *_KEYWORDS)
    if any(key in part for key in _KEYWORDS):
        part = whole(part, "minProperties", "maxProperties")
        part = _names(part, note)
        given = list(cast("Json", part.get("patternProperties", {})))
        part = _patterns(part, note)
        part = _unescaped(part, given, note)
        part = _bounds(part, note)
    _repeats(part, note)
    return part


def _patterns(part: Json, note: Note) -> Json:
    """``patternProperties`` as llguidance reads them, no two of which match the same name."""
    given = cast("Json", part.get("patternProperties", {}))
    if not given:
        return without(part, "patternProperties")
    read: Json = {}
    try:
        for pattern, schema in given.items():
            texts = translated(pattern)
            text = texts[0] if len(texts) == 1 else searched(pattern).pattern()
            read[text] = _met([read[text], schema]) if text in read else schema
        part = _beyond(part, given, list(read))
    except Untranslatable as error:
        note("patternProperties", "verified", f"names with {error} cannot be told while decoding.")
        return _any_name(part)
    if len(read) > 1:
        read = _set_apart(read, given, note)
    return {**part, "patternProperties": _beside(part, read, note)}


def _beyond(part: Json, given: Json, texts: list[str]) -> Json:
    """A part in which declared names that only Python's reading of a pattern finds meet its schema by themselves."""
    declared = cast("Json", part.get("properties", {}))
    found: Json = {}
    for name in (*declared, *cast("list[str]", part.get("required", []))):
        held = [schema for pattern, schema in given.items() if matches(pattern, name)]
        if held and not any(matches(text, name) for text in texts):
            found[name] = _met([declared.get(name, True), *held])
    return {**part, "properties": {**declared, **found}} if found else part


def _beside(part: Json, patterns: Json, note: Note) -> Json:
    """`patterns` without those declared names for which llguidance has no conjunction of both schemas."""
    declared = cast("Json", part.get("properties", {}))
    kept: Json = {}
    for pattern, schema in patterns.items():
        names = [name for name, own in declared.items() if matches(pattern, name) and met([own, schema]) is None]
        if names:
            note("patternProperties", "verified", f"the declared {names[0]!r} is not held to a pattern's schema too.")
            rest = searched(pattern).minus(listed(names))
            pattern = "" if rest.empty else rest.pattern()
        if pattern or not names:
            kept[pattern] = schema
    return kept


def _set_apart(read: Json, given: Json, note: Note) -> Json:
    """Patterns for the names that match one of `read`, and for those that match several; all of them disjoint.

    A name that only one dialect finds another pattern in is under neither.
    """
    schemas = list(read.values())
    together = "|".join(f"(?:{pattern})" for pattern in read)
    if all(schema == schemas[0] for schema in schemas):
        return {together: schemas[0]}
    try:
        narrow = [searched(pattern) for pattern in given]
        wide = [searched(pattern, wide=True) for pattern in given]
        if all(narrow[i].both(wide[j]).empty for i, j in permutations(range(len(given)), 2)):
            return read
        cells: list[tuple[Automaton, list[object]]] = [(searched(""), [])]
        for inside, outside, schema in zip(narrow, wide, given.values(), strict=True):
            cells = [
                cell
                for names, held in cells
                for cell in ((names.both(inside), [*held, schema]), (names.minus(outside), held))
                if not cell[0].empty
            ]
        return {names.pattern(): _met(held) for names, held in cells if held}
    except Untranslatable:
        note("patternProperties", "verified", "a name that matches several patterns is held to one of them only.")
        return {together: {"anyOf": schemas}}


def _met(schemas: list[object]) -> object:
    schema = met(schemas)
    if schema is None:
        raise Untranslatable("several schemas")
    return schema


def _any_name(part: Json) -> Json:
    """A part whose names with a pattern are as free as all its names together."""
    others = part.get("additionalProperties", True)
    named = [*cast("Json", part["patternProperties"]).values(), others]
    free = any(schema is True or schema == {} for schema in named)
    schema = True if free else {"anyOf": [one for one in named if one is not False]}
    return {**without(part, "patternProperties"), "additionalProperties": schema}


def _unescaped(part: Json, given: list[str], note: Note) -> Json:
    """All names that match no `given` pattern as a pattern too.

    In those of ``additionalProperties`` llguidance takes any escape, so that ``"\\u0061"`` would stand for a declared
    ``"a"`` and have a value of another schema.
    """
    others = part.get("additionalProperties", True)
    declared, patterns = cast("Json", part.get("properties", {})), cast("Json", part.get("patternProperties", {}))
    free = others is True or others == {}
    if free and all(schema is True or schema == {} for schema in patterns.values()):
        patterns = {}
    if others is False or not (declared or patterns) or not COMBINING.isdisjoint(part):
        return without(part, "patternProperties") if free and not patterns else part
    if free and not patterns and not any(map(_escaped, declared)):
        rest = _ANY  # but for declared names, which llguidance sees to
    else:
        try:
            rest = _rest(given if patterns else [], [] if free and not any(map(_escaped, declared)) else list(declared))
        except Untranslatable:
            note("additionalProperties", "verified", "with escapes a declared name could be written as another one.")
            return part
    named = {**patterns, rest: others} if rest is not None else patterns
    return {**without(part, "patternProperties"), "patternProperties": named, "additionalProperties": False}


def _escaped(name: str) -> bool:
    """Whether JSON has several spellings of a name that llguidance admits: control characters."""
    return any(char < " " or char == "\x7f" for char in name)


def _rest(patterns: list[str], declared: list[str]) -> str | None:
    """A pattern of the names that match none of `patterns` and are not `declared`; None if there are none."""
    if len(declared) > _DECLARED:
        raise Untranslatable("size")
    rest = searched("")
    for pattern in patterns:
        rest = rest.minus(searched(pattern, wide=True))
    if declared:
        rest = rest.minus(listed(declared))
    return None if rest.empty else rest.pattern()


def _names(part: Json, note: Note) -> Json:
    """``propertyNames`` as a list of names, or as a pattern that all names match."""
    rule = part.get("propertyNames", True)
    part = without(part, "propertyNames")
    if rule is False:
        return {**part, "maxProperties": 0}
    if not isinstance(rule, dict) or not admits(cast("Json", rule), "string"):
        return part if rule is True else {**part, "maxProperties": 0}
    names = without(cast("Json", rule), "type", "title", "description", "$comment")
    if not names:
        return part
    if "enum" in names or "const" in names:
        given = cast("list[object]", names.get("enum", [names.get("const")]))
        return _listed(part, [name for name in given if isinstance(name, str) and satisfies(name, names)])
    try:
        return _named(part, names)
    except Untranslatable:
        note("propertyNames", "verified", "names cannot be held to this schema while decoding.")
        return part


def _named(part: Json, rule: Json) -> Json:
    """A part all of whose names satisfy a schema of patterns and lengths.

    Raises:
        Untranslatable: the schema says more than that, or too much.
    """
    patterns = _patterns_of(rule)
    declared = cast("Json", part.get("properties", {}))
    properties = {name: schema if _fits(patterns, name) else False for name, schema in declared.items()}
    part = {**part, "properties": properties} if properties else part
    given = cast("Json", part.get("patternProperties", {}))
    others = part.get("additionalProperties", True)
    taken = [] if others in (True, {}) else [name for name, schema in properties.items() if schema is not False]
    if not given and not taken and len(patterns) == 1:
        return {**part, "patternProperties": {patterns[0]: others}, "additionalProperties": False}
    free = searched(patterns[0])
    for pattern in patterns[1:]:
        free = free.both(searched(pattern))
    read: Json = {}
    rest = free.minus(listed(taken)) if taken else free
    for pattern, schema in given.items():
        shared, rest = searched(pattern).both(free), rest.minus(searched(pattern, wide=True))
        if not shared.empty:
            read[shared.pattern()] = schema
    if others is not False and not rest.empty:
        read[rest.pattern()] = others
    return {**without(part, "patternProperties"), "patternProperties": read, "additionalProperties": False}


def _patterns_of(rule: Json) -> list[str]:
    """What a schema for names says, as patterns."""
    if not rule.keys() <= {"pattern", "allOf", "minLength", "maxLength"}:
        raise Untranslatable("other keywords")
    found: list[str] = [rule["pattern"]] if "pattern" in rule else []
    for beside in cast("list[Json]", rule.get("allOf", [])):
        if beside.keys() != {"pattern"}:
            raise Untranslatable("other keywords")
        found.append(beside["pattern"])
    if "minLength" in rule or "maxLength" in rule:
        found.append(f"^(?s:.){{{rule.get('minLength', 0)},{rule.get('maxLength', '')}}}$")
    return found


def _fits(patterns: list[str], name: str) -> bool:
    return all(matches(pattern, name) for pattern in patterns)


def _listed(part: Json, names: list[str]) -> Json:
    """A part with no other names than these."""
    declared = cast("Json", part.get("properties", {}))
    ordered = dict.fromkeys([*declared, *cast("list[str]", part.get("required", [])), *names])
    properties = {name: _member(part, name) for name in ordered if name in names}
    closed = {"properties": properties, "additionalProperties": False}
    return {**without(part, "properties", "patternProperties", "additionalProperties"), **closed}


def _member(part: Json, name: str) -> object:
    """What a part demands of the member of a name."""
    declared = cast("Json", part.get("properties", {}))
    patterns = cast("Json", part.get("patternProperties", {}))
    found = [declared[name]] if name in declared else []
    found += [schema for pattern, schema in patterns.items() if matches(pattern, name)]
    if not found:
        return part.get("additionalProperties", True)
    return found[0] if len(found) == 1 else {"allOf": found}


def _bounds(part: Json, note: Note) -> Json:
    """``minProperties`` and ``maxProperties`` by which of the optional properties are there."""
    least, most = part.get("minProperties", 0), part.get("maxProperties")
    rest = without(part, "minProperties", "maxProperties")
    properties = cast("Json", part.get("properties", {}))
    required = set(cast("list[str]", part.get("required", [])))
    closed = part.get("additionalProperties") is False and not part.get("patternProperties")
    optional = [name for name, schema in properties.items() if name not in required and schema is not False]
    if most is not None and most < max(least, len(required)):
        return _none(part)
    if least <= len(required) and (most is None or (closed and most >= len(required) + len(optional))):
        return rest
    if not optional and not closed:
        return part  # llguidance counts
    need = max(0, least - len(required))
    room = len(optional) if most is None else most - len(required)
    branches = _counted(rest, optional, need, room, closed, most) if COMBINING.isdisjoint(part) else None
    if branches is None:
        for key in ("minProperties", "maxProperties"):
            if key in part:
                note(key, "verified", "so many kinds of objects cannot be told apart while decoding.")
        return rest
    if not branches:
        return _none(part)
    return {"anyOf": [*branches, *_others(part)], **lasting(part)}


def _none(part: Json) -> Json:
    """A part that no object satisfies."""
    return {**without(part, *_KEYWORDS), "minProperties": 1, "maxProperties": 0}


def _counted(
    part: Json, optional: list[str], need: int, room: int, closed: bool, most: int | None
) -> list[Json] | None:
    """Kinds of objects by their optional properties; None if they are too many.

    Without an upper bound a branch is told by the first `need` properties that are there, else by all of them. Where
    other names are allowed too, fewer properties may be there, and llguidance counts the rest.
    """
    total = len(optional)
    sizes = range(need, min(room, total) + 1 if most is not None else min(need, total) + 1)
    fewer = range(0 if closed else min(need, total + 1))
    if not closed and most is not None:
        sizes, fewer = range(min(room, total) + 1), range(0)
    branches = sum(math.comb(total, size) for size in (*sizes, *fewer))
    members = max(1, len(cast("Json", part.get("properties", {}))))
    if branches * members > _MEMBERS:
        return None
    found: list[Json] = []
    for size in sizes:
        for chosen in combinations(optional, size):
            ends = total if most is not None else optional.index(chosen[-1]) + 1 if chosen else 0
            absent = [name for name in optional[:ends] if name not in chosen]
            counts: Json = {}
            if not closed and most is not None:
                counts = {"minProperties": need, "maxProperties": room}
            found.append(_branch(part, chosen, absent, counts))
    for size in fewer:
        for chosen in combinations(optional, size):
            absent = [name for name in optional if name not in chosen]
            found.append(_branch(part, chosen, absent, {"minProperties": need}))
    return found


def _branch(part: Json, chosen: tuple[str, ...], absent: list[str], counts: Json) -> Json:
    """Objects with the `chosen` properties and without the `absent` ones; `counts` are of optional properties."""
    required = [*cast("list[str]", part.get("required", [])), *chosen]
    properties = {name: False if name in absent else schema for name, schema in part["properties"].items()}
    if part.get("additionalProperties") is False and not part.get("patternProperties"):
        properties = {name: schema for name, schema in properties.items() if schema is not False}
    known = len(set(cast("list[str]", part.get("required", []))))
    kind: Json = {"type": "object", "properties": properties, "required": required}
    return {
        **without(part, *lasting(part), "type"),
        **kind,
        **{key: count + known for key, count in counts.items()},
    }


def _others(part: Json) -> list[Json]:
    """Values of the part's other types: its object keywords say nothing about them."""
    kinds = part.get("type", ["null", "boolean", "number", "string", "array"])
    others = [kind for kind in (cast("list[str]", kinds) if isinstance(kinds, list) else [kinds]) if kind != "object"]
    plain = without(part, *_KEYWORDS, *lasting(part))
    return [{**plain, "type": others}] if others else []


def _repeats(part: Json, note: Note) -> None:
    """Say that names which are not declared could come twice, where they are counted. Elsewhere a document that repeats
    a name satisfies the schema all the same: it is read as the last member of that name."""
    counted = part.get("minProperties", 0) - len(cast("list[str]", part.get("required", [])))
    if not COMBINING.isdisjoint(part) or counted < 2 or part.get("maxProperties", 2) < 2:
        return
    if part.get("additionalProperties") is not False or part.get("patternProperties"):
        note("minProperties", "verified", "a name that is not declared could be written twice.")
