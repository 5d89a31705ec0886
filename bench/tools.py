"""A hundred tools: how long until the first call's grammar is ready, and what a mask under it costs.

    python bench/tools.py [--quick] [--data FOLDER] [--peers] [--json FILE]

The vocabulary is Qwen3's. Without ``--data`` the tools are made up from a fixed seed: one to six arguments of the types
that Python tools have. With it they are of the function-calling class of JSONSchemaBench (``Glaiveai2K.jsonl.gz``): the
first hundred with different names and a valid call. ``ready`` is the CPU time from the tools to the first mask: reading
their schemas, putting the grammar of the turn together, compiling it, and one mask. ``other mask`` is the same for a
turn that may call all of them but one, ``again`` for one that has been before. Masks are timed one by one along calls
with valid arguments, each of which must be legal to its end.

``--peers`` adds outlines_core and, where it is installed, xgrammar, on the same tools as one union of objects; both are
given no text around the calls, which outlines_core cannot express. outlines_core gets five tools: a hundred take it
minutes.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agentkit.runtime.errors import SchemaError
from agentkit.runtime.grammar import Grammar, GrammarCompiler
from agentkit.runtime.vocab import Vocabulary
from agentkit.template import Assistant, Call, ChatTemplate, User
from agentkit.turn import Turns, turn_spec
from tests.qwen import qwen_folder

WIDTH = 151_936
READY, P50, P99 = 40.0, 20.0, 500.0


@dataclass(frozen=True, eq=False)
class Sample:
    """A tool and valid arguments for it."""

    name: str
    schema: dict[str, Any]
    arguments: dict[str, Any]
    description: str = ""


def made_up(count: int) -> list[Sample]:
    """Tools with the schemas that `agentkit.tool` makes of Python functions."""
    rng = random.Random(20261126)
    words = ["path", "query", "limit", "user", "city", "date", "amount", "tags", "verbose", "mode", "title", "body"]
    kinds: list[tuple[dict[str, Any], Any]] = [
        ({"type": "string"}, "some text, as long as a short sentence"),
        ({"type": "integer"}, 42),
        ({"type": "integer", "minimum": 1, "maximum": 100}, 7),
        ({"type": "number"}, 12.5),
        ({"type": "boolean"}, True),
        ({"enum": ["open", "shipped", "returned"], "type": "string"}, "shipped"),
        ({"type": "array", "items": {"type": "string"}}, ["one", "two"]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, None),
        ({"type": "string", "format": "date"}, "2026-11-26"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, {"key": "value"}),
        (
            {
                "type": "object",
                "properties": {"name": {"type": "string"}, "price": {"type": "number"}},
                "required": ["name", "price"],
                "additionalProperties": False,
            },
            {"name": "Rye bread", "price": 4.5},
        ),
    ]
    samples: list[Sample] = []
    for index in range(count):
        names = rng.sample(words, rng.randint(1, 6))
        chosen = [rng.choice(kinds) for _ in names]
        schema = {
            "type": "object",
            "properties": {
                name: {**kind, "description": f"what {name} is"} for name, (kind, _) in zip(names, chosen, strict=True)
            },
            "required": [name for name, (kind, _) in zip(names, chosen, strict=True) if "default" not in kind],
            "additionalProperties": False,
        }
        arguments = {name: value for name, (_, value) in zip(names, chosen, strict=True)}
        samples.append(Sample(f"{rng.choice(['get', 'find', 'set', 'send'])}_{index}", schema, arguments))
    return samples


def of_bench(path: Path, count: int, template: ChatTemplate) -> list[Sample]:
    """The first tools of a class of JSONSchemaBench that have a valid call and a grammar."""
    samples: dict[str, Sample] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            name = entry["id"].split("---")[1].rpartition("_")[0]
            valid = [test["data"] for test in entry["tests"] if test["valid"] and isinstance(test["data"], dict)]
            if name in samples or not valid:
                continue
            sample = Sample(name, entry["schema"], ordered(valid[0], entry["schema"]))
            try:
                turn_spec([sample], None, template.tool_format.tags)
            except SchemaError:
                continue
            samples[name] = sample
            if len(samples) == count:
                break
    return list(samples.values())


def ordered(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The members of an object in the order in which the schema declares them."""
    declared = [name for name in schema.get("properties", {}) if name in value]
    return {name: value[name] for name in [*declared, *(name for name in value if name not in declared)]}


def since(start: float) -> float:
    """Milliseconds of CPU time of the process."""
    return 1e3 * (time.process_time() - start)


