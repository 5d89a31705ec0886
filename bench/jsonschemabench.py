"""JSONSchemaBench: every schema with its instances, ours beside the three libraries behind Outlines.

    python bench/jsonschemabench.py [--quick] [--data DIR] [--only CLASS…] [--json FILE] [--list]

Each instance is put token by token to its schema's grammar, a valid one to its masks too; jsonschema with its format
checker is the judge. Instances are written by json.dumps with their keys in the order the schema declares, as
every grammar here wants them. Ours runs on all schemas, the libraries on a sample of each class, with ours on the same
sample beside them. Every backend works in processes of its own under a time-out and a memory limit.

    exact       the grammar alone promises a valid document        verified   it is wider: jsonschema judges the end
    wrong       an invalid instance comes through (by the grammar, where verified by grammar and judge): target 0
    label       the same, but jsonschema finds no fault with the instance either
    rejected    a valid instance does not come through: `order`: only in another order of its keys; `bound`: for a
                number beyond our own bounds; `complex`: llguidance gave up half-way; `other`
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.backends import installed
from bench.instances import Outcome
from bench.pool import run

CLASSES = (
    "Glaiveai2K",
    "MCPspec",
    "JME",
    "Github_trivial",
    "Github_easy",
    "Github_medium",
    "Snowplow",
    "JsonSchemaStore",
)
CALLING = ("Glaiveai2K", "MCPspec", "JME")  # what functions and tools look like
TARGETS = {"covered": 0.97, "calling": 0.99, "wrong": 0, "compile": (3.0, 50.0), "mask": (20.0, 500.0)}
SEED = 20261126


@dataclass(slots=True)
class Row:
    """Figures of one class or one backend; times in ms (compile) and µs (mask) of CPU."""

    schemas: int = 0
    exact: int = 0
    verified: int = 0
    refused: int = 0
    lost: int = 0  # time-out, memory or a crash
    right: int = 0
    tested: int = 0  # compiled schemas with instances
    valid: int = 0
    accepted: int = 0
    invalid: int = 0
    wrong: int = 0
    label: int = 0
    masked: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    compile: tuple[float, float] = (0.0, 0.0)
    mask: tuple[float, float] = (0.0, 0.0)

    @property
    def covered(self) -> float:
        """Share of schemas that are exact or verified."""
        return (self.exact + self.verified) / max(1, self.schemas)


def tabulate(outcomes: Iterable[Outcome]) -> Row:
    """The figures of some schemas."""
    row, rejected = Row(), Counter[str]()
    compiles: list[float] = []
    masks: list[np.ndarray] = []
    for one in outcomes:
        row.schemas += 1
        match one.status:
            case "exact":
                row.exact += 1
            case "verified":
                row.verified += 1
            case "refused":
                row.refused += 1
            case _:
                row.lost += 1
        if one.status not in ("exact", "verified"):
            continue
        compiles.append(one.milliseconds)
        masks.append(np.frombuffer(one.masks, dtype=np.uint32))
        row.tested += bool(one.trials)
        row.right += bool(one.trials) and all(trial.right for trial in one.trials)
        for trial in one.trials:
            row.valid += trial.valid
            row.invalid += not trial.valid
            row.accepted += trial.valid and trial.accepted
            row.masked += trial.masked
            row.wrong += trial.wrong
            row.label += trial.mislabelled
            if trial.valid and trial.reason:
                rejected[trial.reason] += 1
    row.rejected = dict(rejected)
    row.compile = _percentiles(np.array(compiles))
    row.mask = _percentiles(np.concatenate(masks) / 1e3 if masks else np.array([]))
    return row


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    if not values.size:
        return 0.0, 0.0
    return float(np.percentile(values, 50)), float(np.percentile(values, 99))


HEAD = (
    f"{'':<16}{'schemas':>8}{'exact':>7}{'verif.':>7}{'refused':>8}{'lost':>6}{'covered':>9}{'right':>12}"
    f"{'wrong':>7}{'label':>7}{'valid taken':>14}{'compile ms':>14}{'mask µs':>14}  valid but rejected"
)


def line(name: str, row: Row) -> str:
    """`row` under `HEAD`."""
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(row.rejected.items(), key=lambda item: -item[1]))
    times = f"{row.compile[0]:>7.1f}{row.compile[1]:>7.0f}{row.mask[0]:>7.0f}{row.mask[1]:>7.0f}"
    return (
        f"{name:<16}{row.schemas:>8}{row.exact:>7}{row.verified:>7}{row.refused:>8}{row.lost:>6}{row.covered:>9.1%}"
        f"{f'{row.right}/{row.tested}':>12}{row.wrong:>7}{row.label:>7}{f'{row.accepted}/{row.valid}':>14}{times}"
        f"  {reasons}{f' MASKED {row.masked}' if row.masked else ''}"
    )


def load(folder: Path, only: list[str]) -> dict[str, list[str]]:
    """The lines of each class: ``{id, schema, tests}`` as JSON.

    Raises:
        SystemExit: the data is not there; says what to pass.
    """
    missing = [name for name in only if not (folder / f"{name}.jsonl.gz").is_file()]
    if missing:
        raise SystemExit(
            f"{folder} has no {missing[0]}.jsonl.gz. Pass --data DIR (or set AGENTKIT_DATA to its parent): a folder "
            "with one gzipped file of JSON lines {id, schema, tests: [{valid, data}]} a class, from maskbench/data "
            "of github.com/guidance-ai/jsonschemabench. It states no licence, so it is not part of this project."
        )
    lines: dict[str, list[str]] = {}
    for name in only:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            lines[name] = (
                file.read().rstrip("\n").split("\n")
            )  # a string may hold what splitlines takes for a line's end
    return lines


def sample(lines: dict[str, list[str]], count: int, seed: int) -> dict[str, list[str]]:
    """`count` of each class, drawn evenly."""
    rng = random.Random(seed)
    return {name: rng.sample(all_, min(count, len(all_))) for name, all_ in lines.items()}


def interleaved(lines: dict[str, list[str]]) -> list[tuple[str, str]]:
    """(class, line), one of each class in turn, so that a run that is cut short has seen all classes."""
    longest = max(map(len, lines.values()), default=0)
    return [(name, all_[i]) for i in range(longest) for name, all_ in lines.items() if i < len(all_)]


def offenders(outcomes: list[Outcome]) -> None:
    """What is wrong, rejected, refused or slow, worst first."""
    for one in outcomes:
        for i, trial in enumerate(one.trials):
            if trial.wrong or trial.mislabelled:
                print(f"{'WRONG' if trial.wrong else 'label'}: {one.id} test {i}: {one.reason}")
            if trial.masked:
                print(f"MASKED: {one.id} test {i}")
            if trial.valid and trial.reason:
                print(f"rejected ({trial.reason}): {one.id} test {i}: …{trial.where}")
    for one in outcomes:
        if one.status not in ("exact", "verified"):
            print(f"{one.status}: {one.id}: {one.reason}")
    for one in sorted(outcomes, key=lambda one: -one.milliseconds)[:20]:
        print(f"slow to compile: {one.id}: {one.milliseconds:.0f} ms")
    slowest = [(max(np.frombuffer(one.masks, dtype=np.uint32), default=0), one.id) for one in outcomes]
    for nanoseconds, name in sorted(slowest, reverse=True)[:20]:
        print(f"slow to mask: {name}: {nanoseconds / 1e3:.0f} µs")


def verdict(rows: dict[str, Row]) -> str:
    """The figures beside their targets on one line."""
    total = rows["all"]
    part = [rows[name] for name in CALLING if name in rows]
    calling = sum(r.exact + r.verified for r in part) / max(1, sum(r.schemas for r in part))
    return (
        f"covered {total.covered:.1%} (target {TARGETS['covered']:.0%}), function calling {calling:.1%} "
        f"({TARGETS['calling']:.0%}), wrong {total.wrong} (0), masks that exclude what is legal {total.masked} (0), "
        f"compile p50 {total.compile[0]:.1f} ms (3) p99 {total.compile[1]:.0f} ms (50), "
        f"mask p50 {total.mask[0]:.0f} µs (20) p99 {total.mask[1]:.0f} µs (500)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("AGENTKIT_DATA", "data")) / "jsonschemabench"
    parser.add_argument("--quick", action="store_true", help="30 schemas a class, the libraries for 8 s each")
    parser.add_argument("--data", type=Path, default=default, help="default: $AGENTKIT_DATA/jsonschemabench")
    parser.add_argument("--only", nargs="+", choices=CLASSES, default=list(CLASSES), metavar="CLASS")
    parser.add_argument("--count", type=int, help="schemas of a class that ours runs on; default: all")
    parser.add_argument("--sample", type=int, default=25, help="schemas of a class that the libraries run on; 0: none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--list", action="store_true", help="print what is wrong, rejected, refused or slow with ours")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    every = load(args.data, args.only)
    count = args.count or (30 if args.quick else 0)
    chosen = sample(every, count, SEED) if count else every
    patience = 5.0 if args.quick else 30.0

    begin = time.monotonic()
    ours = run("ours", interleaved(chosen), args.jobs, patience)
    print(f"agentkit, {len(ours)} schemas, {time.monotonic() - begin:.0f} s\n{HEAD}")
    rows = {name: tabulate(one for one in ours if one.group == name) for name in args.only}
    rows["all"] = tabulate(ours)
    for name, row in rows.items():
        print(line(name, row))
    if args.list:
        offenders(ours)

    beside: dict[str, Row] = {}
    if args.sample:
        few = interleaved(sample(chosen, min(args.sample, 8) if args.quick else args.sample, SEED + 1))
        print(f"\nbeside the libraries, {len(few)} schemas\n{HEAD}")
        for name in installed():
            outcomes = run(name, few, args.jobs, patience, budget=8.0 if args.quick else None)
            beside[name] = tabulate(outcomes)
            print(line(name, beside[name]), flush=True)
    if args.json:
        figures = {"classes": rows, "beside": beside}
        args.json.write_text(
            json.dumps({k: {n: asdict(r) for n, r in v.items()} for k, v in figures.items()}, indent=1)
        )
    print(verdict(rows))


if __name__ == "__main__":
    main()
