"""transformers on the same card, the same shape, random weights: `generate` and its continuous batching."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu.card import Bench
from bench.gpu.qwen import config_of
from bench.gpu.report import Item, Note
from bench.gpu.timing import synchronize


def run(bench: Bench) -> Iterator[Item]:
    context, new, most = (24, 3, 2) if bench.rehearsal else (1024, 64, 64)
    with torch.inference_mode(False), torch.no_grad():  # its batching runs on a thread, where the mode does not hold
        model = _model(bench)
        yield Note(f"transformers {_version()}, {model.config._attn_implementation}")
        ways: list[tuple[str, float, Callable[[], float]]] = [
            ("generate, batch 1, dynamic cache", 10, lambda: _generate(bench, model, 1, context, new)),
            (f"continuous batching, {most} requests", 20, lambda: _continuous(bench, model, most, context, 4 * new)),
            (f"generate, batch {most}, dynamic cache", 10, lambda: _generate(bench, model, most, context, new)),
            ("generate, batch 1, static cache", 45, lambda: _generate(bench, model, 1, context, new, "static")),
        ]
        for name, seconds, way in ways:
            if not bench.pace.affords(seconds, name):
                continue
            try:
                rate = way()
            except Exception as cause:
                synchronize()  # raises again where the context is lost
                yield Note(f"{name} did not run: {type(cause).__name__}: {str(cause)[:300]}")
            else:
                yield bench.figure(f"transformers {name}, at {context}", rate, "tok/s", role="peer")


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _model(bench: Bench) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils import logging

    logging.set_verbosity_error()
    shape = {key: value for key, value in config_of(bench).items() if key not in ("architectures", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": config_of(bench)["rope_theta"]}
    config = Qwen3Config(**shape, rope_parameters=rope)
    dtype = torch.float32 if bench.rehearsal else torch.bfloat16
    with torch.device(bench.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def _prompts(bench: Bench, model: Any, count: int, context: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (count, context), device=bench.device)


def _generate(bench: Bench, model: Any, count: int, context: int, new: int, cache: str | None = None) -> float:
    """Tokens a second after the first: the time of many less that of one."""
    prompts = _prompts(bench, model, count, context)
    model.set_attn_implementation("sdpa")  # its continuous batching leaves another one behind when it fails

    def seconds(tokens: int) -> float:
        synchronize()
        begin = time.perf_counter()
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=tokens,
            max_new_tokens=tokens, pad_token_id=0, cache_implementation=cache,
        )  # fmt: skip
        synchronize()
        return time.perf_counter() - begin

    seconds(new)  # of this length: a static cache compiles for it
    seconds(1)
    times = 1 if bench.rehearsal else bench.pace.repetitions(3)
    taken = [seconds(new) - seconds(1) for _ in range(times)]
    return count * (new - 1) / statistics.median(taken)


def _continuous(bench: Bench, model: Any, count: int, context: int, new: int) -> float:
    """Tokens a second from when all requests have their first token to when the first of them ends."""
    from transformers import GenerationConfig

    prompts = _prompts(bench, model, count, context).tolist()
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(
        inputs=prompts, generation_config=greedy, continuous_batching_config=_pool(bench), record_timestamps=True,
        max_new_tokens=new, progress_bar=False,
    )  # fmt: skip
    marks: list[list[float]] = [list(output.timestamps) for output in found.values()]
    if len(marks) < count or any(len(mark) < 2 for mark in marks):
        raise RuntimeError(f"{len(marks)} of {count} requests came back, with {[len(mark) for mark in marks]} tokens")
    begin, end = max(mark[0] for mark in marks), min(mark[-1] for mark in marks)
    if end <= begin:
        raise RuntimeError("no moment at which all requests were decoding: fewer fit at once, or outputs are too short")
    return sum(begin < moment <= end for mark in marks for moment in mark) / (end - begin)


def _pool(bench: Bench) -> Any:
    """Its own choice on a card; in a rehearsal not most of the memory."""
    if not bench.rehearsal:
        return None
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
