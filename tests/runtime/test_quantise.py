"""Quantised weights and KV as options: what they compute is what a model with the same rounded values would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import anyio
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor
from transformers import DynamicCache

from agentkit.kernels.compact import Int8, compact_linear, quantize_rows
from agentkit.kernels.linear import Int4
from agentkit.kernels.quant import Quantised, dequantize_reference, quantize_int4
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import ModelError
from agentkit.runtime.generation import Generation
from agentkit.runtime.load import Options, choose_kv_dtype, load_engine
from agentkit.runtime.quantise import Weights, _stored, check_weights, form_of, quantised
from agentkit.runtime.request import Request
from agentkit.runtime.runner import TorchRunner
from agentkit.runtime.weights import BlockKind, Blocks
from tests import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOKENS = 259


def widened_int8(weight: Tensor) -> Tensor:
    q = quantize_rows(weight)
    return q.values.double() * q.scale.double().unsqueeze(1)


def widened_int4(weight: Tensor) -> Tensor:
    return dequantize_reference(quantize_int4(weight), torch.float64)


def widened(form: str, name: str, weight: Tensor) -> Tensor:
    """A parameter as a form keeps it: values and the way down have 8 bits in both."""
    if not name.endswith("_proj.weight"):
        return weight
    spared = name.endswith(("v_proj.weight", "down_proj.weight"))
    return widened_int4(weight) if form == "int4" and not spared else widened_int8(weight)


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, tiny.write(folder, request.param).double()


def rounded(model: Any, form: str) -> dict[str, Tensor]:
    """Transformers' weights through a form and back."""
    return {name: widened(form, name, weight) for name, weight in model.named_parameters()}


