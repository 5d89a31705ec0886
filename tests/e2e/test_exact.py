"""Greedy ids equal transformers', however they were computed: whole, chunked, cached, forked, preempted, batched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from agentkit.runtime.engine import Engine
from agentkit.runtime.generation import Generation
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Request, Sampling
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import open_checkpoint
from tests import smol, tiny

#: Below this distance of the two best logits, the order of additions decides and either token is right.
TIE = 1e-3
LONG = 48

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Peer:
    """Transformers' model as the judge of ids: was each one the best token after all those before it?

    Padded ids and control tokens that end nothing are left out, as in the engine.
    """

    def __init__(self, model: Any, vocab: Vocabulary) -> None:
        self.model = model
        self.banned = [t for t in vocab.control.values() if t not in vocab.end_ids]
        self.banned += range(vocab.size, model.config.vocab_size)
        self.ties = 0

    def judge(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        assert output
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1].float()
        logits[:, self.banned] = -torch.inf
        for step, (row, token) in enumerate(zip(logits, output, strict=True)):
            best = row.max()
            if int(row.argmax()) != token:
                assert best - row[token] < TIE, f"token {step}: {token} is {best - row[token]:.4f} below the best"
                self.ties += 1


async def run(engine: Engine, prompt: Sequence[int], tokens: int = LONG, **fields: Any) -> Generation:
    async with engine.generate(Request(prompt, max_tokens=tokens, ignore_end=True, **fields)) as generation:
        async for _ in generation:
            pass
    assert generation.finish is not None
    return generation


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Peer]:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.write(folder, request.param)
    return folder, Peer(model, open_checkpoint(folder).vocabulary())


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, length), generator=generator).tolist()


async def test_whole_then_from_the_prefix_tree(checkpoint: tuple[Path, Peer]) -> None:
    folder, peer = checkpoint
    with tiny.engine(folder) as engine:
        for prompt in prompts(4, 61):
            first = await run(engine, prompt)
            peer.judge(prompt, first.ids)
            assert first.finish.usage.cached < len(prompt) // 2
            again = await run(engine, prompt)
            assert again.finish.usage.cached == len(prompt) - 1
            assert again.ids == first.ids
            # What was generated is in the tree as well: a prompt that continues it prefills the new words alone.
            longer = [*prompt, *first.ids, 1, 2, 3]
            third = await run(engine, longer)
            assert third.finish.usage.prefilled == 4  # the last id of the answer was never computed
            peer.judge(longer, third.ids)
        engine.check()


@pytest.mark.parametrize("step_tokens", [5, 16, 37])
async def test_chunked(checkpoint: tuple[Path, Peer], step_tokens: int) -> None:
    folder, peer = checkpoint
    with tiny.engine(folder, step_tokens=step_tokens, running=4) as engine:
        for prompt in prompts(2, 90):
            peer.judge(prompt, (await run(engine, prompt)).ids)
        assert engine.stats().steps > 2 * (90 // step_tokens)


async def test_batched_with_others_and_preempted(checkpoint: tuple[Path, Peer]) -> None:
    folder, peer = checkpoint
    token_bytes = 3 * 2 * 2 * (32 if "qwen3" in folder.name else 16) * 4
    some = [prompt[: 20 + 7 * i] for i, prompt in enumerate(prompts(8, 90))]
    results: dict[int, Generation] = {}
    with tiny.engine(folder, kv_bytes=256 * token_bytes, step_tokens=24, running=8) as engine:  # 8 need about 740

        async def one(index: int) -> None:
            results[index] = await run(engine, some[index])

        async with anyio.create_task_group() as group:
            for index in range(len(some)):
                group.start_soon(one, index)
        engine.check()
    for index, generation in results.items():
        peer.judge(some[index], generation.ids)
        assert len(generation.ids) == LONG
    assert sum(g.finish.usage.recomputed for g in results.values()) > 0


async def test_preempted_by_hand_loses_nothing(checkpoint: tuple[Path, Peer]) -> None:
    folder, peer = checkpoint
    (prompt,) = prompts(1, 33)
    with tiny.engine(folder) as engine:
        async with engine.generate(Request(prompt, max_tokens=LONG, ignore_end=True)) as generation:
            async for _ in generation:
                if len(generation.ids) in (3, 10, 11, 30):
                    engine.preempt(generation.rid)
        engine.check()
    assert len(generation.ids) == LONG
    peer.judge(prompt, generation.ids)


async def test_forked(checkpoint: tuple[Path, Peer]) -> None:
    folder, peer = checkpoint
    (prompt,) = prompts(1, 33)
    children: list[Generation] = []
    with tiny.engine(folder) as engine:
        async with engine.generate(Request(prompt, max_tokens=LONG, ignore_end=True)) as parent:
            async for _ in parent:
                if len(parent.ids) in (5, 18):
                    children.append(engine.fork(parent))
        for child in children:
            async with child:
                async for _ in child:
                    pass
        engine.check()
    peer.judge(prompt, parent.ids)
    for child in children:
        before = child.request.ids
        assert list(before) == [*prompt, *parent.ids][: len(before)]
        assert len(before) + len(child.ids) == len(prompt) + LONG
        peer.judge(before, child.ids)
        assert child.finish is not None
        assert child.finish.usage.prefilled <= 1


async def test_seeded_sampling_does_not_depend_on_company(checkpoint: tuple[Path, Peer]) -> None:
    folder, _ = checkpoint
    some = prompts(5, 40)
    sampling = Sampling(temperature=1.2, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, seed=7)
    with tiny.engine(folder) as engine:
        alone = [(await run(engine, p, sampling=sampling)).ids for p in some]
    together: dict[int, list[int]] = {}
    with tiny.engine(folder, step_tokens=16, running=5) as engine:

        async def one(index: int) -> None:
            together[index] = (await run(engine, some[index], sampling=sampling)).ids

        async with anyio.create_task_group() as group:
            for index in range(len(some)):
                group.start_soon(one, index)
    assert [together[i] for i in range(len(some))] == alone
    assert len({tuple(ids) for ids in alone}) == len(alone)


TEXTS = [
    "The capital of France is", "Once upon a time, there was a", "def fibonacci(n):\n    ", "Water boils at",
    "The three primary colours are", "In 1969, humans first", "To make an omelette, you need", "SELECT name FROM",
    "The quick brown fox", "Photosynthesis is the process", "My favourite book is", "Dear Sir or Madam,\n",
    "The largest planet in our solar system", "import numpy as np\n", "Question: What is 2 + 2?\nAnswer:",
    "Le chat est sur la", "<html>\n<head>", "The mitochondria is", "Roses are red,", "The stock market fell because",
]  # fmt: skip


async def test_smollm2_equals_transformers_on_twenty_prompts() -> None:
    from transformers import AutoModelForCausalLM

    path = smol.smol_path()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    outputs: dict[int, list[int]] = {}
    with load_engine(path, Options(device="cpu", dtype="float32", packed=False)) as engine:
        peer = Peer(model, engine.vocab)

        async def one(index: int) -> None:
            outputs[index] = (await run(engine, engine.vocab.encode(TEXTS[index]), 64)).ids

        async with anyio.create_task_group() as group:
            for index in range(len(TEXTS)):
                group.start_soon(one, index)
        for index, output in outputs.items():
            assert len(output) == 64
            peer.judge(engine.vocab.encode(TEXTS[index]), output)
    assert peer.ties <= 5, f"{peer.ties} of {20 * 64} tokens sit on a tie of less than {TIE}"
