"""Attention that leaves something out, beside the dense one over the same context."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels import select
from agentkit.kernels.groups import Window, selected, windowed
from bench.gpu.attention import named
from bench.gpu.card import Bench
from bench.gpu.pools import PAGE, attend, contexts, planned, timed
from bench.gpu.report import Item
from bench.gpu.timing import capture
from tests.kernels.scene import Scene


def run(bench: Bench) -> Iterator[Item]:
    toy = bench.rehearsal
    context, batch = (200, 2) if toy else (32768, 8)
    s = contexts(bench, batch, context)
    dense = timed(bench, s, planned(bench, s))
    name = f"decode {named(context)} × {batch}"
    yield bench.figure(f"{name}, dense", dense * 1e6, "µs", role="part")
    window = Window(70, sinks=4) if toy else Window(4096, sinks=64)
    yield _windowed(bench, s, f"{name}, window {window.window} and {window.sinks} sinks", window, dense)
    yield from _chosen(bench, s, name, 2 if toy else 64, dense)
    del s
    context = 150 if toy else 16384
    s = contexts(bench, 1, context, context)
    dense = timed(bench, s, planned(bench, s))
    window = Window(40, sinks=4) if toy else Window(1024, sinks=64)
    name = f"prefill {named(context)}"
    yield bench.figure(f"{name}, dense", dense * 1e6, "µs", role="part")
    yield _windowed(bench, s, f"{name}, window {window.window} and {window.sinks} sinks", window, dense)


def _windowed(bench: Bench, s: Scene, name: str, window: Window, dense: float) -> Item:
    plan = planned(bench, s, windowed(s.spans, PAGE, window), window)
    seconds = timed(bench, s, plan)
    return bench.figure(f"{name}, over dense", dense / seconds, "×", note=f"{seconds * 1e6:,.1f} µs")


def _chosen(bench: Bench, s: Scene, name: str, count: int, dense: float) -> Iterator[Item]:
    """Pages chosen by the bounds of their keys: scoring, choice and attention, alone and together."""
    table = torch.from_numpy(np.stack([span.pages for span in s.spans])).to(bench.device)
    lengths = torch.tensor([span.context for span in s.spans], dtype=torch.int32, device=bench.device)
    keys = s.keys.view(s.shape.pages, PAGE, s.shape.kv_heads, s.shape.head_dim)
    bounds = torch.stack([keys.amin(1), keys.amax(1)], 1)
    plan = planned(bench, s, selected(s.spans, PAGE, count))

    def choose() -> Tensor:
        scores = select.launch_page_scores(s.query, bounds, table)
        return select.select_pages(scores, table, lengths, count, PAGE)

    chosen = plan.with_entries(choose())
    whole = bench.clock.cold(capture(lambda: attend(s, plan.with_entries(choose()))).replay)
    scoring = bench.clock.cold(capture(lambda: select.launch_page_scores(s.query, bounds, table)).replay)
    alone = timed(bench, s, chosen)
    note = f"{whole * 1e6:,.1f} µs: scores {scoring * 1e6:,.1f}, attention {alone * 1e6:,.1f}, the rest choice"
    yield bench.figure(f"{name}, {count} chosen pages, over dense", dense / whole, "×", note=note)
