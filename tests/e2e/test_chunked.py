"""Contexts beyond the trained length: dual chunk attention against transformers' model with a table of distances.

The peer computes in fp64, each pair of row and key by the formulas of the paper (arXiv:2402.17463), and shares nothing
with the runtime: keys there are never rotated by places in chunks, but each product by its distance.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

from agentkit.kernels import paged
from agentkit.kernels.attention import paged_attention
from agentkit.kernels.plan import Plan as AttentionPlan
from agentkit.runtime.chunked import ChunkedRunner
from agentkit.runtime.config import DualChunk
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import CapacityError, ModelError
from agentkit.runtime.generation import Generation
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Request, Sampling
from agentkit.runtime.runner import TorchRunner
from agentkit.runtime.sequence import Entry, Plan, Sequence
from agentkit.runtime.store import Stored, save
from tests import tiny

pytestmark = pytest.mark.anyio

#: Chunks of 16 tokens, so that a hundred tokens lie in seven.
CHUNKS = DualChunk(chunk_size=24, local_size=8, original_positions=40)
TOKENS = 120


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, tiny.write(folder, "qwen3").double()


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def table(count: int, chunks: DualChunk) -> Tensor:
    """The distance of each key from each row."""
    length = chunks.chunk_size - chunks.local_size
    far = min(2 * length - 1, chunks.chunk_size)  # the latter, but for more local tokens than a chunk has
    rows = [
        [
            row - key
            if row // length == key // length
            else min(row % length + length, chunks.chunk_size) - key % length
            if row // length == key // length + 1
            else far - key % length
            for key in range(count)
        ]
        for row in range(count)
    ]
    return torch.tensor(rows)


@torch.no_grad()
def expected(peer: Any, tokens: list[int], chunks: DualChunk) -> Tensor:
    """Log-probabilities ``[t, 259]`` of transformers' weights under that table."""
    count, d = len(tokens), peer.model.layers[0].self_attn.head_dim
    turn = torch.exp(1j * table(count, chunks)[:, :, None] * peer.model.rotary_emb.inv_freq.double())
    at = torch.arange(1, count + 1, dtype=torch.float64)
    sharper = (0.1 * (at / (chunks.original_positions or count)).clamp(min=1).log() + 1) ** 2
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1)
    x = peer.model.embed_tokens(torch.tensor(tokens))
    for layer in peer.model.layers:
        a, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (part(y).view(count, -1, d) for part in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
        a_, b_ = (torch.complex(*part.chunk(2, -1)) for part in (q, k))
        scores = torch.einsum("ihf,jhf,ijf->hij", a_, b_.conj(), turn).real * sharper[:, None] / math.sqrt(d)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        x = x + a.o_proj(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return peer.lm_head(peer.model.norm(x))[:, :259].log_softmax(-1)


async def scores(engine: Engine, tokens: list[int]) -> Tensor:
    return torch.tensor((await engine.score(tokens)).logprobs, dtype=torch.float64)


def picked(rows: Tensor, tokens: list[int]) -> Tensor:
    return rows[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


async def generated(engine: Engine, prompt: list[int], tokens: int = 30) -> Generation:
    request = Request(prompt, max_tokens=tokens, ignore_end=True, sampling=Sampling(temperature=0, logprobs=0))
    async with engine.generate(request) as generation:
        async for _ in generation:
            pass
    return generation


@pytest.mark.parametrize(
    ("family", "chunks"),
    [
        pytest.param("qwen3", CHUNKS, id="sharper"),
        pytest.param("qwen2", CHUNKS, id="with biases, as Qwen2.5-1M"),
        pytest.param("qwen3", DualChunk(24, 8), id="as sharp as ever"),
        pytest.param("llama3", DualChunk(24, 0, 12), id="sharper within the first chunk, none local"),
        pytest.param("qwen3", DualChunk(28, 20, 500), id="more local than a chunk"),
    ],
)
async def test_it_is_the_model_under_the_papers_table(tmp_path: Path, family: str, chunks: DualChunk) -> None:
    folder, peer = tmp_path, tiny.write(tmp_path, family).double()
    tokens = ids(TOKENS, 1)
    right = picked(expected(peer, tokens, chunks), tokens)
    with torch.no_grad():
        plain = peer(torch.tensor([tokens])).logits[0, :, :259].log_softmax(-1)
    for step_tokens in (512, 37):
        with tiny.engine(folder, dual_chunk=chunks, step_tokens=step_tokens, running=4) as engine:
            assert isinstance(engine.runner, ChunkedRunner)
            found = await scores(engine, tokens)
        assert (found - right).abs().max() < 1e-3
    far = chunks.reach
    assert (picked(plain, tokens)[: far - 1] - right[: far - 1]).abs().max() < 1e-5
    assert (picked(plain, tokens)[far:] - right[far:]).abs().max() > 1e-1


async def test_whole_in_parts_cached_forked_preempted_and_token_by_token_it_is_the_same(
    model: tuple[Path, Any],
) -> None:
    folder, peer = model
    prompt = ids(70, 2)
    with tiny.engine(folder, dual_chunk=CHUNKS, drafts=False) as engine:
        whole = (await generated(engine, prompt)).ids
        assert (await generated(engine, prompt)).ids == whole  # from the tree
        branch = [*prompt[:50], *ids(20, 3)]
        other = await generated(engine, branch)
        assert other.finish is not None
        assert other.finish.usage.cached == 50  # pages are shared across the borders of chunks
        async with engine.generate(Request(prompt, max_tokens=30, ignore_end=True)) as parent:
            async for _ in parent:
                if len(parent.ids) == 7:
                    child = engine.fork(parent)
                if len(parent.ids) == 12:
                    engine.preempt(parent.rid)
        async with child:
            async for _ in child:
                pass
        assert parent.ids == whole
        assert [*child.request.ids, *child.ids] == [*prompt, *whole]
        engine.check()
    with tiny.engine(folder, dual_chunk=CHUNKS, step_tokens=9, running=4) as engine:  # and with drafts

        async def one(given: list[int], wanted: list[int]) -> None:
            assert (await generated(engine, given)).ids == wanted

        async with anyio.create_task_group() as group:
            group.start_soon(one, prompt, whole)
            group.start_soon(one, branch, other.ids)
            group.start_soon(generated, engine, ids(10, 4), 5)  # one that stays within a chunk
    with tiny.engine(folder, dual_chunk=CHUNKS, drafts=False) as engine:  # from the first token on
        for count in range(1, len(prompt)):
            await generated(engine, prompt[:count], 1)
        last = await generated(engine, prompt)
        assert last.ids == whole
        assert last.finish is not None
        assert last.finish.usage.prefilled == 1
    for given, output in ((prompt, whole), (branch, other.ids)):
        rows = expected(peer, [*given, *output], CHUNKS)[len(given) - 1 : -1]
        rows[:, 256] = -math.inf  # a control token that ends nothing
        assert (rows.max(-1).values - rows.gather(1, torch.tensor(output)[:, None])[:, 0]).max() < 1e-3


async def test_below_one_chunk_it_is_dense_attention_to_the_bit(model: tuple[Path, Any]) -> None:
    prompts = [ids(CHUNKS.length - 1, 5), ids(9, 6)]
    with tiny.engine(model[0]) as dense, tiny.engine(model[0], dual_chunk=CHUNKS) as chunked:
        for prompt in prompts:
            one, two = [await generated(engine, prompt, CHUNKS.length - len(prompt)) for engine in (dense, chunked)]
            assert one.ids == two.ids
            assert torch.equal(await scores(dense, prompt), await scores(chunked, prompt))
    with tiny.engine(model[0], dual_chunk=CHUNKS, context=CHUNKS.reach) as engine:
        assert type(engine.runner) is TorchRunner  # nothing of it is needed


def attended(query: Tensor, keys: Tensor, values: Tensor, work: Any, scale: float) -> Tensor:
    """`paged_attention` with plans as on a GPU, under Triton's interpreter."""
    if not isinstance(work, AttentionPlan):
        return paged_attention(query, keys, values, work, scale)
    paged.check(query, keys, values, work, scale, 1.0)
    return paged.attend(query, keys, values, work, scale, 1.0, 1.0)


@torch.inference_mode()
def test_the_plans_of_a_gpu_give_what_the_cpu_gives(model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a made up past: prefill across borders, decoding in the fourth chunk, over the first border, below it."""
    monkeypatch.setattr("agentkit.runtime.model.paged_attention", attended)
    with tiny.engine(model[0]) as engine:
        assert isinstance(engine.runner, TorchRunner)
        shape = engine.runner.model
    sequences = [Sequence(rid, ids(count + 1, rid), "", rid, count) for rid, count in enumerate((50, 17, 9))]
    for sequence in sequences:
        for page in range(sequence.rid, 64, 3):
            sequence.add_page(page)
    steps = [
        Plan([Entry(s, s.prompt - 4, 4, True) for s in sequences], [], []),
        Plan([Entry(s, s.prompt, 1, True) for s in sequences], [], []),
        Plan([Entry(sequences[2], 9, 1, True)], [], []),
    ]
    logits: list[list[Tensor]] = []
    for capture in (None, lambda launch: launch):  # the latter plans as on a GPU; the last step alone is captured
        runner = ChunkedRunner(shape, 64, 4, 16, 4, chunks=CHUNKS, capture=capture)
        runner.kv.normal_(generator=torch.Generator().manual_seed(12))
        logits.append([runner.step(step).logits for step in steps])
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(*logits, strict=True))


async def test_a_config_says_it_and_context_may_be_as_long_as_it_says(tmp_path: Path) -> None:
    tiny.write(tmp_path, "qwen3")
    plain = json.loads((tmp_path / "config.json").read_text())
    given = {"chunk_size": 24, "local_size": 8, "original_max_position_embeddings": 40}
    (tmp_path / "config.json").write_text(json.dumps({**plain, "dual_chunk_attention_config": given}))
    tokens = ids(100, 9)
    with tiny.engine(tmp_path) as engine:
        by_config = await scores(engine, tokens)
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with tiny.engine(tmp_path, dual_chunk=CHUNKS, context=700) as engine:  # the model has 512 positions
        assert torch.equal(await scores(engine, tokens), by_config)
        long = ids(690, 10)
        generation = await generated(engine, long, 10)
        assert len(generation.ids) == 10
        with pytest.raises(CapacityError, match="holds 700"):
            engine.generate(Request([1] * 700))


async def test_a_saved_session_fits_an_engine_with_the_same_chunks_alone(
    model: tuple[Path, Any], tmp_path: Path
) -> None:
    tokens = ids(60, 11)
    with tiny.engine(model[0], dual_chunk=CHUNKS) as engine:
        await generated(engine, tokens, 1)
        save(engine, tmp_path / "a", tokens, {})
    for other, count in ((CHUNKS, 60), (None, 0), (DualChunk(28, 8, 40), 0)):
        with tiny.engine(model[0], dual_chunk=other) as engine, Stored(tmp_path / "a") as stored:
            kept, reason = stored.restore(engine)
            assert kept == count
            assert ("DualChunk" in reason) == (count == 0)


def test_what_cannot_be_is_refused_with_a_remedy(tmp_path: Path) -> None:
    tiny.write(tmp_path, "qwen3")

    def load(**options: Any) -> None:
        load_engine(tmp_path, Options(**{"device": "cpu", "page_size": 4, "dual_chunk": CHUNKS, **options})).close()

    for options in ({"invariant": True}, {"attention": "sparse"}):
        with pytest.raises(
            ModelError, match="more than 16 tokens in chunks.*leave these options out, or set context=16"
        ):
            load(**options)
        load(context=16, **options)
    with pytest.raises(ModelError, match="page_size 32 does not divide .* have 16 tokens: use page_size=16"):
        load(page_size=32)
    with pytest.raises(ModelError, match="chunk_size of 600, but the model was trained on 512"):
        load(dual_chunk=DualChunk(600, 8))
    with pytest.raises(CapacityError, match="give dual_chunk for more positions"):
        load(dual_chunk=None, context=600)
    with pytest.raises(ValueError, match="^local_size: 24 is not between 0 and a chunk_size of 24"):
        DualChunk(24, 24)
