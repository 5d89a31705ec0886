"""What a run finds: figures beside floors and targets, checks, and the table that shows them. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

REHEARSAL = "rehearsal, not a measurement"


@dataclass(frozen=True)
class Target:
    """What a figure should reach.

    Attributes:
        bound: in the figure's unit, or as a share of its floor.
        of: which of the two.
        at_most: whether less is better.
        goal: what would be excellent.
    """

    bound: float
    of: Literal["value", "share"] = "share"
    at_most: bool = False
    goal: float | None = None

    def met(self, figure: Figure) -> bool:
        value = figure.value if self.of == "value" else figure.share
        return value is not None and (value <= self.bound if self.at_most else value >= self.bound)

    def __str__(self) -> str:
        shown = [f"{x:.0%}" if self.of == "share" else f"{x:,g}" for x in (self.bound, self.goal) if x is not None]
        return ("at most " if self.at_most else "") + shown[0] + (f", goal {shown[1]}" if len(shown) > 1 else "")


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        name: what was measured.
        value: in ``unit``.
        role: ours, a peer's in the same run, a floor, or a part that explains another figure.
        share: of the floor, where there is one.
        floor: which floor.
        target: where one was set.
        note: the time behind a rate, the reason behind a number.
        rehearsal: whether there was no card, and the number means nothing.
    """

    name: str
    value: float
    unit: str
    role: Literal["ours", "peer", "floor", "part"] = "ours"
    share: float | None = None
    floor: str = ""
    target: Target | None = None
    note: str = ""
    rehearsal: bool = False

    @staticmethod
    def load(data: Mapping[str, Any]) -> Figure:
        target = Target(**data["target"]) if data["target"] else None
        return Figure(**{**data, "target": target})


@dataclass(frozen=True)
class Check:
    """A kernel beside its torch twin."""

    name: str
    passed: bool
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Note:
    """A sentence for the table: a peer that cannot run, and why."""

    text: str


@dataclass(frozen=True)
class Trial:
    """The proof that comes next: should the process not survive it, its name is known."""

    name: str


Item = Figure | Check | Note | Trial


@dataclass
class Section:
    """What one section found.

    Attributes:
        status: ``failed`` where it raised, faulted or hung, or a check did not pass; ``cut`` where time ran out on
            something that is no proof of ours (a peer, a suite), or before it was started.
        error: why it failed or was cut.
    """

    name: str
    status: Literal["ok", "failed", "cut"] = "ok"
    seconds: float = 0.0
    error: str = ""
    figures: list[Figure] = field(default_factory=list[Figure])
    checks: list[Check] = field(default_factory=list[Check])
    notes: list[str] = field(default_factory=list[str])

    def add(self, item: Item) -> None:
        if isinstance(item, Figure):
            self.figures.append(item)
        elif isinstance(item, Check):
            self.checks.append(item)
        elif isinstance(item, Note):
            self.notes.append(item.text)

    def judge(self) -> Section:
        """Fail where a check has failed."""
        wrong = [check.name for check in self.checks if not check.passed]
        if wrong:
            self.status = "failed"
            self.error = f"{len(wrong)} of {len(self.checks)} checks: {', '.join(wrong)}" + (
                f"; {self.error}" if self.error else ""
            )
        return self

    @staticmethod
    def load(data: Mapping[str, Any]) -> Section:
        figures = [Figure.load(x) for x in data["figures"]]
        return Section(**{**data, "figures": figures, "checks": [Check(**x) for x in data["checks"]]})


@dataclass
class Report:
    """A run.

    Attributes:
        machine: device, driver, clocks, versions, commit, date.
        dropped: what was left out to stay within the time.
    """

    rehearsal: bool
    machine: dict[str, str] = field(default_factory=dict[str, str])
    sections: list[Section] = field(default_factory=list[Section])
    dropped: list[str] = field(default_factory=list[str])
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        sections = {s.name: asdict(s) for s in self.sections}
        return asdict(self) | {"sections": sections, "passed": self.exit_code == 0}

    @property
    def exit_code(self) -> int:
        """0 when all sections ran and all checks passed; a missed target is a finding and no failure."""
        return int(any(s.status == "failed" for s in self.sections))

    def last_line(self) -> str:
        """Each figure that has a target, beside it."""
        checks = [check for s in self.sections for check in s.checks]
        said = [f"{sum(c.passed for c in checks)} of {len(checks)} checks right"] if checks else []
        said += [f"FAILED {s.name}" for s in self.sections if s.status == "failed"]
        for figure in (f for s in self.sections for f in s.figures if f.target is not None):
            assert figure.target is not None
            value = f"{figure.share:.0%}" if figure.target.of == "share" else f"{figure.value:,.3g} {figure.unit}"
            verdict = "" if self.rehearsal or figure.target.met(figure) else ", missed"
            said.append(f"{figure.name} {value} (target {figure.target}{verdict})")
        return (f"{REHEARSAL}: " if self.rehearsal else "") + " · ".join(said)

    def markdown(self) -> str:
        """The table, readable as it stands in a terminal."""
        lines = [f"**{REHEARSAL.capitalize()}.**", ""] if self.rehearsal else []
        lines += [" · ".join(f"{key} {value}" for key, value in self.machine.items()), ""]
        rows = [("section", "what", "measured", "of the floor", "target", "note"), ("---",) * 6]
        for section in self.sections:
            rows += self._rows(section)
        lines += ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]
        lines += [f"\n{section.name}: {note}" for section in self.sections for note in section.notes]
        lines += [f"\nLeft out to stay within the time: {what}" for what in self.dropped]
        return "\n".join([*lines, f"\n{self.seconds:.0f} s. {self.last_line()}", ""])

    def _rows(self, section: Section) -> Iterator[tuple[str, ...]]:
        if section.status != "ok":
            word = "FAILED" if section.status == "failed" else "cut off"
            yield section.name, word, "–", "–", "–", section.error
        if section.checks:
            right = sum(check.passed for check in section.checks)
            yield section.name, "checks right", f"{right} of {len(section.checks)}", "–", "all", ""
            for check in section.checks:
                if not check.passed:
                    yield section.name, check.name, "FAILED", "–", "–", check.detail
        for f in section.figures:
            name = f.name if f.role == "ours" else f"{f.name} ({f.role})"
            share = f"{f.share:.0%} of {f.floor}" if f.share is not None else "–"
            target = str(f.target) if f.target is not None else "–"
            if f.target is not None and not (f.rehearsal or f.target.met(f)):
                target += " **missed**"
            note = "; ".join(x for x in (f.note, REHEARSAL if f.rehearsal else "") if x)
            yield section.name, name, f"{f.value:,.4g} {f.unit}", share, target, note
