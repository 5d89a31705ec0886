"""The rewritings of one part's own keywords, in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Callable

from agentkit.runtime.schema import arrays, numbers, objects, strings, values
from agentkit.runtime.schema.kinds import Json
from agentkit.runtime.schema.report import Note

LEAVES: tuple[Callable[[Json, Note], Json], ...] = (
    values.rewrite,
    numbers.rewrite,
    strings.rewrite,
    arrays.rewrite,
    objects.rewrite,
)
