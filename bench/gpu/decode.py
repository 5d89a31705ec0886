"""The whole Qwen3-4B shape: tokens a second of prefill and decode beside their floors, and where a step goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.gpu.card import Bench
from bench.gpu.qwen import Decoder, random_model
from bench.gpu.report import Item, Note, Target
from bench.gpu.timing import synchronize


def run(bench: Bench) -> Iterator[Item]:
    """Batch 1 at 70 % of its floor and 10,000 tok/s at batch 64, 1K of context."""
    context, most, new = (40, 3, 2) if bench.rehearsal else (1024, 64, 32)
    model = random_model(bench)
    page_size, step_tokens = (16, 64) if bench.rehearsal else (64, 4096)
    decoder = Decoder(model, most, context + 8 * new + 16, page_size, step_tokens)
    for batch in (1, most) if bench.rehearsal else (1, 8, most):
        decoder.finish()
        seconds = decoder.prefill(batch, context)
        if batch == most:
            done = 2.0 * batch * context * (model.weight_bytes - model.head.weight_bytes) / model.dtype.itemsize
            yield bench.operations(f"prefill {batch} × {context}", done, seconds, note=_rate(batch * context, seconds))
        name = f"decode batch {batch} at {context}"
        with decoder.runner.eager():
            yield from _steps(bench, decoder, f"{name}, no graph", context, new, None)
        difference, agreeing = decoder.compare()
        yield Note(f"{name}: {agreeing} of {batch} ids are those without a graph; logits differ by {difference:.3g}")
        yield from _steps(bench, decoder, name, context, new, _target(bench, batch))


def floor_bytes(decoder: Decoder, batch: int, context: int) -> int:
    """Bytes that a step has to read: the weights once, keys and values of every context."""
    model = decoder.model
    token = model.config.layers * 2 * model.config.kv_heads * model.config.head_dim * model.dtype.itemsize
    return model.weight_bytes + batch * context * token


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tok/s"


def _steps(bench: Bench, decoder: Decoder, name: str, context: int, new: int, target: Target | None) -> Iterator[Item]:
    """Steps of the sequences that decode: how long one takes, and on what."""
    for _ in range(2):
        decoder.step()
    decoder.splits.clear()
    steps: list[float] = []
    for _ in range(bench.pace.repetitions(new)):
        begin = time.perf_counter()
        decoder.step()
        steps.append(time.perf_counter() - begin)
    seconds, batch = statistics.median(steps), decoder.decoding
    yield _figure(bench, name, decoder, batch, context, seconds, target)
    parts = {key: statistics.median(asdict(x)[key] for x in decoder.splits) for key in asdict(decoder.splits[0])}
    for part, value in parts.items():
        yield bench.figure(f"{name}: {part}", value * 1e6, "µs", role="part", share=value / seconds, floor="step")
    yield from _kernels(bench, name, decoder, seconds)


def _figure(
    bench: Bench, name: str, decoder: Decoder, batch: int, context: int, seconds: float, target: Target | None
) -> Item:
    rate = floor_bytes(decoder, batch, context) / seconds
    return bench.figure(
        name, batch / seconds, "tok/s", share=rate / bench.copied, floor="bytes", target=target,
        note=f"{seconds * 1e6:,.0f} µs a step",
    )  # fmt: skip


def _target(bench: Bench, batch: int) -> Target | None:
    if batch == 1:
        return Target(0.7, goal=0.85)
    return Target(10_000, of="value") if batch == 64 or bench.rehearsal else None


def _kernels(bench: Bench, name: str, decoder: Decoder, seconds: float) -> Iterator[Item]:
    """How long the device works in a step, and on what; the rest of the step it waits for the host."""
    try:
        taken = _profiled(bench, decoder)
    except RuntimeError as cause:
        synchronize()  # raises again where the context is lost
        yield Note(f"{name}: no profile: {str(cause)[:300]}")
        return
    busy = sum(taken.values())
    moved = sum(value for key, value in taken.items() if "HtoD" in key)
    yield bench.figure(f"{name}: device busy", busy * 1e6, "µs", role="part", share=busy / seconds, floor="step")
    yield bench.figure(f"{name}: host to device", moved * 1e6, "µs", role="part", share=moved / seconds, floor="step")
    largest = sorted(taken.items(), key=lambda item: -item[1])[:8]
    listed = ", ".join(f"{key[:60]} {value * 1e6:,.0f}" for key, value in largest)
    yield Note(f"{name}: µs of a step by kernel: {listed}")


def _profiled(bench: Bench, decoder: Decoder) -> dict[str, float]:
    """Seconds of the device in a step by kernel; in a rehearsal of the CPU by operation."""
    steps = 1 if bench.rehearsal else 3
    cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            decoder.step()
        synchronize()
    taken: dict[str, float] = {}
    for event in found.key_averages():
        used: Any = event.self_device_time_total if cuda else event.self_cpu_time_total
        taken[event.key] = float(used) * 1e-6 / steps
    return taken
