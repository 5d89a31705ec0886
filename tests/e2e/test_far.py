"""Positions up to 262,143: rotation, pages and the prefix tree; and YaRN on Qwen3's shape."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.model import Model
from agentkit.runtime.request import Request
from agentkit.runtime.runner import Output, TorchRunner
from agentkit.runtime.sequence import Entry, Plan, Sequence
from agentkit.runtime.weights import open_checkpoint
from agentkit.script import byte_vocabulary
from tests import tiny

FAR = 262_144
PAGE = 16


def test_rows_at_the_last_positions_equal_transformers(tmp_path: Path) -> None:
    """One layer over a context of 262,144 tokens in shuffled runs of pages, its KV made up."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=FAR, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 5e6},
    )  # fmt: skip
    peer = Qwen3ForCausalLM(config).eval()
    peer.save_pretrained(tmp_path)
    model = Model(open_checkpoint(tmp_path), torch.device("cpu"), torch.float32, packed=False)
    runner = TorchRunner(model, pages=FAR // PAGE, page_size=PAGE, step_tokens=16, running=1)
    runner.kv.normal_()
    ids = torch.randint(0, 64, (FAR,)).tolist()
    sequence = Sequence(1, ids, "", 1, FAR)
    for run in torch.randperm(16).tolist():
        for page in range(run * FAR // PAGE // 16, (run + 1) * FAR // PAGE // 16):
            sequence.add_page(page)
    pages = torch.tensor(sequence.pages)[:, None] * PAGE + torch.arange(PAGE)
    past = runner.kv[0, pages.flatten()[:-5]].permute(1, 2, 0, 3)[:, None]  # [2, 1, kv_heads, n, d]
    cache = DynamicCache(config=config)
    cache.update(past[0].clone(), past[1].clone(), 0)
    with torch.inference_mode():
        ours = runner.step(Plan([Entry(sequence, FAR - 5, 5, True)], [], [])).logits
        theirs = peer(
            torch.tensor([ids[-5:]]), position_ids=torch.arange(FAR - 5, FAR)[None], past_key_values=cache
        ).logits[0, -1:]  # fmt: skip
        near = peer(torch.tensor([ids[-5:]]), position_ids=torch.arange(5)[None], past_key_values=None).logits[0, -1:]
    assert (ours - theirs).abs().max() < 1e-4 < (near - theirs).abs().max()


class Nothing:
    """A model that costs nothing and always says the same."""

    vocab_size, weight_bytes, asynchronous = byte_vocabulary().size, 0, False

    def step(self, plan: Plan) -> Output:
        return Output(torch.zeros(sum(entry.sample for entry in plan.entries), self.vocab_size), torch.empty(0))


def test_a_prompt_that_fills_the_context_is_prefilled_once_and_found_again() -> None:
    async def main(engine: Engine) -> None:
        prompt = [i * i % 251 for i in range(FAR - 8)]
        for cached in (0, FAR - 9):
            async with engine.generate(Request(prompt, max_tokens=4, ignore_end=True)) as generation:
                async for _ in generation:
                    pass
            assert generation.finish is not None
            assert generation.finish.usage.cached == cached
            assert generation.finish.usage.prefilled == len(prompt) - cached
        engine.check()

    with Engine(Nothing(), byte_vocabulary(), Sizes(context=FAR, pages=FAR // PAGE + 8, step_tokens=8192)) as engine:
        anyio.run(main, engine)


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_qwen3_with_yarn_equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """As Qwen's model cards say: ``factor`` times the positions it was trained on."""
    name, fields = tiny.FAMILIES["qwen3"]
    rope = {
        "rope_theta": 5e6, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(512 / factor)
    }  # fmt: skip
    monkeypatch.setitem(tiny.FAMILIES, "qwen3 yarn", (name, {**fields, "rope_parameters": rope}))
    peer = tiny.write(tmp_path, "qwen3 yarn")
    ids = torch.randint(0, 256, (500,), generator=torch.Generator().manual_seed(2)).tolist()
    with tiny.engine(tmp_path, step_tokens=128) as engine:
        found = anyio.run(engine.score, ids, 1).logprobs
    with torch.no_grad():
        rows = peer(torch.tensor([ids])).logits[0, :, :259].log_softmax(-1)
    right = rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (torch.tensor(found) - right).abs().max() < 1e-3
