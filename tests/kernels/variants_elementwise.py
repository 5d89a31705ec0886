"""Norm, gate, cache and page kernels as the engine launches them for Qwen3-4B."""

from __future__ import annotations

from agentkit.kernels import cache, norm, pages, silu
from tests.kernels.compiled import FP8_TARGETS, TARGETS, Variant

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, D, PAGE = 2560, 9728, 32, 8, 128, 64
STRIDES = ("qkv_row", "kv_slot", "kv_pair", "kv_head")


def variants() -> list[Variant]:
    """All of this file's kernels; bf16, and the pool in fp8 too."""
    return [
        *(_norm(add) for add in (False, True)),
        Variant(
            "silu_mul-bf16",
            silu._silu_mul,
            {"gate_up": "*bf16", "out": "*bf16", "n": "i32"},
            {"BLOCK": 1024},
            {"num_warps": 4},
            ("gate_up", "out", "n"),
        ),
        *(_write(normed, fp8) for normed, fp8 in ((True, False), (True, True), (False, False))),
        *(_bounds(fp8) for fp8 in (False, True)),
        Variant(
            "move_pages",
            pages._move,
            {"source": "*i32", "target": "*i32", "moves": "*i64", "token": "i32"}
            | dict.fromkeys(("source_layer", "source_page", "target_layer", "target_page"), "i64"),
            {"BLOCK": pages._BLOCK},
            {"num_warps": 4},
            ("source", "target", "moves", "token", "source_layer", "source_page", "target_layer", "target_page"),
        ),
    ]


def _norm(add: bool) -> Variant:
    pointers = {"x": "*bf16", "residual": "*bf16", "weight": "*bf16", "out": "*bf16"}
    return Variant(
        f"{'add_' if add else ''}rms_norm-bf16-{HIDDEN}",
        norm._rms_norm,
        pointers | {"x_row": "i32", "eps": "fp32"},
        {"N": HIDDEN, "BLOCK": 4096, "ADD": add},
        {"num_warps": 8},
        (*pointers, "x_row"),
    )


def _write(normed: bool, fp8: bool) -> Variant:
    pointers = {"qkv": "*bf16", "cos": "*fp32", "sin": "*fp32", "slots": "*i64", "query": "*bf16"}
    pointers |= dict.fromkeys(("query_norm", "key_norm"), "*bf16" if normed else "*fp32")
    pointers["kv"] = "*fp8e4nv" if fp8 else "*bf16"
    return Variant(
        f"rotate_and_write-bf16-{'norm-' if normed else ''}{'fp8' if fp8 else 'bf16'}",
        cache._rotate_and_write,
        pointers | dict.fromkeys(STRIDES, "i32") | dict.fromkeys(("eps", "key_factor", "value_factor"), "fp32"),
        {
            "HEADS": HEADS,
            "KV_HEADS": KV_HEADS,
            "D": D,
            "BLOCK": cache.heads_together(HEADS, KV_HEADS),
            "NORM": normed,
            "LIMIT": cache.FP8_LIMIT if fp8 else None,
        },
        {"num_warps": cache.warps(cache.heads_together(HEADS, KV_HEADS), D)},
        (*pointers, *STRIDES),
        FP8_TARGETS if fp8 else TARGETS,
    )


def _bounds(fp8: bool) -> Variant:
    pointers = {"kv": "*fp8e4nv" if fp8 else "*bf16", "slots": "*i64", "bounds": "*bf16"}
    strides = ("kv_slot", "kv_head", "bounds_page", "bounds_pair", "bounds_head")
    return Variant(
        f"page_bounds-{'fp8' if fp8 else 'bf16'}",
        cache._bounds,
        pointers | dict.fromkeys(strides, "i32") | {"tokens": "i32", "scale": "fp32"},
        {"PAGE": PAGE, "BLOCK": PAGE, "D": D},
        {"num_warps": 4},
        (*pointers, *strides),
        FP8_TARGETS if fp8 else TARGETS,
    )
