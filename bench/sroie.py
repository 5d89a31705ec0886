"""Receipts of SROIE: which fields the embedded model reads right, as free text, constrained, and with drafts.

    python bench/sroie.py [--quick] [--json FILE] [--model NAME] [--data DIR]

A receipt is read as free text, in which the first JSON object is looked for; constrained by the schema; and constrained
with drafts. Accuracy is that of all receipts, of which a few at a time are read together; tokens and time are those of
the first ten, read one at a time by an engine for each way in turns. A field is right if it is the gold value but for
case and white space, a total if it is the same number. ``ceiling`` is the share of gold values that the text holds at
all. The data (ICDAR 2019 SROIE, ``receipts.jsonl.gz``) is not part of this project.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
from pydantic import BaseModel, Field

from agentkit import Agent, Limits, extract
from agentkit.gather import gather
from agentkit.models import resolve
from agentkit.runtime.engine import Engine
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Usage

FIELDS = ("company", "date", "address", "total")
INSTRUCTIONS = "Extract company, date, address and total from the receipt. Answer with JSON."
MAX_TOKENS = 160
#: Receipts that are read at a time where only accuracy is measured; few enough to have drafts.
TOGETHER = 4
TIMED = 10


class Receipt(BaseModel):
    """What is read. The patterns say what a date and a sum look like, in any of the ways that receipts print them."""

    company: str
    date: Annotated[str, Field(pattern=r"^[0-9]{1,2}[-/. ]([0-9]{1,2}|[A-Za-z]{3,9})[-/. ][0-9]{2,4}$")]
    address: str
    total: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]{2}$")]


@dataclass(frozen=True, slots=True)
class Read:
    """What became of one receipt.

    Attributes:
        right: of each field whether it was read right.
        confidence: of each field; empty for free text.
        found: there is a record.
    """

    right: list[bool]
    confidence: list[float]
    found: bool
    usage: Usage
    seconds: float


@dataclass(frozen=True, slots=True)
class Way:
    """One way to read receipts, on an engine of its own."""

    engine: Engine
    constrained: bool

    async def read(self, receipt: Mapping[str, Any]) -> Read:
        begin = time.perf_counter()
        found: Mapping[str, Any] = {}
        confidence: list[float] = []
        if self.constrained:
            record = await extract(
                receipt["text"], Receipt, model=self.engine, instructions=INSTRUCTIONS, max_tokens=MAX_TOKENS
            )
            found, usage = record.output.model_dump(), record.usage
            confidence = [record.evidence[f"/{name}"].confidence for name in FIELDS]
        else:
            limits = Limits(steps=1, turn_tokens=MAX_TOKENS)
            result = await Agent(instructions=INSTRUCTIONS, model=self.engine, limits=limits).run(receipt["text"])
            found, usage = parsed(result.output), result.usage
        seconds = time.perf_counter() - begin
        right = [same(name, found.get(name), receipt["fields"][name]) for name in FIELDS]
        return Read(right, confidence, bool(found), usage, seconds)


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
    """How often a right field has more confidence than a wrong one: the area under the ROC curve."""
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


async def in_turns(ways: Mapping[str, Way], receipts: Sequence[Mapping[str, Any]]) -> dict[str, list[Read]]:
    """Each receipt read alone, by one way after the other; whose turn it is first changes."""
    reads: dict[str, list[Read]] = {name: [] for name in ways}
    names = list(ways)
    for index, receipt in enumerate(receipts):
        for turn in range(len(names)):
            name = names[(index + turn) % len(names)]
            reads[name].append(await ways[name].read(receipt))
    return reads


def row(reads: Sequence[Read], timed: Sequence[Read]) -> dict[str, float]:
    """The cells of one way."""
    usage = sum((read.usage for read in timed), Usage())
    each = list(zip(*(read.right for read in reads), strict=True))
    return {
        **{name: statistics.mean(right) for name, right in zip(FIELDS, each, strict=True)},
        "all": statistics.mean(right for read in reads for right in read.right),
        "no record": statistics.mean(not read.found for read in reads),
        "forced": usage.forced / (usage.decoded + usage.forced),
        "accepted": usage.accepted / max(usage.drafted, 1),
        "seconds": statistics.median(read.seconds for read in timed),
    }


def ceiling(receipts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The share of gold values that the texts hold."""
    inside = [[squeezed(r["fields"][name]) in squeezed(r["text"]) for r in receipts] for name in FIELDS]
    return {name: statistics.mean(held) for name, held in zip(FIELDS, inside, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six receipts instead of a hundred")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a .gguf file")
    default = Path(os.environ.get("AGENTKIT_DATA", ".")) / "sroie"
    parser.add_argument("--data", type=Path, default=default, help="folder of receipts.jsonl.gz (AGENTKIT_DATA/sroie)")
    args = parser.parse_args()
    receipts = load_receipts(args.data, 6 if args.quick else 100)
    ways = load_ways(args.model)
    timed = anyio.run(in_turns, ways, receipts[:TIMED])
    reads = {
        name: [*timed[name], *anyio.run(gather, way.read, receipts[TIMED:], TOGETHER)] for name, way in ways.items()
    }
    for way in ways.values():
        way.engine.close()
    show(receipts, reads, timed, args.json)


def load_ways(model: str) -> dict[str, Way]:
    path = resolve(model)
    plain, drafting = (Options(context=8192, kv_bytes=1 << 29, drafts=drafts) for drafts in (False, True))
    return {
        "free text": Way(load_engine(path, plain), False),
        "constrained": Way(load_engine(path, plain), True),
        "with drafts": Way(load_engine(path, drafting), True),
    }


def show(
    receipts: Sequence[Mapping[str, Any]],
    reads: Mapping[str, Sequence[Read]],
    timed: Mapping[str, Sequence[Read]],
    path: Path | None,
) -> None:
    """Print the figures, and write them to a file."""
    rows = {name: row(reads[name], timed[name]) for name in reads}
    print(f"{'':<14}" + "".join(f"{column:>11}" for column in rows["free text"]))
    for name, cells in [*rows.items(), ("ceiling", ceiling(receipts))]:
        print(f"{name:<14}" + "".join(f"{value:>11.3f}" for value in cells.values()))
    bound = reads["constrained"]
    right = [right for read in bound for right in read.right]
    auc = separation([value for read in bound for value in read.confidence], right)
    print(f"a field that is right has more confidence than one that is not in {auc:.2f} of all pairs")
    if path is not None:
        path.write_text(json.dumps({"receipts": len(receipts), "rows": rows, "separation": auc}, indent=1))
    share = {name: cells["all"] for name, cells in rows.items()}
    ratio = rows["with drafts"]["seconds"] / rows["constrained"]["seconds"]
    print(
        f"fields read right of {len(receipts)} receipts: {share['free text']:.3f} as free text, "
        f"{share['constrained']:.3f} constrained (target: no less), {share['with drafts']:.3f} with drafts in "
        f"{ratio:.2f}x the time"
    )


if __name__ == "__main__":
    main()
