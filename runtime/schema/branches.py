"""Which branches of a ``oneOf`` can hold together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Protocol

from agentkit.runtime.schema.merge import property_of
from agentkit.runtime.schema.parts import Json, Part, identity

#: Alternatives of which all pairs are compared.
_PAIRS = 48


class Logic(Protocol):
    """What is asked about parts here."""

    def lower(self, part: Part) -> list[Json]: ...

    def opened(self, flat: Json) -> list[Json]: ...

    def disjoint(self, one: Json, two: Json) -> bool: ...


def overlapping(lists: Sequence[list[Json]], logic: Logic) -> list[tuple[int, int]] | None:
    """Pairs of branches that may hold together; None if there are too many to tell.

    Args:
        lists: each branch's alternatives.
        logic: answers questions about parts.
    """
    alive = [i for i, alternatives in enumerate(lists) if alternatives]
    if len(alive) > 2 and _tagged([lists[i] for i in alive], logic):
        return []
    if sum(len(lists[i]) for i in alive) > _PAIRS:
        return None
    return [
        (i, j)
        for i, j in combinations(alive, 2)
        if not all(logic.disjoint(one, two) for one in lists[i] for two in lists[j])
    ]


def _tagged(lists: Sequence[list[Json]], logic: Logic) -> bool:
    """Whether all branches are objects with a required property whose values are others in each."""
    branches = [[each for flat in alternatives for each in logic.opened(flat)] for alternatives in lists]
    if any(flat.get("type") not in ("object", ["object"]) for branch in branches for flat in branch):
        return False
    first = branches[0][0] if branches[0] else {}
    return any(_tells_apart(name, branches, logic) for name in first.get("required", ()))


def _tells_apart(name: str, branches: Sequence[list[Json]], logic: Logic) -> bool:
    taken: set[object] = set()
    for branch in branches:
        values: set[object] = set()
        for flat in branch:
            if name not in flat.get("required", ()):
                return False
            for inner in logic.lower(property_of(flat, name)):
                for each in logic.opened(inner):
                    if "enum" not in each:
                        return False
                    values.update(map(identity, each["enum"]))
        if values & taken:
            return False
        taken |= values
    return True
