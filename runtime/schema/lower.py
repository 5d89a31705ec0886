"""Parts as alternatives: flat parts, one of which a document has to satisfy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import combinations
from typing import cast

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.schema.branches import overlapping
from agentkit.runtime.schema.conditions import plain
from agentkit.runtime.schema.merge import Children, common_types, meet
from agentkit.runtime.schema.negation import negate
from agentkit.runtime.schema.parts import Json, Part, is_loose, name_of, trivial, types
from agentkit.runtime.schema.report import Finding
from agentkit.runtime.schema.unevaluated import ALL, close, seen_by

_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "not", "$by", "unevaluatedProperties", "unevaluatedItems")
_UNEVALUATED = ("unevaluatedProperties", "unevaluatedItems")
#: What two lists of alternatives may become, and how often two are met in all, before the rest is left to the judge.
_ALTERNATIVES, _MEETINGS = 128, 3000
#: Parts that are lowered, and references that are followed, in all.
_LOWERINGS, _OPENINGS = 20_000, 100_000
#: Alternatives of a complement by which a branch of ``oneOf`` is made exclusive; sub-schemas looked into for emptiness.
_COMPLEMENT, _LEVELS = 12, 8
#: Branches of an ``anyOf`` of which all subsets are told apart where it matters which of them hold.
_SUBSETS = 3


class Lowering:
    """Takes the combinators out of the parts of one document.

    Attributes:
        children: how sub-schemas are seen when two parts are met.
    """

    def __init__(self, named: Mapping[str, Part]) -> None:
        self._named = named
        self._lowered: dict[tuple[int, bool], list[Json]] = {}
        self._kept: list[Part] = []  # whose ids are keys above
        self._conjunctions: dict[tuple[int, ...], Part] = {}
        self._inverses: dict[str, Part] = {}
        self._opening: list[str] = []
        self._checking: list[int] = []
        self._meetings = self._openings = self._lowerings = 0
        self.children = Children(self.both, self.empty)

    def lower(self, part: Part, seen: bool = False) -> list[Json]:
        """Flat parts, of which a value satisfies one if it satisfies `part`, and only then unless one is ``$loose``.

        Args:
            part: any.
            seen: tell in ``$seen`` what each evaluates.

        Raises:
            SchemaError: the part refers to itself without anything in between.
        """
        if part is False:
            return []
        if not seen and name_of(part) is not None:
            return [part]
        key = (id(part), seen)
        if key not in self._lowered:
            self._lowerings += 1
            if self._lowerings > _LOWERINGS:
                raise SchemaError("The schema has too many combinations. Use fewer conditions and alternatives.")
            alternatives = self._lower(part, seen)
            self._lowered[key] = alternatives
            self._kept.append(part)
        return self._lowered[key]

    def part(self, name: str) -> Part:
        """The part of this name."""
        return self._named[name]

    def inverse(self, name: str, loose: Finding) -> Part:
        """What does not satisfy the part of this name, to be looked at when needed."""
        if name not in self._inverses:
            self._inverses[name] = {"$at": loose.pointer, "$by": loose.keyword, "not": {"$ref": name}}
        return self._inverses[name]

    def opened(self, flat: Json, seen: bool = False) -> list[Json]:
        """`flat` itself, or the alternatives of what it refers to."""
        name = name_of(flat)
        if name is None:
            return [flat]
        if name in self._opening:
            at = flat.get("$at", "")
            raise SchemaError(f"At {at or 'the root'}: $ref leads to itself, so nothing is said. Correct it.", at)
        self._openings += 1
        if self._openings > _OPENINGS:
            raise SchemaError("The schema's references lead to each other too often. Use fewer alternatives.")
        self._opening.append(name)
        try:
            return [each for inner in self.lower(self._named[name], seen) for each in self.opened(inner, seen)]
        finally:
            self._opening.pop()

    def both(self, one: Part, two: Part) -> Part:
        """The conjunction of two parts, the same object for the same two."""
        if one is False or two is False:
            return False
        if trivial(one) or one is two:
            return two
        if trivial(two):
            return one
        members: list[Part] = []
        for part in (one, two):
            members += self._members(part)
        by_name: dict[str | int, Part] = {name_of(part) or id(part): part for part in members}
        unique = list(by_name.values())
        if len(unique) == 1:
            return unique[0]
        key = tuple(map(id, unique))
        if key not in self._conjunctions:
            self._kept += unique
            self._conjunctions[key] = {"$at": one.get("$at", ""), "allOf": unique}
        return self._conjunctions[key]

    def empty(self, part: Part) -> bool:
        """Whether nothing is known to satisfy a part."""
        if part is False:
            return True
        if id(part) in self._checking or len(self._checking) >= _LEVELS:
            return False
        opening, self._opening = self._opening, []
        self._checking.append(id(part))
        try:
            return not any(self.opened(flat) for flat in self.lower(part))
        finally:
            self._checking.pop()
            self._opening = opening

    def disjoint(self, one: Json, two: Json) -> bool:
        """Whether nothing is known to satisfy both of two flat parts."""
        return not self._meet(one, two)

    def _members(self, part: Json) -> Sequence[Part]:
        return cast("Sequence[Part]", part["allOf"]) if part.keys() <= {"$at", "allOf"} else [part]

    def _lower(self, part: Json, seen: bool) -> list[Json]:
        closing = any(key in part for key in _UNEVALUATED)
        inside = seen or closing
        if inside or "if" not in part or "then" in part or "else" in part:
            part = plain(part)
        own = {key: value for key, value in part.items() if key not in _COMBINING and key != "if"}
        if inside:
            own["$seen"] = seen_by(own)
        found = [own]
        if "$ref" in part:
            target = {"$at": part.get("$at", ""), "$ref": part["$ref"]}
            found = self._product(found, self.opened(target, inside) if inside else [target], part, "$ref")
        for inner in part.get("allOf", ()):
            found = self._product(found, self.lower(inner, inside), part, "allOf")
        if "not" in part:
            without = self.lower(negate(part["not"], self, _loose_not(part)))
            found = self._product(found, without, part, part.get("$by", "not"))
        if "anyOf" in part:
            found = self._product(found, self._any(part["anyOf"], inside, part), part, "anyOf")
        if "oneOf" in part:
            found = [flat for context in found for flat in self._one(context, part, inside)]
        if closing:
            found = [flat for open_ in found for flat in self._closed(open_, part)]
            if seen:
                return [{**flat, "$seen": flat["$seen"] | seen_by(part)} for flat in found]
            return [{key: value for key, value in flat.items() if key != "$seen"} for flat in found]
        return found

    def _any(self, branches: Sequence[Part], seen: bool, part: Json) -> list[Json]:
        lists = [self.lower(branch, seen) for branch in branches]
        flats = [flat for alternatives in lists for flat in alternatives]
        if not seen or len({flat["$seen"] for flat in flats}) <= 1:
            return flats
        if len(branches) <= _SUBSETS:  # several may hold, and then all that they evaluate counts
            for size in range(2, len(lists) + 1):
                for chosen in combinations(lists, size):
                    together = chosen[0]
                    for other in chosen[1:]:
                        together = self._product(together, other, part, "anyOf")
                    flats = [*together, *flats]
            return flats
        reason = "what is left unevaluated depends on which branches hold."
        loose = Finding(part.get("$at", ""), "anyOf", "verified", reason)
        union = reduce(lambda one, other: one | other, (flat["$seen"] for flat in flats))
        return [{**_loosened(flat, loose), "$seen": union} for flat in flats]

    def _one(self, context: Json, part: Json, seen: bool) -> list[Json]:
        """The alternatives of ``oneOf`` beside `context`: as they are where no two hold together, else each without the
        others', else loose."""
        branches: list[Part] = part["oneOf"]
        lists = [self._product([context], self.lower(branch, seen), part, "oneOf") for branch in branches]
        pairs = overlapping(lists, self)
        reason = "that exactly one branch fits is not enforced, only that one does."
        loose = Finding(part.get("$at", ""), "oneOf", "verified", reason)
        for i, j in pairs or ():
            for this, other in ((i, j), (j, i)):
                without = negate(branches[other], self, loose)
                alternatives = self.lower(without)
                if len(alternatives) > _COMPLEMENT or is_loose(without):
                    pairs = None
                    break
                lists[this] = self._product(lists[this], alternatives, part, "oneOf")
            if pairs is None:
                break
        flats = [flat for alternatives in lists for flat in alternatives]
        return flats if pairs is not None else [_loosened(flat, loose) for flat in flats]

    def _closed(self, flat: Json, part: Json) -> list[Json]:
        try:
            asked = close(flat, part.get("unevaluatedProperties"), part.get("unevaluatedItems"))
        except ValueError as error:
            loose = Finding(part.get("$at", ""), "unevaluatedItems", "verified", f"{error}; this is not followed.")
            return [_loosened(flat, loose)]
        return self._meet(flat, asked)

    def _product(self, ones: list[Json], twos: list[Json], part: Json, keyword: str) -> list[Json]:
        """Alternatives for what satisfies one of each; `ones`, loose, where they would be too many.

        Args:
            ones, twos: flat parts.
            part, keyword: where `twos` come from.
        """
        if len(ones) == 1 and trivial(ones[0]):
            return twos
        several = len(ones) > 1 and len(twos) > 1
        found: list[Json] = []
        if not several or len(ones) * len(twos) + self._meetings <= _MEETINGS:
            found = [flat for one in ones for two in twos for flat in self._meet(one, two)]
            if not several or len(found) <= _ALTERNATIVES:
                return found
        reason = "together with what stands beside it, this has too many alternatives."
        loose = Finding(part.get("$at", ""), keyword, "verified", reason)
        return [_loosened({**one, "$seen": ALL} if "$seen" in one else one, loose) for one in ones]

    def _meet(self, one: Json, two: Json) -> list[Json]:
        self._meetings += 1
        if trivial(one):
            return [two]
        if trivial(two):
            return [one]
        if name_of(one) is not None and name_of(one) == name_of(two):
            return [one]
        ones, twos = self.opened(one), self.opened(two)
        for flat, other, others in ((one, two, twos), (two, one, ones)):
            # A type beside a reference that allows no other says nothing new.
            if (
                name_of(other) is not None
                and flat.keys() <= {"$at", "type"}
                and all(common_types(types(each), types(flat)) == types(each) for each in others)
            ):
                return [other]
        met = (meet(first, second, self.children) for first in ones for second in twos)
        return [flat for flat in met if flat is not None]


def _loosened(flat: Json, loose: Finding) -> Json:
    if name_of(flat) is not None:
        return {"$at": flat.get("$at", ""), "allOf": (flat,), "$loose": (loose,)}
    return {**flat, "$loose": (*flat.get("$loose", ()), loose)}


def _loose_not(part: Json) -> Finding:
    reason = "this condition has no opposite that can be written as a grammar."
    if (keyword := part.get("$by", "not")) == "not":
        reason = "what is excluded cannot be written as a grammar."
    return Finding(part.get("$at", ""), keyword, "verified", reason)
