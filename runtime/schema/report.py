"""What becomes of each keyword of a schema: enforced by the grammar, verified afterwards, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

#: ``exact``: the grammar admits what the schema admits, or less. ``verified``: the grammar admits more, so a finished
#: document is validated, and what fails is decoded again. ``refused``: neither is possible.
Status = Literal["exact", "verified", "refused"]

#: How a rewriting of one part says what became of a keyword: the keyword, its status and the reason.
Note = Callable[[str, Status, str], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One keyword that is not simply enforced, or not to the letter.

    Attributes:
        pointer: JSON pointer of the schema that holds the keyword; ``""`` for the root.
        keyword: such as ``uniqueItems``.
        status: what becomes of it; ``exact`` for what is only noted, as an annotation or a bound of our own.
        reason: why, and for ``refused`` what to do.
    """

    pointer: str
    keyword: str
    status: Status
    reason: str

    def __str__(self) -> str:
        return f"{self.pointer or 'the root'}: {self.keyword}: {self.reason}"


@dataclass(frozen=True, slots=True)
class SchemaReport:
    """How a schema is enforced, as a whole and by keyword. A keyword without a finding is exact."""

    findings: tuple[Finding, ...] = ()

    @property
    def status(self) -> Status:
        """The worst of all findings."""
        found: set[Status] = {finding.status for finding in self.findings}
        return "refused" if "refused" in found else "verified" if "verified" in found else "exact"
