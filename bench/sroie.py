"""Receipts of SROIE: which fields the embedded model reads right, as free text, constrained, and with drafts.

    python bench/sroie.py [--quick] [--json FILE] [--model NAME] [--data DIR]

Three engines read each receipt one after the other, in turns: the first writes free text, in which the first JSON object
is looked for; the second is constrained by the schema; the third has drafts as well. A field is right if it is the gold
value but for case and white space; a total if it is the same number. ``ceiling`` is the share of gold values that the
text holds at all. The data (ICDAR 2019 SROIE, `receipts.jsonl.gz`) is not part of this project.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from pydantic import BaseModel

from agentkit import Agent, AgentError, Limits, extract
from agentkit.models import resolve
from agentkit.runtime.engine import Engine
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Usage

FIELDS = ("company", "date", "address", "total")
INSTRUCTIONS = (
    "You read receipts. Answer with JSON: "
    '{"company": name of the shop, "date": as printed, "address": of the shop, "total": the amount to pay}.'
)
MAX_TOKENS = 200


class Receipt(BaseModel):
    """What is read."""

    company: str
    date: str
    address: str
    total: str


@dataclass(slots=True)
class Way:
    """One way to read receipts.

    Attributes:
        seconds: of each receipt.
        right: for each receipt and field whether it was read right.
        confidence: of the fields, where it is known.
        failed: receipts of which there is no record.
    """

    engine: Engine
    constrained: bool
    seconds: list[float] = field(default_factory=list[float])
    right: list[bool] = field(default_factory=list[bool])
    confidence: list[float] = field(default_factory=list[float])
    usage: Usage = field(default_factory=Usage)
    failed: int = 0

    async def read(self, text: str, gold: Mapping[str, str]) -> None:
        """Read one receipt and compare it with what it says."""
        begin = time.perf_counter()
        found: Mapping[str, Any] = {}
        try:
            if self.constrained:
                record = await extract(
                    text, Receipt, model=self.engine, instructions=INSTRUCTIONS, max_tokens=MAX_TOKENS
                )
                found = record.output.model_dump()
                self.usage += record.usage
                self.confidence += [record.evidence[f"/{name}"].confidence for name in FIELDS]
            else:
                limits = Limits(steps=1, turn_tokens=MAX_TOKENS)
                result = await Agent(instructions=INSTRUCTIONS, model=self.engine, limits=limits).run(text)
                found = parsed(result.output)
                self.usage += result.usage
        except AgentError:
            self.confidence += [0.0] * len(FIELDS) * self.constrained
        self.seconds.append(time.perf_counter() - begin)
        self.failed += not found
        self.right += [same(name, found.get(name), gold[name]) for name in FIELDS]


def parsed(text: str) -> Mapping[str, Any]:
    """The first JSON object in a text; an empty one if there is none."""
    for match in re.finditer(r"\{", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, match.start())
        except ValueError:
            continue
        return value
    return {}


def same(name: str, value: object, gold: str) -> bool:
    """Whether a field was read right."""
    if name == "total":
        return number(str(value)) is not None and number(str(value)) == number(gold)
    return squeezed(str(value)) == squeezed(gold)


def number(text: str) -> float | None:
    match = re.search(r"\d[\d,]*(\.\d+)?", text)
    return float(match[0].replace(",", "")) if match else None


def squeezed(text: str) -> str:
    return "".join(text.casefold().split())


def separation(scores: Sequence[float], right: Sequence[bool]) -> float:
    """How often a right field has more confidence than a wrong one, ties counted half (the area under the ROC curve)."""
    good = [score for score, is_right in zip(scores, right, strict=True) if is_right]
    bad = [score for score, is_right in zip(scores, right, strict=True) if not is_right]
    wins = sum((a > b) + 0.5 * (a == b) for a in good for b in bad)
    return wins / (len(good) * len(bad)) if good and bad else float("nan")


def load_receipts(folder: Path, count: int) -> list[dict[str, Any]]:
    path = folder / "receipts.jsonl.gz"
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: give the folder of the data with --data, or in AGENTKIT_DATA above sroie/"
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


async def compare(ways: Sequence[Way], receipts: Sequence[Mapping[str, Any]]) -> None:
    for index, receipt in enumerate(receipts):
        for turn in range(len(ways)):
            await ways[(index + turn) % len(ways)].read(receipt["text"], receipt["fields"])


def row(way: Way) -> dict[str, float]:
    made = way.usage.decoded + way.usage.forced
    each = {name: way.right[i :: len(FIELDS)] for i, name in enumerate(FIELDS)}
    return {
        **{name: statistics.mean(right) for name, right in each.items()},
        "all": statistics.mean(way.right),
        "no record": float(way.failed),
        "forced": way.usage.forced / max(made, 1),
        "accepted": way.usage.accepted / max(way.usage.drafted, 1),
        "seconds": statistics.median(way.seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six receipts instead of a hundred")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a .gguf file")
    default = Path(os.environ.get("AGENTKIT_DATA", ".")) / "sroie"
    parser.add_argument("--data", type=Path, default=default, help="folder of receipts.jsonl.gz (AGENTKIT_DATA/sroie)")
    args = parser.parse_args()
    receipts = load_receipts(args.data, 6 if args.quick else 100)
    path = resolve(args.model)
    plain, drafting = (Options(context=8192, kv_bytes=1 << 29, drafts=drafts) for drafts in (False, True))
    ways = {
        "free text": Way(load_engine(path, plain), False),
        "constrained": Way(load_engine(path, plain), True),
        "with drafts": Way(load_engine(path, drafting), True),
    }
    anyio.run(compare, list(ways.values()), receipts)
    rows = {name: row(way) for name, way in ways.items()}
    inside = [squeezed(r["fields"][name]) in squeezed(r["text"]) for r in receipts for name in FIELDS]
    rows["ceiling"] = {name: statistics.mean(inside[i :: len(FIELDS)]) for i, name in enumerate(FIELDS)}
    rows["ceiling"]["all"] = statistics.mean(inside)
    print(f"{'':<14}" + "".join(f"{column:>11}" for column in rows["free text"]))
    for name, cells in rows.items():
        print(f"{name:<14}" + "".join(f"{value:>11.3f}" for value in cells.values()))
    constrained = ways["constrained"]
    auc = separation(constrained.confidence, constrained.right)
    print(f"a right field has more confidence than a wrong one in {auc:.2f} of all pairs")
    for way in ways.values():
        way.engine.close()
    if args.json:
        args.json.write_text(json.dumps({"receipts": len(receipts), "rows": rows, "separation": auc}, indent=1))
    free, bound, drafted = (rows[name] for name in ways)
    print(
        f"fields read right of {len(receipts)} receipts: {free['all']:.3f} as free text, {bound['all']:.3f} constrained "
        f"(target: no less), {drafted['all']:.3f} with drafts, which take {drafted['seconds'] / bound['seconds']:.2f}x the "
        "time"
    )


if __name__ == "__main__":
    main()
