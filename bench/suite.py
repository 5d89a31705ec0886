"""The official JSON-Schema-Test-Suite by keyword: exact, verified or refused, and no case wrong.

    python bench/suite.py [--quick] [--data FILE] [--json FILE] [--list]

Every case of drafts 2020-12 and 7, with their optional formats, is put to the grammar of its schema.

    wrong       an invalid instance comes through, and jsonschema finds it invalid too
    lenient     it comes through, and jsonschema takes it as well
    rejected    a valid instance does not come through: `bound`: a number beyond our own bounds, or written otherwise
                (1.0 for an integer); `order`: only in another order of its keys; `text`: half a surrogate pair;
                `label`: jsonschema rejects it too (it enforces formats, annotations in the suite's main part); `other`
    jsonschema  cases in which jsonschema differs from the suite
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.instances import Outcome
from bench.pool import run

DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
}
QUICK = ("allOf", "anyOf", "contains", "if-then-else", "not", "oneOf", "properties", "required", "uniqueItems", "enum")


def groups(archive: Path) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(draft, keyword, groups) of each file, optional ones of the formats only.

    Raises:
        SystemExit: the archive is not there; says what to pass.
    """
    if not archive.is_file():
        raise SystemExit(
            f"{archive} does not exist. Pass --data FILE (or set AGENTKIT_DATA): a .tar.gz of tests/ of "
            "github.com/json-schema-org/JSON-Schema-Test-Suite."
        )
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            name = member.name.removeprefix("./")
            parts = Path(name).parts
            if parts[:1] != ("tests",) or not name.endswith(".json") or parts[1] not in DRAFTS:
                continue
            inner = parts[2:-1]
            if inner not in ((), ("optional", "format")):
                continue
            file = tar.extractfile(member)
            assert file is not None
            yield parts[1], "/".join((*inner[1:], Path(name).stem)), json.loads(file.read())


def cases(draft: str, keyword: str, content: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(group, line) of each schema, in the form of `instances.examine`."""
    for group in content:
        schema = group["schema"]
        if isinstance(schema, dict):
            schema = {"$schema": DRAFTS[draft], **cast("dict[str, Any]", schema)}
        line = {"id": f"{draft}/{keyword}: {group['description']}", "schema": schema, "tests": group["tests"]}
        yield f"{draft}/{keyword}", json.dumps(line)


def figures(outcomes: list[Outcome]) -> dict[str, Any]:
    """Of one keyword, or of all."""
    row = Counter[str](one.status for one in outcomes)
    rejected = Counter[str]()
    for trial in (trial for one in outcomes for trial in one.trials):
        row["cases"] += 1
        row["wrong"] += trial.wrong
        row["lenient"] += trial.mislabelled
        row["jsonschema"] += trial.valid != trial.judged
        if trial.valid and not trial.accepted:
            rejected[trial.reason] += 1
    return {"schemas": len(outcomes), **row, "rejected": dict(rejected)}


HEAD = (
    f"{'':<42}{'schemas':>8}{'exact':>7}{'verif.':>7}{'refused':>8}{'lost':>5}{'cases':>7}{'wrong':>6}{'lenient':>8}"
    f"{'jsonschema':>11}  rejected"
)


def line(name: str, row: dict[str, Any]) -> str:
    """`row` under `HEAD`."""
    numbers = [(8, "schemas"), (7, "exact"), (7, "verified"), (8, "refused"), (5, "lost"), (7, "cases")]
    numbers += [(6, "wrong"), (8, "lenient"), (11, "jsonschema")]
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(row["rejected"].items()))
    return f"{name:<42}" + "".join(f"{row.get(key, 0):>{width}}" for width, key in numbers) + f"  {reasons}"


def offenders(outcomes: list[Outcome]) -> None:
    """Cases that went wrong, and schemas that were refused, with the reasons."""
    for one in outcomes:
        if one.status not in ("exact", "verified"):
            print(f"{one.status}: {one.id}: {one.reason}")
        for i, trial in enumerate(one.trials):
            if trial.wrong or trial.mislabelled or trial.masked:
                print(f"{'WRONG' if trial.wrong else 'MASKED' if trial.masked else 'lenient'}: {one.id}, case {i}")
            if trial.valid and not trial.accepted:
                print(f"rejected ({trial.reason}): {one.id}, case {i}: …{trial.where}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("AGENTKIT_DATA", "data")) / "json-schema-test-suite" / "suite.tar.gz"
    parser.add_argument("--quick", action="store_true", help="ten keywords of draft 2020-12")
    parser.add_argument("--data", type=Path, default=default, help="default: under $AGENTKIT_DATA")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--list", action="store_true", help="print what is wrong, rejected or refused")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    lines = [
        case
        for draft, keyword, content in groups(args.data)
        if not args.quick or (draft == "draft2020-12" and keyword in QUICK)
        for case in cases(draft, keyword, content)
    ]
    outcomes = run("ours", lines, args.jobs, patience=20.0)
    rows = {name: figures([one for one in outcomes if one.group == name]) for name in dict(lines)}
    rows["all"] = figures(outcomes)
    print(HEAD)
    for name, row in rows.items():
        print(line(name, row))
    if args.list:
        offenders(outcomes)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    total = rows["all"]
    taken = total.get("exact", 0) + total.get("verified", 0)
    print(
        f"{taken} of {total['schemas']} schemas exact or verified, {total['wrong']} cases wrong (target 0), "
        f"{total['rejected'].get('other', 0)} valid cases rejected for another reason than bounds, order and text"
    )


if __name__ == "__main__":
    main()
