"""What the next turn of a long conversation costs: all of it computed, or found on the device, on the host, in a file.

    python bench/sessions.py [--quick] [--json FILE] [--model MODEL]

Seconds to the first token of a turn of 8 new tokens, medians over conversations of random tokens; reading a file
includes its checks. Then what eight forks of one long prefix cost in pages, with a model that computes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import torch

from agentkit import load
from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.generation import Generation
from agentkit.runtime.load import Options
from agentkit.runtime.request import Request, Usage
from agentkit.runtime.runner import Output
from agentkit.runtime.sequence import Plan
from agentkit.runtime.store import Stored, save
from agentkit.script import byte_vocabulary

NEW = 8
FORKS, PREFIX, TAIL = 8, 32_768, 100


class Nothing:
    """A model whose logits are one constant row."""

    weight_bytes = 0
    asynchronous = False
    memory = None
    digest = "nothing"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def step(self, plan: Plan) -> Output:
        return Output(torch.zeros(sum(entry.sample for entry in plan.entries), self.vocab_size), torch.empty(0))


@dataclass(frozen=True, slots=True)
class Row:
    """Seconds for one length; megabytes of the file."""

    tokens: int
    computed: float
    device: float
    host: float
    file: float
    saving: float
    megabytes: float


async def turn(engine: Engine, ids: Sequence[int], prefilled: int | None = None) -> tuple[float, Usage]:
    """Seconds to the first token behind some ids, of which so many are to be computed."""
    began = time.perf_counter()
    async with engine.generate(Request(ids, max_tokens=1, ignore_end=True)) as generation:
        async for _ in generation:
            pass
    seconds = time.perf_counter() - began
    assert generation.finish is not None
    usage = generation.finish.usage
    if prefilled is not None and usage.prefilled != prefilled:
        raise SystemExit(f"{usage.prefilled} tokens were computed, not the {prefilled} new ones")
    return seconds, usage


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(100, 40_000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


async def conversation(first: Engine, second: Engine, tokens: int, seed: int, path: Path) -> Row:
    """One conversation by each way; the pool of the first engine holds no other beside it."""
    ids, new, other = random_ids(tokens, seed), random_ids(NEW, seed + 1), random_ids(NEW, seed + 2)
    computed, _ = await turn(first, ids, tokens)
    device, _ = await turn(first, [*ids, *new], NEW)
    began = time.perf_counter()
    saved = save(first, path, ids, {})
    saving = time.perf_counter() - began
    await turn(first, random_ids(tokens, seed + 3))
    host, _ = await turn(first, [*ids, *other], NEW)
    began = time.perf_counter()
    with Stored(path) as stored:
        stored.require(second)
        stored.restore(second)
    reading = time.perf_counter() - began
    seconds, _ = await turn(second, [*ids, *new], NEW)
    return Row(tokens, computed, device, host, reading + seconds, saving, saved.bytes / 1e6)


def measure(model: str | None, tokens: int, times: int) -> Row:
    with load(model) as probe:
        memory = probe.runner.memory
        assert memory is not None
        token = memory.block_bytes // memory.format.page_size
    small = Options(context=tokens + 64, kv_bytes=token * (tokens + 256), host_kv_bytes=token * 4 * tokens)
    large = Options(kv_bytes=token * tokens * 8)
    with load(model, small) as first, load(model, large) as second, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        rows = [anyio.run(conversation, first, second, tokens, 1000 * i, path) for i in range(times + 1)]
    columns = zip(*(asdict(row).values() for row in rows[1:]), strict=True)  # the first warms up
    return Row(*(statistics.median(column) for column in columns))


async def forked() -> tuple[int, int]:
    """Pages of a prefix, and most pages while its forks go on."""
    vocab = byte_vocabulary()
    sizes = Sizes(context=PREFIX + 1024, pages=3 * PREFIX // 16, step_tokens=8192)
    prompt = [i % 200 + 1 for i in range(PREFIX + 5)]
    with Engine(Nothing(vocab.size), vocab, sizes, "nothing") as engine:
        children: list[Generation] = []
        async with engine.generate(Request(prompt, max_tokens=TAIL, ignore_end=True)) as parent:
            async for _ in parent:
                if len(parent.ids) == 1:
                    children = [engine.fork(parent) for _ in range(FORKS)]
                    break
        held = engine.stats()
        alone = peak = held.pages_cached + held.pages_private
        async with anyio.create_task_group() as group:
            for child in children:
                group.start_soon(finish, child)
            while any(child.finish is None for child in children):
                held = await anyio.to_thread.run_sync(engine.stats)
                peak = max(peak, held.pages_cached + held.pages_private)
    return alone, peak


async def finish(child: Generation) -> None:
    async with child:
        async for _ in child:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short conversation")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", help="a name, folder or file; the embedded model by default")
    args = parser.parse_args()
    rows = [measure(args.model, n, 1 if args.quick else 3) for n in ([512] if args.quick else [1024, 2048])]
    print(f"{'tokens':>8}{'computed':>10}{'device':>10}{'host':>10}{'file':>10}{'saving':>10}{'MB':>8}")
    for row in rows:
        times = (row.computed, row.device, row.host, row.file, row.saving)
        print(f"{row.tokens:>8}" + "".join(f"{1e3 * t:>7.0f} ms" for t in times) + f"{row.megabytes:>8.0f}")
    alone, peak = anyio.run(forked)
    tails = FORKS * -(-(5 + TAIL) // 16)
    print(f"\n{FORKS} forks of {PREFIX:,} tokens: {peak - alone} pages more than one alone (their tails: {tails})")
    if args.json:
        figures = {"rows": [asdict(row) for row in rows], "forks": {"alone": alone, "peak": peak}}
        args.json.write_text(json.dumps(figures, indent=1))
    last = rows[-1]
    print(
        f"\n{last.tokens} tokens: host {last.computed / last.host:.0f}x, file {last.computed / last.file:.0f}x as fast "
        f"as computing them; recomputed 0 (target 0); {FORKS} forks {peak - alone} pages (target at most {tails})"
    )


if __name__ == "__main__":
    main()
