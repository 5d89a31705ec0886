"""The two ceilings that everything else is measured against."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu.card import Bench, query_driver
from bench.gpu.report import Item, Note
from bench.gpu.timing import cache_bytes


def run(bench: Bench) -> Iterator[Item]:
    yield bench.figure("copy of 1 GiB, read and written", bench.copied * 1e-12, "TB/s", role="floor")
    yield bench.figure("bf16 product, 8192 cubed", bench.multiplied * 1e-12, "TFLOP/s", role="floor")
    driver = ", ".join(f"{key} {value}" for key, value in query_driver().items())
    yield Note(f"just after the product: {driver or 'no clocks to be read'}")
    yield bench.figure("L2 cache", cache_bytes(bench.device) / 2**20, "MiB", role="part")
