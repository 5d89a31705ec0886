"""Sparse prefill: what it computes is transformers' model under an explicit mask, and nothing dense is touched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

from agentkit.kernels.groups import visible
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import ModelError
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Request, Usage
from agentkit.runtime.sparse import Sparse
from tests import tiny

pytestmark = pytest.mark.anyio

SPARSE = Sparse(window=24, sinks=3, every=7, layer=1, tail=16)
PAGE = 4


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, tiny.write(folder, "qwen3").double()


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(peer: Any, tokens: list[int], dense: int, sparse: Sparse) -> Tensor:
    """Log-probabilities of transformers in fp64, rows before ``dense`` masked from the first sparse layer on."""
    at = torch.arange(len(tokens))
    causal = at[None, :] <= at[:, None]
    seen = torch.where(at[:, None] < dense, visible(sparse.seen, at, at, PAGE), causal)
    full, some = (
        torch.zeros(x.shape, dtype=torch.float64).masked_fill(~x, -math.inf)[None, None] for x in (causal, seen)
    )

    def masked(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": some if layer.self_attn.layer_idx >= (sparse.layer or 0) else full}

    hooks = [layer.register_forward_pre_hook(masked, with_kwargs=True) for layer in peer.model.layers]
    peer.set_attn_implementation("eager")
    with torch.no_grad():
        logits = peer(torch.tensor([tokens])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits[:, :259].log_softmax(-1)


async def usage(engine: Engine, prompt: list[int], **fields: Any) -> Usage:
    async with engine.generate(Request(prompt, max_tokens=1, ignore_end=True, **fields)) as generation:
        async for _ in generation:
            pass
    assert generation.finish is not None
    return generation.finish.usage


@pytest.mark.parametrize("sparse", [SPARSE, Sparse(window=10, sinks=0, layer=0, tail=1)])
@pytest.mark.parametrize("step_tokens", [512, 37])
async def test_it_is_the_model_under_a_mask(model: tuple[Path, Any], sparse: Sparse, step_tokens: int) -> None:
    folder, peer = model
    tokens, start = ids(300, 1), 200
    with tiny.engine(folder, attention="sparse", sparse=sparse, step_tokens=step_tokens, running=4) as engine:
        scored = await engine.score(tokens, start)
        longer = ids(5, 3) + tokens
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: usage(engine, ids(150, 2), attention="dense"))
            beside = await engine.score(longer, start + 5)
    for given, first, found in ((tokens, start, scored), (longer, start + 5, beside)):
        rows = expected(peer, given, first - 1, sparse)
        right = [float(rows[i - 1, given[i]]) for i in range(first, len(given))]
        assert max(abs(a - b) for a, b in zip(found.logprobs, right, strict=True)) < 1e-3
    plain = expected(peer, tokens, 0, sparse)
    assert max(abs(a - float(plain[start - 1 + i, tokens[start + i]])) for i, a in enumerate(scored.logprobs)) > 1e-2


async def test_the_tail_of_a_prompt_and_what_follows_are_dense(model: tuple[Path, Any]) -> None:
    folder, peer = model
    prompt = ids(120, 4)
    with tiny.engine(folder, attention="sparse", sparse=SPARSE, step_tokens=50, running=4) as engine:
        async with engine.generate(Request(prompt, max_tokens=20, ignore_end=True)) as generation:
            async for _ in generation:
                pass
    rows = expected(peer, [*prompt, *generation.ids], 120 - SPARSE.tail, SPARSE)
    for step, token in enumerate(generation.ids):
        row = rows[119 + step].clone()
        row[256:257] = -math.inf  # a control token that ends nothing
        assert row.max() - row[token] < 1e-3


async def test_sparse_and_dense_never_share_a_page(model: tuple[Path, Any]) -> None:
    prompt = ids(60, 5)
    with tiny.engine(model[0], attention="sparse", sparse=SPARSE) as engine:
        seen = [
            (await usage(engine, prompt, attention=attention)).cached
            for attention in ("dense", None, "dense", "sparse", None)
        ]
        assert seen == [0, 0, 59, 59, 59]
        assert (await usage(engine, prompt, namespace="sparse:", attention="dense")).cached == 0
        engine.check()


async def test_a_dense_engine_refuses_sparse_requests_and_goes_on(model: tuple[Path, Any]) -> None:
    with tiny.engine(model[0]) as engine:
        with pytest.raises(ValueError, match="Options.attention='sparse'"):
            engine.generate(Request([1, 2], attention="sparse"))
        assert (await usage(engine, [1, 2])).prefilled == 2


def test_options_that_make_no_sense_are_refused(model: tuple[Path, Any]) -> None:
    for bad, named in (({"tail": 0}, "tail"), ({"window": 0}, "window"), ({"sinks": -1}, "sinks")):
        with pytest.raises(ValueError, match=f"^{named}"):
            Sparse(**bad)
    with pytest.raises(ValueError, match="^layer: 3, the model has layers 0 to 2"):
        load_engine(model[0], Options(device="cpu", attention="sparse", sparse=Sparse(layer=3)))
    with pytest.raises(ModelError, match="leave out one"):
        load_engine(model[0], Options(device="cpu", attention="sparse", invariant=True))
    with pytest.raises(ModelError, match="use dense or sparse"):
        load_engine(model[0], Options(device="cpu", attention="full"))  # type: ignore[arg-type]
