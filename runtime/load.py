"""From a path to a running engine: device, dtype and the size of the KV pool."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.errors import CapacityError, ModelError
from agentkit.runtime.graphs import CudaCapture
from agentkit.runtime.model import Model
from agentkit.runtime.runner import TorchRunner
from agentkit.runtime.sequence import Entry, Plan, Sequence
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import open_checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Sequences of full length that the pool holds by default, memory permitting.
_FULL_SEQUENCES = 4
#: Most guesses verified in one step of one sequence.
_DRAFTED = 11


@dataclass(frozen=True, slots=True)
class Options:
    """How to load a model.

    Attributes:
        device: ``auto`` takes a CUDA GPU if there is one, else the CPU.
        dtype: ``auto`` is bfloat16 on a GPU and on a CPU that multiplies it natively, else float32: elsewhere torch
            emulates bfloat16 and a product takes several times as long.
        packed: on the CPU, use 4-bit GGUF weights as they are for steps of few rows where that is faster, and fp16
            weights instead of fp32 ones; off for exact comparison.
        context: most tokens in one sequence; None for the model's own limit, as far as the pool reaches.
        kv_bytes: size of the KV pool; None for room for four full contexts, at most a quarter of free memory (on a
            GPU: nine tenths of what a trial step and its graphs leave).
        page_size: tokens in a KV page; None for 64 on a GPU, as its kernels read 64 keys at once, and 16 on the CPU.
        step_tokens: most tokens in one step.
        running: most sequences in one step.
        drafts: guess what is copied from the context and verify several tokens in one step where that pays. What
            comes out is the same, but for ties that the rounding of a step decides.
        graphs: on a GPU, capture decode steps as CUDA graphs, one for each of some batch sizes, while loading. The CPU
            has none.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    packed: bool = True
    context: int | None = None
    kv_bytes: int | None = None
    page_size: int | None = None
    step_tokens: int = 512
    running: int = 64
    drafts: bool = True
    graphs: bool = True


def load_engine(path: Path, options: Options | None = None, name: str | None = None) -> Engine:
    """Open a checkpoint and start an engine on it.

    Args:
        path: a Hugging Face folder or a GGUF file.
        options: how.
        name: for messages; the path by default.

    Raises:
        ModelError: the checkpoint cannot be read.
        CapacityError: the KV pool would be smaller than one page, or the context larger than model or pool.
        EngineError: decode steps cannot be captured as graphs.
    """
    options = options or Options()
    name = name or str(path)
    if options.dtype != "auto" and options.dtype not in _DTYPES:
        raise ModelError(f"dtype {options.dtype!r} is not known; use auto, float32 or bfloat16")
    # Loading runs parallel loops. Had they run on the caller's thread, its team of OpenMP threads would live on beside
    # the engine's, and with more threads than cores libgomp lets them sleep between loops instead of spinning: a decode
    # step then takes twice as long (`bench/decode.py`). A thread that ends takes its team with it.
    with ThreadPoolExecutor(1, "agentkit-load") as loader:
        runner, vocab, sizes = loader.submit(_build, path, options, name).result()
    return Engine(runner, vocab, sizes, name)


def _build(path: Path, options: Options, name: str) -> tuple[TorchRunner, Vocabulary, Sizes]:
    device = choose_device(options.device)
    dtype = choose_dtype(device) if options.dtype == "auto" else _DTYPES[options.dtype]
    checkpoint = open_checkpoint(path)
    vocab = checkpoint.vocabulary()
    model = Model(checkpoint, device, dtype, options.packed)
    config = checkpoint.config
    token_bytes = config.layers * 2 * config.kv_heads * config.head_dim * dtype.itemsize
    page_size = options.page_size or (64 if device.type == "cuda" else 16)
    pages = _tokens(options, config.max_positions, token_bytes, lambda: _memory(model, page_size, options)) // page_size
    if pages < 1:
        raise CapacityError(
            f"kv_bytes leaves no room for one page of {page_size} tokens, which takes "
            f"{token_bytes * page_size:,} bytes for {name}: raise it"
        )
    limit = min(config.max_positions, pages * page_size)
    if options.context is not None and options.context > limit:
        raise CapacityError(
            f"context {options.context} is more than {name} can hold: the model has {config.max_positions} positions "
            f"and the pool {pages * page_size} tokens. Lower it, or raise kv_bytes."
        )
    sizes = Sizes(
        context=options.context or limit,
        pages=pages,
        page_size=page_size,
        step_tokens=options.step_tokens,
        running=options.running,
        drafts=_DRAFTED if options.drafts else 0,
    )
    capture = _capture(options, device)
    runner = TorchRunner(model, pages, page_size, options.step_tokens, options.running, vocab.size, capture)
    runner.warm_up()
    return runner, vocab, sizes


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` prefers a CUDA GPU. ModelError if it cannot be used here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} cannot be used here: {error}. Use auto, cpu or cuda.") from error
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """The dtype that is fastest on a device."""
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    return torch.bfloat16 if native else torch.float32


def _capture(options: Options, device: torch.device) -> CudaCapture | None:
    return CudaCapture(device) if options.graphs and device.type == "cuda" else None


def _tokens(options: Options, positions: int, token_bytes: int, memory: Callable[[], int]) -> int:
    """Tokens that the pool may hold; ``memory`` is asked for its bytes where no option says them."""
    if options.kv_bytes is not None:
        return options.kv_bytes // token_bytes
    wanted = _FULL_SEQUENCES * min(options.context or positions, positions)
    return min(wanted, memory() // token_bytes)


def _memory(model: Model, page_size: int, options: Options) -> int:
    """Bytes that the KV pool may take."""
    if model.device.type != "cuda":
        return available_memory() // 4
    torch.cuda.empty_cache()  # of what loading needed for a while
    _try(model, page_size, options)
    left, _ = torch.cuda.mem_get_info(model.device)  # torch keeps what the trial has needed at most
    gc.collect()
    torch.cuda.empty_cache()
    rows = 3 * 4 * options.running * model.config.vocab_size  # logits of a step, and what sampling makes of them
    return max(0, int(0.9 * (left - rows)))


@torch.inference_mode()
def _try(model: Model, page_size: int, options: Options) -> None:
    """Capture all graphs over a small pool, and run a step of as many tokens as there may be."""
    pages = -(-options.step_tokens // page_size)
    capture = _capture(options, model.device)
    runner = TorchRunner(model, pages, page_size, options.step_tokens, options.running, capture=capture)
    runner.warm_up()
    prompt = Sequence(0, [0] * options.step_tokens, "", 0, options.step_tokens)
    for page in range(pages):
        prompt.add_page(page)
    runner.step(Plan([Entry(prompt, 0, options.step_tokens, True)], [], []))
    torch.cuda.synchronize(model.device)


def available_memory() -> int:
    """Bytes a new allocation can have without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