class RoundedCache(DynamicCache):
    """Transformers' KV, each key and value through e4m3 and back."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key_states, value_states))
        return super().update(key, value, *args, **kwargs)


def judged(model: Any, weights: dict[str, Tensor], ids: Sequence[int], cache: DynamicCache | None = None) -> Tensor:
    """Log-probabilities of ``ids[1:]`` by transformers in fp64, with other weights or over another cache."""
    with torch.no_grad():
        inputs = {"past_key_values": cache, "use_cache": cache is not None}
        outputs = torch.func.functional_call(model, weights, (torch.tensor([list(ids)]),), inputs)
    rows = outputs.logits[0, :-1, :TOKENS].log_softmax(-1)
    return rows.gather(1, torch.tensor(list(ids[1:])).unsqueeze(1)).squeeze(1)


def scored(engine: Engine, ids: Sequence[int]) -> Tensor:
    return torch.tensor(anyio.run(engine.score, ids).logprobs).double()


def prompt(length: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()


async def generate(engine: Engine, ids: Sequence[int]) -> Generation:
    async with engine.generate(Request(ids, max_tokens=24, ignore_end=True)) as generation:
        async for _ in generation:
            pass
    return generation


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_scores_are_those_of_transformers_with_the_same_rounded_weights(
    checkpoint: tuple[Path, Any], form: Weights
) -> None:
    folder, peer = checkpoint
    ids = prompt(200)  # steps of many rows, which keep activations in fp32
    with tiny.engine(folder, weights=form, packed=True, step_tokens=512) as engine:
        got = scored(engine, ids)
        assert engine.runner.weight_bytes < 0.7 * sum(2 * x.numel() for x in peer.parameters())
    want, plain = (judged(peer, w, ids) for w in (rounded(peer, form), {}))
    # The rest of the difference are a head in fp16 and scales in bf16.
    assert (got - want).abs().mean() < 0.25 * (plain - want).abs().mean()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_steps_of_few_rows_stay_near_those_of_many(checkpoint: tuple[Path, Any], form: Weights) -> None:
    folder, peer = checkpoint
    ids = prompt(60)
    with tiny.engine(folder, weights=form, packed=True, step_tokens=4, running=1) as engine:
        got = scored(engine, ids)
    want, plain = (judged(peer, w, ids) for w in (rounded(peer, "int4"), {}))
    # Weights of this size make sharp distributions: what activations in bf16 cost is seen, and less than int4.
    assert (got - judged(peer, rounded(peer, form), ids)).abs().mean() < (plain - want).abs().mean()


@pytest.mark.parametrize("fields", [{"weights": "int8"}, {"weights": "int4"}, {"kv_dtype": "fp8"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_option_generates_and_its_cache_is_found_again(
    checkpoint: tuple[Path, Any], fields: dict[str, Any], dtype: str
) -> None:
    folder, _ = checkpoint
    ids = prompt(70)
    with tiny.engine(folder, packed=True, dtype=dtype, **fields) as engine:
        first = anyio.run(generate, engine, ids)
        again = anyio.run(generate, engine, [*ids, *first.ids, 5])
        assert len(first.ids) == len(again.ids) == 24
        assert again.finish is not None
        assert again.finish.usage.prefilled == 2  # the last id, which was sampled and never computed, and the new one
        engine.check()


@pytest.mark.parametrize("step_tokens", [1, 16, 512])
def test_kv_in_fp8_is_that_of_transformers_rounded_to_it(checkpoint: tuple[Path, Any], step_tokens: int) -> None:
    folder, peer = checkpoint
    ids = prompt(120)
    with tiny.engine(folder) as engine:
        pages = engine.sizes.pages
    with tiny.engine(folder, kv_dtype="fp8", step_tokens=step_tokens, running=1) as engine:
        assert engine.sizes.pages // 4 == pages  # of the same bytes
        assert cast("TorchRunner", engine.runner).kv.dtype is torch.float8_e4m3fn
        got = scored(engine, ids)
    want, plain = judged(peer, {}, ids, RoundedCache()), judged(peer, {}, ids)
    assert (got - want).abs().mean() < 0.1 * (plain - want).abs().mean()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weights": "int2"}, "use auto, int8, int4, fp8"),
        ({"weights": "fp8"}, "needs a GPU.*Use weights='int8'"),
        ({"weights": "int4", "packed": False}, "leave one of them out"),
        ({"kv_dtype": "int8"}, "use auto or fp8"),
    ],
)
def test_options_that_cannot_work_are_refused_with_a_remedy(
    checkpoint: tuple[Path, Any], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        load_engine(checkpoint[0], Options(device="cpu", **fields))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
def test_fp8_is_refused_on_cards_that_have_none(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if capability == (9, 0):
        check_weights("fp8", True, CUDA)
        assert choose_kv_dtype("fp8", CUDA, torch.bfloat16) is torch.float8_e4m3fn
        with pytest.raises(ModelError, match="use dtype='bfloat16'"):
            choose_kv_dtype("fp8", CUDA, torch.float32)
        return
    with pytest.raises(ModelError, match=r"capability 8\.9.*Use weights='int8'"):
        check_weights("fp8", True, CUDA)
    with pytest.raises(ModelError, match=r"capability 8\.9.*Leave kv_dtype out"):
        choose_kv_dtype("fp8", CUDA, torch.bfloat16)


@pytest.mark.parametrize("weight", [torch.ones(16, 40), torch.ones(8, 64), torch.full((16, 64), torch.nan)])
def test_matrices_without_groups_are_refused_by_name(weight: Tensor) -> None:
    with pytest.raises(ModelError, match="^layer cannot be quantised.*without weights='int4'"):
        quantised([("layer", weight)], "int4", CPU)


def blocks(kind: BlockKind) -> Blocks:
    weight = np.random.default_rng(0).normal(0, 0.05, (64, 256)).astype(np.float32)
    return Blocks(kind, (64, 256), torch.from_numpy(quants.quantize(weight, GGMLQuantizationType[kind])))


def test_what_a_file_has_in_4_bits_is_taken_as_it_is_beside_what_is_rounded() -> None:
    stored, dense = blocks("Q4_1"), torch.randn(64, 256)
    matrix = quantised([("a", stored), ("b", dense), ("c", blocks("Q8_0"))], "int4", CPU)
    assert isinstance(matrix, Int4)
    assert (matrix.rows, matrix.columns) == (192, 256)
    got = compact_linear(torch.eye(256), matrix).T
    exact = stored.dense(torch.float32)
    assert (got[:64] - exact).abs().max() < 2**-8 * 2 * exact.abs().max()  # scales are rounded to bf16
    assert (got[64:128] - dense).square().mean() < 0.01


def test_with_4_bits_the_matrices_that_lose_most_have_8_unless_the_file_has_4() -> None:
    dense = torch.ones(1)
    forms = {name: form_of(f"layers.0.{name}", dense, "int4") for name in ("q_proj", "v_proj", "up_proj", "down_proj")}
    assert forms == {"q_proj": "int4", "v_proj": "int8", "up_proj": "int4", "down_proj": "int8"}
    assert form_of("v_proj", blocks("Q4_1"), "int4") == "int4"
    assert form_of("v_proj", blocks("Q8_0"), "int4") == "int8"
    assert form_of("v_proj", dense, "fp8") == "fp8"


def test_blocks_of_8_bits_become_rows_of_8_bits() -> None:
    matrix = quantised([("a", blocks("Q8_0")), ("b", torch.randn(3, 256))], "int8", CPU)
    assert isinstance(matrix, Int8)
    assert matrix.values.shape == (67, 256)
    exact = blocks("Q8_0").dense(torch.float32)
    got = matrix.values[:64].float() * matrix.scale[:64].float().unsqueeze(1)
    assert ((got - exact).abs() <= 0.51 * matrix.scale[:64].float().unsqueeze(1)).all()


@pytest.mark.parametrize(("form", "kind"), [("int4", "Q4_0"), ("int4", "Q4_1"), ("int8", "Q8_0")])
def test_a_gpu_gets_the_files_own_blocks(form: Weights, kind: BlockKind) -> None:
    matrix = _stored(blocks(kind), form, CPU)
    assert isinstance(matrix, Quantised)
    torch.testing.assert_close(dequantize_reference(matrix), blocks(kind).dense(torch.float32))
    assert _stored(blocks(kind), "fp8", CPU) is None
