"""The sampler as the engine launches it over Qwen3's vocabulary."""

from __future__ import annotations

from typing import Any

from agentkit.kernels import choose
from tests.kernels.compiled import Variant

V = 151_936
_PARTS = -(-V // choose.BLOCK)
_FLOATS = "logits best top total crest logprob pivot peak normaliser"
_WHOLES = "masked token legal count listed candidates"
_TYPES: dict[str, str] = {
    **dict.fromkeys(_FLOATS.split(), "*fp32"),
    **dict.fromkeys(_WHOLES.split(), "*i32"),
    **dict.fromkeys(["temperature", "top_p", "log_min_p"], "*fp64"),
    **dict.fromkeys(["top_k", "seed", "position", "ids", "mass"], "*i64"),
    **dict.fromkeys(["v", "logits_row", "mask_row", "parts", "pieces"], "i32"),
}
_CONSTANTS: dict[str, Any] = {
    "MASKED": True,
    "LOGPROBS": True,
    "BLOCK": choose.BLOCK,
    "PIECE": choose.PIECE,
    "TILE": choose.TILE,
    "PARTS": 1 << (_PARTS - 1).bit_length(),
    "PIECES": 1 << (_PARTS * (choose.BLOCK // choose.PIECE) - 1).bit_length(),
}


def _variant(name: str, fn: Any, warps: int, **constants: Any) -> Variant:
    constants = _CONSTANTS | constants
    # Rows of logits and masks begin at any multiple of 16 elements: 151,936 is one, its 4,748 words are not.
    divisible = [a for a in fn.arg_names if a in ("logits", "masked", "logits_row", "v", "candidates")]
    return Variant(
        name,
        fn,
        {a: _TYPES[a] for a in fn.arg_names if a in _TYPES},
        {a: constants[a] for a in fn.arg_names if a in constants},
        {"num_warps": warps},
        divisible,
    )


def variants() -> list[Variant]:
    """One for plain batches, one for those in which a row has top-k, top-p or min-p."""
    return [
        _variant("sample_scan-plain", choose._scan, choose.SCAN_WARPS, NARROWS=False),
        _variant("sample_scan-narrow", choose._scan, choose.SCAN_WARPS, NARROWS=True),
        _variant("sample_merge-plain", choose._merge, choose.MERGE_WARPS, NARROWS=False),
        _variant("sample_merge-narrow", choose._merge, choose.MERGE_WARPS, NARROWS=True),
        _variant("sample_gather", choose._gather, choose.GATHER_WARPS, NARROWS=True),
        _variant("sample_pick", choose._pick, choose.PICK_WARPS),
    ]
