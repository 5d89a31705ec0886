"""What sparse prefill saves and what it costs: seconds to the first token, and how well the model goes on.

    python bench/sparse.py [--quick] [--json FILE] [--model PATH.gguf]

The text is Python source of the standard library. Quality is that of what follows a prompt: the perplexity of its own
next tokens, each given all before it, and how long the model's own continuation is that of dense attention.
"""

from __future__ import annotations

import argparse
import asyncio.base_events
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import torch

from agentkit.models import resolve
from agentkit.runtime.engine import Engine
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Request, Sampling
from agentkit.runtime.sparse import Sparse

VARIANTS: dict[str, Sparse | None] = {
    "dense": None,
    "upper half, window 1024": Sparse(),
    "upper half, window 256": Sparse(window=256),
    "all layers, window 1024": Sparse(layer=0),
    "all layers, window 256": Sparse(window=256, layer=0),
    "all layers, window 256, each 16th page": Sparse(window=256, every=16, layer=0),
}


@dataclass(frozen=True)
class Row:
    """Seconds of the prefill, perplexity of what follows it, and what the model itself goes on with."""

    seconds: float
    perplexity: float
    greedy: list[int]


async def first_token(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Seconds to the first token, and some more."""
    begin, seconds = time.perf_counter(), math.nan
    async with engine.generate(Request(prompt, tokens, sampling=Sampling(), ignore_end=True)) as generation:
        async for _ in generation:
            if len(generation.ids) == 1:
                seconds = time.perf_counter() - begin
    return seconds, generation.ids


def measure(path: Path, sparse: Sparse | None, length: int, follows: int, new: int) -> Row:
    options = Options(drafts=False, context=length + follows + 1, kv_bytes=None)
    if sparse is not None:
        options = Options(drafts=False, context=length + follows + 1, attention="sparse", sparse=sparse)
    with load_engine(path, options) as engine:
        source = Path(asyncio.base_events.__file__).read_text(encoding="utf-8")
        text = engine.vocab.encode(source)[: length + follows]
        assert len(text) == length + follows, "the text is too short"
        anyio.run(first_token, engine, text[-64:], 2)
        seconds, greedy = anyio.run(first_token, engine, text[:length], new)
        scored = anyio.run(engine.score, text, length)
        return Row(seconds, math.exp(-statistics.fmean(scored.logprobs)), greedy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shorter prompt and fewer variants")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default="smollm2-135m", help="a name or a .gguf file")
    args = parser.parse_args()
    path = resolve(args.model)
    length, follows, new = (2048, 256, 16) if args.quick else (7168, 768, 64)
    names = list(VARIANTS)[:3] if args.quick else list(VARIANTS)
    rows = {name: measure(path, VARIANTS[name], length, follows, new) for name in names}
    dense = rows["dense"]

    print(f"{path.name} · torch {torch.__version__} · {torch.get_num_threads()} threads")
    print(f"a prompt of {length} tokens, {follows} that follow it\n")
    print(f"{'':<40}{'prefill s':>12}{'faster':>10}{'perplexity':>12}{'× dense':>10}{'same greedy ids':>18}")
    for name, row in rows.items():
        same = next((i for i, (a, b) in enumerate(zip(row.greedy, dense.greedy, strict=True)) if a != b), new)
        print(
            f"{name:<40}{row.seconds:>12.2f}{dense.seconds / row.seconds:>9.2f}x{row.perplexity:>12.3f}"
            f"{row.perplexity / dense.perplexity:>10.3f}{f'first {same} of {new}':>18}"
        )
    if args.json:
        args.json.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1))
    best = rows[names[1]]
    print(
        f"\n{names[1]}: {dense.seconds / best.seconds:.2f}x as fast, perplexity "
        f"{best.perplexity / dense.perplexity:.3f}x of dense (no target: an option that is off by default)"
    )


if __name__ == "__main__":
    main()
