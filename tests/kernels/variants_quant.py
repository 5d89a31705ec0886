"""Quantised products as the engine launches them for a decode step of Qwen3-4B."""

from __future__ import annotations

from typing import get_args

import torch

from agentkit.kernels import quant
from agentkit.kernels.quant import GROUP, Config, Kind
from tests.kernels.compiled import FP8_TARGETS, TARGETS, Variant

_VALUES: dict[Kind, str] = {"int8": "*i32", "int4": "*i32", "fp8": "*fp8e4nv"}


def variants() -> list[Variant]:
    """Products of all kinds in both tiles (more rows take several), one with a part of a tile; and what goes with them.

    All matrices of the model make the same code: their sizes are arguments, multiples of 16 outputs and 16 groups.
    """
    return [
        *(v for kind in get_args(Kind) for tile in (16, 32) for v in _linear(kind, tile)),
        *(v for kind in get_args(Kind) for v in _linear(kind, 16, even=False)),
        Variant(
            "quant_sum_parts-bf16",
            quant._sum_parts,
            {"partial": "*fp32", "bias": "*bf16", "out": "*bf16", "n": "i32", "stride": "i32", "parts": "i32"},
            {"BLOCK": quant._SUMMED, "BIAS": False},
            {"num_warps": 4},
            ("partial", "bias", "out", "n", "stride"),
        ),
        *(_dequantize(kind) for kind in get_args(Kind)),
    ]


def _linear(kind: Kind, tile: int, even: bool = True) -> list[Variant]:
    """One variant for each configuration that the targets have."""
    by_config: dict[Config, list[str]] = {}
    for target in FP8_TARGETS if kind == "fp8" else TARGETS:
        by_config.setdefault(quant.configure(target, kind, torch.bfloat16, tile), []).append(target)
    side = "*fp32" if kind == "fp8" else "*fp16"
    pointers = {"x": "*bf16", "weight": _VALUES[kind], "bias": "*bf16", "out": "*fp32"}
    pointers |= {"scale": side, "minimum": side}
    return [
        Variant(
            f"quant_linear-{kind}-{tile}-{'' if even else 'rest-'}{c.outputs}x{c.inputs}x{c.warps}x{c.stages}",
            quant._linear,
            pointers | dict.fromkeys(("t", "n", "groups", "x_row", "each"), "i32"),
            {
                "KIND": kind,
                "M": tile,
                "N": c.outputs,
                "G": c.inputs // GROUP,
                "EVEN": even,
                "BIAS": False,
                "PRECISION": "tf32",
            },
            {"num_warps": c.warps, "num_stages": c.stages},
            (*pointers, "n", "x_row", *(("groups",) if even else ())),
            targets,
        )
        for c, targets in by_config.items()
    ]


def _dequantize(kind: Kind) -> Variant:
    stored = {"int8": "*i8", "int4": "*u8", "fp8": "*fp8e4nv"}[kind]
    side = "*fp32" if kind == "fp8" else "*fp16"
    pointers = {"values": stored, "scale": side, "minimum": side, "out": "*bf16"}
    return Variant(
        f"dequantize-{kind}-bf16",
        quant._dequantize,
        pointers | {"groups": "i32"},
        {"KIND": kind, "BLOCK": quant._WIDENED},
        {"num_warps": 4},
        (*pointers, "groups"),
        FP8_TARGETS if kind == "fp8" else TARGETS,
    )
