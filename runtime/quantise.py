"""Weights in fewer bits than the checkpoint has: matrices are quantised one by one as they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from agentkit.kernels.compact import Int8, quantize_rows
from agentkit.kernels.linear import Int4, pack_int4
from agentkit.kernels.quant import (
    BlockKind,
    Quantised,
    codes,
    from_blocks,
    from_codes,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from agentkit.runtime.errors import ModelError
from agentkit.runtime.weights import Blocks

#: ``auto`` is the form they are stored in.
Weights = Literal["auto", "int8", "int4", "fp8"]

_FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")
_QUANTIZE = {"int8": quantize_int8, "int4": quantize_int4, "fp8": quantize_fp8}


def check_weights(weights: Weights, packed: bool, device: torch.device) -> None:
    """Refuse what has no product here.

    Raises:
        ModelError: it says what to choose instead.
    """
    if weights not in get_args(Weights):
        raise ModelError(f"weights {weights!r} is not known; use {', '.join(get_args(Weights))}")
    if weights == "auto":
        return
    if not packed:
        raise ModelError(f"weights={weights!r} quantises what packed=False keeps exact; leave one of them out")
    if weights == "fp8":
        check_fp8("weights", device, "Use weights='int8', which is closer to the model and takes as much memory.")


def check_fp8(option: str, device: torch.device, remedy: str) -> None:
    """ModelError where there is no arithmetic with float8_e4m3fn."""
    if device.type != "cuda":
        raise ModelError(f"{option}='fp8' needs a GPU: torch has no product with fp8 on a CPU. {remedy}")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise ModelError(f"{option}='fp8' needs a GPU of compute capability 8.9, this is {major}.{minor}. {remedy}")


def form_of(name: str, source: Tensor | Blocks, weights: Weights) -> Weights:
    """The form of one matrix where a model is quantised.

    With ``int4``, the projection of values and the way down from the MLP have 8 bits, unless the file has 4: of all
    matrices these lose most. That is a sixth more bytes for a third of the divergence (`bench/accuracy.py`).
    llama.cpp's Q4_K_M gives more bits to the same two.
    """
    if weights != "int4" or name.rpartition(".")[2] not in ("v_proj", "down_proj"):
        return weights
    return "int4" if isinstance(source, Blocks) and source.kind in _FOUR_BITS else "int8"


def quantised(
    sources: Sequence[tuple[str, Tensor | Blocks]], weights: Weights, device: torch.device
) -> Quantised | Int4 | Int8:
    """Matrices of the same input, one below the other, as one of the given form.

    A matrix that the file has in this form already is taken as it is, to the bit: Q8_0 as int8 on a GPU, Q4_0 and Q4_1
    as int4, and Q4_K up to the rounding of its scales to fp16. Any other is widened and rounded anew. Where that is
    done costs as much as it is fast: on the device.

    Args:
        sources: names, for messages, and matrices.
        weights: the form, not ``auto``.
        device: where the product will run.

    Raises:
        ModelError: a matrix that has no such form; it says what to do.
    """
    parts: list[Quantised | Int8] = []
    for name, source in sources:
        try:
            if device.type == "cpu" and weights == "int8":
                parts.append(quantize_rows(_dense(source)))
            else:
                parts.append(_stored(source, weights, device) or _QUANTIZE[weights](_dense(source).to(device)))
        except ValueError as error:
            raise _refusal(name, weights, str(error)) from error
    if isinstance(parts[0], Int8):
        rows = cast("list[Int8]", parts)
        return Int8(torch.cat([part.values for part in rows]), torch.cat([part.scale for part in rows]))
    whole = join(cast("list[Quantised]", parts))
    if device.type == "cuda":
        return whole
    try:
        return pack_int4(codes(whole), whole.scale, cast("Tensor", whole.minimum))
    except ValueError as error:
        raise _refusal(sources[0][0], weights, str(error)) from error


def _dense(source: Tensor | Blocks) -> Tensor:
    return source.dense(torch.float32) if isinstance(source, Blocks) else source


def _stored(source: Tensor | Blocks, weights: Weights, device: torch.device) -> Quantised | None:
    """A matrix that is stored in the form it is wanted in."""
    matrix = from_file(source) if isinstance(source, Blocks) else None
    return matrix.to(device) if matrix is not None and matrix.kind == weights else None


def from_file(blocks: Blocks) -> Quantised | None:
    """A GGUF matrix in the form of ours that it is stored in; None for kinds that have none."""
    if blocks.kind == "Q4_K":
        q, scale, minimum = cast("tuple[Tensor, Tensor, Tensor]", blocks.nibbles())
        return from_codes(q, scale.to(torch.float16), minimum.to(torch.float16))
    if blocks.kind in get_args(BlockKind):
        return from_blocks(cast("BlockKind", blocks.kind), blocks.data)
    return None


def join(parts: Sequence[Quantised]) -> Quantised:
    """Matrices of one form with the same number of inputs, one below the other."""
    minima = [part.minimum for part in parts if part.minimum is not None]
    return Quantised(
        parts[0].kind,
        torch.cat([part.values for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(minima) if minima else None,
    )


def _refusal(name: str, weights: Weights, reason: str) -> ModelError:
    return ModelError(f"{name} cannot be quantised ({reason}). Load this model without weights={weights!r}.")