class Bench:
    """One vocabulary, and its compiler warmed up by a grammar of another kind."""

    def __init__(self) -> None:
        self.vocab = Vocabulary.from_folder(qwen_folder())
        self.template = ChatTemplate(self.vocab)
        self.compiler = GrammarCompiler(self.vocab, WIDTH)
        self.row = np.zeros(WIDTH // 32, dtype=np.int32)
        warm = Sample("warm", {"type": "object", "properties": {}, "additionalProperties": False}, {})
        spec = turn_spec([warm], None, self.template.tool_format.tags)
        assert spec is not None
        self.compiler.submit(spec).result()

    async def ready(self, turns: Turns, tools: list[Sample], allowed: frozenset[str]) -> tuple[Grammar, float]:
        """The grammar of a turn, after its first mask, and the milliseconds it took."""
        start = time.process_time()
        spec = await turns.spec(tools, None, "auto", allowed, True)
        assert spec is not None
        grammar = self.compiler.submit(spec).result()
        grammar.matcher().fill(self.row)
        return grammar, since(start)

    def masks(self, grammar: Grammar, tools: list[Sample]) -> list[float]:
        """Microseconds of CPU time of each mask along one call of each tool."""
        times: list[float] = []
        for tool in tools:
            matcher = grammar.matcher()
            for token in self.ids(tool):
                start = time.thread_time()
                matcher.fill(self.row)
                times.append(1e6 * (time.thread_time() - start))
                if not matcher.advance(token):
                    raise SystemExit(f"a valid call of {tool.name} is not legal: {tool.arguments}")
        return times

    def ids(self, tool: Sample) -> list[int]:
        """A call of a tool as the chat template writes it."""
        start = self.template.encode_start([User("q")])
        turn = self.template.encode_start([User("q"), Assistant("", (Call(tool.name, tool.arguments),)), User("r")])
        return turn[len(start) : turn.index(self.vocab.end_id, len(start))]


def union(tools: list[Sample]) -> dict[str, Any]:
    """Calls of tools as one schema, as peers are given it."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": tool.schema},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
    }


def peers(bench: Bench, tools: list[Sample]) -> None:
    """Print how long others take to compile, in CPU time."""
    from outlines_core import Index
    from outlines_core import Vocabulary as Words
    from outlines_core.json_schema import build_regex_from_schema

    pieces: dict[bytes, list[int]] = {}
    control = set(bench.vocab.control.values())
    for token in set(range(bench.vocab.size)) - control:
        pieces.setdefault(bench.vocab.token_bytes(token), []).append(token)
    words = Words(bench.vocab.end_id, pieces)
    few = tools[:5]
    start = time.process_time()
    Index(build_regex_from_schema(json.dumps(union(few))), words)
    print(f"outlines_core, {len(few)} tools: {since(start):,.0f} ms")
    if importlib.util.find_spec("xgrammar") is None:
        print("xgrammar is not installed")
        return
    import xgrammar  # pyright: ignore[reportMissingImports]

    encoded = [bench.vocab.token_bytes(i) for i in range(bench.vocab.size)]
    info = xgrammar.TokenizerInfo(encoded, vocab_size=WIDTH, stop_token_ids=sorted(bench.vocab.end_ids))
    compiler = xgrammar.GrammarCompiler(info)
    start = time.process_time()
    compiler.compile_json_schema(json.dumps(union(tools)))
    print(f"xgrammar, {len(tools)} tools: {since(start):,.0f} ms")


async def measure(bench: Bench, tools: list[Sample], rounds: int) -> dict[str, float]:
    """Medians over the rounds, from each of which nothing is remembered; percentiles over all masks."""
    firsts: list[float] = []
    others: list[float] = []
    agains: list[float] = []
    masks: list[float] = []
    for number in range(rounds):
        fresh = [Sample(f"{tool.name}{number}", tool.schema, tool.arguments) for tool in tools]
        names = frozenset(tool.name for tool in fresh)
        turns = Turns(bench.template.tool_format.tags)
        grammar, first = await bench.ready(turns, fresh, names)
        _, other = await bench.ready(turns, fresh, names - {fresh[0].name})
        _, again = await bench.ready(turns, fresh, names)
        firsts.append(first)
        others.append(other)
        agains.append(again)
        masks += bench.masks(grammar, fresh)
    return {
        "tools": len(tools),
        "ready_ms": statistics.median(firsts),
        "other_ms": statistics.median(others),
        "again_ms": statistics.median(agains),
        "masks": len(masks),
        "mask_p50_us": statistics.median(masks),
        "mask_p99_us": statistics.quantiles(masks, n=100)[98],
        "mask_max_us": max(masks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of nine")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--data", type=Path, help="a folder with the classes of JSONSchemaBench")
    parser.add_argument("--peers", action="store_true", help="outlines_core and xgrammar as well")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    bench = Bench()
    tools = made_up(args.count)
    if args.data is not None:
        tools = of_bench(args.data / "Glaiveai2K.jsonl.gz", args.count, bench.template)
    found = anyio.run(measure, bench, tools, 3 if args.quick else 9)
    print(
        f"{len(tools)} tools, CPU ms: ready {found['ready_ms']:.1f}, other mask {found['other_ms']:.1f}, "
        f"again {found['again_ms']:.2f}"
    )
    print(
        f"{found['masks']} masks, CPU µs: p50 {found['mask_p50_us']:.1f}, p99 {found['mask_p99_us']:.0f}, "
        f"max {found['mask_max_us']:.0f}"
    )
    if args.peers:
        peers(bench, tools)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    print(
        f"ready in {found['ready_ms']:.0f} ms (target {READY:.0f}), again {found['again_ms']:.1f} (target 0), masks "
        f"p50 {found['mask_p50_us']:.0f} µs (target {P50:.0f}), p99 {found['mask_p99_us']:.0f} (target {P99:.0f})"
    )


if __name__ == "__main__":
    main()
