"""Paged attention as the engine launches it for Qwen3-4B: 32 query and 8 KV heads of 128, pages of 64 tokens."""

from __future__ import annotations

import torch

from agentkit.kernels.paged import Config, attend_kernel, configure, merge_kernel
from tests.kernels.compiled import FP8_TARGETS, TARGETS, Variant

_KV_HEADS, _GROUP, _D, _PAGE = 8, 4, 128, 64
_POINTERS = {
    **dict.fromkeys(["query", "out"], "*bf16"),
    **dict.fromkeys(["partial", "lse"], "*fp32"),
    **dict.fromkeys(["items", "rows", "positions", "targets", "entries"], "*i32"),
}
_STRIDES = dict.fromkeys(["query_row", "query_head", "slot", "head_stride"], "i32")
_REST = {
    "entry_head": "i32",
    **dict.fromkeys(["scale", "value_scale"], "fp32"),
    **dict.fromkeys(["window", "sinks", "every"], "i32"),
}


def _attend(name: str, tile: int, pool: str, sparse: bool = False) -> list[Variant]:
    """One variant for each configuration that the targets have."""
    by_config: dict[Config, list[str]] = {}
    for target in FP8_TARGETS if pool == "*fp8e4nv" else TARGETS:
        config = configure(target, torch.bfloat16, _D, _PAGE, tile, sparse)
        by_config.setdefault(config, []).append(target)
    constants = {"KV_HEADS": _KV_HEADS, "GROUP": _GROUP, "M": tile, "D": _D, "PAGE": _PAGE}
    return [
        Variant(
            f"attend-{name}-{config.keys}x{config.warps}x{config.stages}",
            attend_kernel,
            {**_POINTERS, "keys": pool, "values": pool, **_STRIDES, **_REST},
            constants | {"N": config.keys, "SPARSE": sparse, "PRECISION": "tf32"},
            {"num_warps": config.warps, "num_stages": config.stages},
            [*_POINTERS, "keys", "values", *_STRIDES],
            targets,
        )
        for config, targets in by_config.items()
    ]


def variants() -> list[Variant]:
    """Decode in bf16 and fp8, of eight branches together, over chosen pages; both prefill tiles; the merge of parts."""
    merge = Variant(
        "attend_merge-bf16",
        merge_kernel,
        {"partial": "*fp32", "lse": "*fp32", "out": "*bf16", "merges": "*i32"},
        {"HEADS": _KV_HEADS * _GROUP, "D": _D, "P": 16},
        {"num_warps": 4},
        ["partial", "lse", "out", "merges"],
    )
    return [
        *_attend("decode-bf16", 16, "*bf16"),
        *_attend("decode-fp8", 16, "*fp8e4nv"),
        *_attend("group-bf16", 32, "*bf16"),
        *_attend("sparse-bf16", 16, "*bf16", sparse=True),
        *_attend("prefill64-bf16", 64, "*bf16"),
        *_attend("prefill128-bf16", 128, "*bf16"),
        merge,
    ]
