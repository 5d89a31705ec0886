"""Random schemas, one sampled output each at temperature 1.5: is every document complete and valid under jsonschema?

    python bench/schemas.py [--quick] [--count N] [--json FILE] [--model M]

The schemas are those of tests/runtime/schemas.py, from a fixed seed; the judge is jsonschema with its format checker.
At this temperature the model writes noise, so it visits what a sensible output never would; the budget is small, so
that many documents have to be closed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
from jsonschema.validators import validator_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentkit.gather import gather
from agentkit.loading import load
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import CapacityError, SchemaError
from agentkit.runtime.grammar import JsonSpec
from agentkit.runtime.request import Request, Sampling
from agentkit.template import ChatTemplate, User
from tests.runtime.schemas import random_schema


async def document(engine: Engine, schema: dict[str, Any], seed: int, budget: int) -> tuple[str, int, int]:
    """How it went: ``valid``, ``closed`` (valid, at the end of its budget), or what is wrong; and its tokens."""
    prompt = ChatTemplate(engine.vocab).encode_start([User("Write a JSON document.")])
    spec = JsonSpec(json.dumps(schema))
    sampling = Sampling(temperature=1.5, seed=seed)
    request = Request(prompt, max_tokens=budget, grammar=spec, sampling=sampling)
    try:
        async with engine.generate(request) as generation:
            async for _ in generation:
                pass
    except SchemaError as error:
        return f"refused: {error}", 0, 0
    except CapacityError:
        return "refused: no document fits the budget", 0, 0
    assert generation.finish is not None
    usage = generation.finish.usage
    text = engine.vocab.decode(t for t in generation.ids if t not in engine.vocab.end_ids)
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"CUT: {error}: {text[-60:]!r} of {json.dumps(schema)}", usage.decoded, usage.forced
    validator = validator_for(schema)
    faults = list(validator(schema, format_checker=validator.FORMAT_CHECKER).iter_errors(value))
    if faults:
        return f"INVALID: {faults[0].message[:200]} under {json.dumps(schema)}", usage.decoded, usage.forced
    return "closed" if generation.finish.reason == "length" else "valid", usage.decoded, usage.forced


async def run(engine: Engine, count: int, budget: int) -> list[tuple[str, int, int]]:
    rng = random.Random(20261123)
    schemas = [random_schema(rng) for _ in range(count)]
    results: list[tuple[str, int, int]] = []
    for start in range(0, count, 16):
        batch = list(enumerate(schemas[start : start + 16], start))
        results += await gather(lambda pair: document(engine, pair[1], pair[0], budget), batch)
        if sys.stderr.isatty():
            print(f"\r{len(results)} of {count}", end="", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 schemas")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=192, help="tokens of one document")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default=None)
    args = parser.parse_args()
    with load(args.model) as engine:
        begin = time.monotonic()
        results = anyio.run(run, engine, 64 if args.quick else args.count, args.budget)
        seconds = time.monotonic() - begin
    kinds = Counter(kind.partition(":")[0] for kind, _, _ in results)
    for kind, _, _ in results:
        if kind not in ("valid", "closed"):
            print(kind)
    decoded, forced = sum(d for _, d, _ in results), sum(f for _, _, f in results)
    print(f"{len(results)} schemas, {seconds:.0f} s, {decoded} tokens decoded, {forced} forced")
    for kind, number in kinds.most_common():
        print(f"  {kind:<10}{number:>6}")
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "decoded": decoded, "forced": forced, **kinds}, indent=1))
    wrong = kinds["CUT"] + kinds["INVALID"]
    print(f"{wrong} documents cut or invalid (target 0), {kinds['refused']} schemas refused with a reason")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
