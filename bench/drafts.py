"""Ten calls whose arguments are copied from tool results, with drafts and without, in one run.

    python bench/drafts.py [--quick] [--json FILE] [--model NAME] [--exact]

Each call is decoded in pairs, with drafts and without, from the same context, which then grows by the call and the next
result. By default the embedded model multiplies steps of one row with 4-bit weights and others with fp16 ones, so that
ids may differ where two logits are nearly equal; ``--exact`` multiplies all with fp32 ones, and ids must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import anyio

from agentkit.models import resolve
from agentkit.runtime.engine import Engine
from agentkit.runtime.grammar import JsonSpec
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Request, Usage

TARGET = 1.6
FIELDS = ("company", "street", "reference", "note")
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 120} for name in FIELDS},
        "required": list(FIELDS),
        "additionalProperties": False,
    }
)
COMPANIES = ("Nordberg Hardware", "Auto Reyes", "Paper Lantern", "Hotel Miramar", "Bakery Lindqvist")
STREETS = ("14 Mill Lane, Leeds", "3 Harbour Street, Cork", "88 Orchard Road, Bath", "5 Calle Mayor, Soria")


@dataclass(slots=True)
class Side:
    """One of the two engines.

    Attributes:
        seconds: of each call, the first token's prefill included.
        steps: run for all calls.
    """

    engine: Engine
    seconds: list[float]
    usage: Usage
    steps: int = 0


def result(index: int) -> str:
    """What the tool of one call gave back: an earlier call's form, so that its fields are copied from it."""
    record = {
        "company": f"{COMPANIES[index % 5]} Ltd no. {index + 3}",
        "street": f"{STREETS[index % 4]} LS{index} 7EY",
        "reference": f"INV-{20418 + 97 * index}-{index * 7919 % 1000:03d}/B",
        "note": f"Payable within {20 + index} days, please quote the order number 77{index}1 with your payment.",
    }
    return f"<|im_start|>user\nCopy this record as JSON:\n{json.dumps(record)}<|im_end|>\n<|im_start|>assistant\n"


async def call(side: Side, prompt: list[int]) -> list[int]:
    steps, begin = side.engine.stats().steps, time.perf_counter()
    request = Request(prompt, max_tokens=160, grammar=JsonSpec(SCHEMA, "call"))
    async with side.engine.generate(request) as generation:
        async for _ in generation:
            pass
    side.seconds.append(time.perf_counter() - begin)
    side.steps += side.engine.stats().steps - steps
    assert generation.finish is not None
    side.usage += generation.finish.usage
    return generation.ids


async def compare(plain: Side, drafting: Side, calls: int) -> int:
    """Decode the calls with both; returns how many have equal ids."""
    context: list[int] = []
    equal = 0
    for index in range(calls):
        prompt = [*context, *plain.engine.vocab.encode(result(index))]
        order = (plain, drafting) if index % 2 else (drafting, plain)
        outputs = {id(side): await call(side, prompt) for side in order}
        equal += outputs[id(plain)] == outputs[id(drafting)]
        context = [*prompt, *outputs[id(plain)]]
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four calls instead of ten")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a .gguf file")
    parser.add_argument("--exact", action="store_true", help="fp32 weights, and ids must be equal")
    args = parser.parse_args()
    calls = 4 if args.quick else 10
    exact = Options(dtype="float32", packed=False) if args.exact else Options()
    path = resolve(args.model)
    sides: list[Side] = []
    for drafts in (False, True):
        options = Options(dtype=exact.dtype, packed=exact.packed, context=4096, drafts=drafts)
        sides.append(Side(load_engine(path, options), [], Usage()))
    plain, drafting = sides
    equal = anyio.run(compare, plain, drafting, calls)
    rows: dict[str, dict[str, float]] = {}
    for name, side in (("without drafts", plain), ("with drafts", drafting)):
        side.engine.close()
        made = side.usage.decoded + side.usage.forced
        rows[name] = {
            "tokens": made,
            "tok/s": made / sum(side.seconds),
            "tokens a step": made / side.steps,
            "accepted": side.usage.accepted / max(side.usage.drafted, 1),
        }
    print(f"{'':<16}" + "".join(f"{column:>16}" for column in rows["with drafts"]))
    for name, row in rows.items():
        print(f"{name:<16}" + "".join(f"{value:>16,.2f}" for value in row.values()))
    if args.exact and equal < calls:
        raise SystemExit(f"{calls - equal} of {calls} calls have other ids with drafts")
    ratio = statistics.median(a / b for a, b in zip(plain.seconds, drafting.seconds, strict=True))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "ratio": ratio, "equal": equal, "calls": calls}, indent=1))
    print(f"a call takes {ratio:.2f}x as long without drafts (target {TARGET}) · ids equal in {equal} of {calls} calls")


if __name__ == "__main__":
    main()
