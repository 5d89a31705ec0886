"""From a path to a running engine: device, dtype and the size of the KV pool."""

from __future__ import annotations

import atexit
import gc
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from agentkit.runtime.chunked import ChunkedRunner
from agentkit.runtime.config import DualChunk, ModelConfig
from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.errors import CapacityError, ModelError
from agentkit.runtime.graphs import CudaCapture
from agentkit.runtime.invariant import InvariantRunner
from agentkit.runtime.model import Model
from agentkit.runtime.quantise import Weights, check_fp8, check_weights
from agentkit.runtime.runner import TorchRunner
from agentkit.runtime.sequence import Entry, Plan, Sequence
from agentkit.runtime.sparse import Sparse, SparseRunner
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
        weights: quantise the matrices of the layers while loading: ``int8`` or ``int4``, or ``fp8`` on a GPU. They are
            then kept in this form alone. ``auto`` leaves them as they are stored. What it costs is in
            docs/quantised.md.
        kv_dtype: ``fp8`` keeps keys and values in 8 bits (e4m3): half or a quarter of the memory of a context. On the
            CPU it also costs time, since they are widened for every step. ``auto`` is the dtype of activations.
        context: most tokens in one sequence; None for the model's own limit, as far as the pool reaches.
        kv_bytes: size of the KV pool; None for room for four full contexts, at most a quarter of free memory (on a
            GPU: nine tenths of what a trial step and its graphs leave).
        host_kv_bytes: memory of the host for KV pages that are evicted from the pool; they come back by a copy, not
            by being computed again. 0 forgets them. On a GPU it is pinned.
        page_size: tokens in a KV page; None for 64 on a GPU, as its kernels read 64 keys at once, and 16 on the CPU.
        step_tokens: most tokens in one step.
        running: most sequences in one step.
        dual_chunk: how contexts beyond what the model was trained on are cut into chunks; ``context`` then says how
            long they may be (docs/long.md). None takes what its config.json says.
        attention: ``sparse`` computes long prompts faster and less exactly; a `Request` can still ask for ``dense``.
        sparse: what rows of a prompt see then.
        invariant: give a sequence the same logits, bit for bit, whatever runs beside it, however its prompt is cut, and
            whatever is cached, drafts and preemptions included; for replay and tests. It takes longer.
        drafts: guess what is copied from the context and verify several tokens in one step where that pays. What
            comes out is the same, but for ties that the rounding of a step decides.
        graphs: on a GPU, capture decode steps as CUDA graphs, one for each of some batch sizes, while loading. The CPU
            has none, nor have invariant and sparse engines.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    packed: bool = True
    weights: Weights = "auto"
    kv_dtype: Literal["auto", "fp8"] = "auto"
    context: int | None = None
    kv_bytes: int | None = None
    host_kv_bytes: int = 0
    page_size: int | None = None
    step_tokens: int = 512
    running: int = 64
    drafts: bool = True
    dual_chunk: DualChunk | None = None
    attention: Literal["dense", "sparse"] = "dense"
    sparse: Sparse = Sparse()
    invariant: bool = False
    graphs: bool = True


def load_engine(path: Path, options: Options | None = None, name: str | None = None) -> Engine:
    """Open a checkpoint and start an engine on it.

    Args:
        path: a Hugging Face folder or a GGUF file.
        options: how.
        name: for messages; the path by default.

    Raises:
        ModelError: the checkpoint cannot be read, or an option does not fit it or this machine.
        CapacityError: the KV pool would be smaller than one page, or the context larger than model or pool.
        EngineError: decode steps cannot be captured as graphs.
    """
    options = options or Options()
    name = name or str(path)
    if options.dtype != "auto" and options.dtype not in _DTYPES:
        raise ModelError(f"dtype {options.dtype!r} is not known; use auto, float32 or bfloat16")
    if options.attention not in ("dense", "sparse"):
        raise ModelError(f"attention {options.attention!r} is not known; use dense or sparse")
    if options.invariant and options.attention == "sparse":
        raise ModelError("invariant=True has no sparse attention: leave out one of the two")
    if options.invariant and (options.weights != "auto" or options.kv_dtype != "auto"):
        raise ModelError("invariant=True is for weights and KV as they are: leave out weights and kv_dtype")
    # Loading runs parallel loops. Had they run on the caller's thread, its team of OpenMP threads would live on beside
    # the engine's, and with more threads than cores libgomp lets them sleep between loops instead of spinning: a decode
    # step then takes twice as long (`bench/decode.py`). A thread that ends takes its team with it.
    with ThreadPoolExecutor(1, "agentkit-load") as loader:
        runner, vocab, sizes = loader.submit(_build, path, options, name).result()
    # What is alive now, torch's own objects first of all, is a few hundred thousand that live as long as the process.
    # The collector walks them every now and then, which holds decoding up for 90 ms: from here on it leaves them out.
    gc.unfreeze()  # of an engine loaded before, what is garbage by now
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or Triton's bindings complain of what is still alive at the very end
    return Engine(runner, vocab, sizes, name)


def _build(path: Path, options: Options, name: str) -> tuple[TorchRunner, Vocabulary, Sizes]:
    device = choose_device(options.device)
    dtype = choose_dtype(device) if options.dtype == "auto" else _DTYPES[options.dtype]
    check_weights(options.weights, options.packed, device)
    kv_dtype = choose_kv_dtype(options.kv_dtype, device, dtype)
    checkpoint = open_checkpoint(path)
    vocab = checkpoint.vocabulary()
    config = _config(checkpoint.config, options)
    model = Model(checkpoint, device, dtype, options.packed, options.weights, config)
    token_bytes = config.layers * 2 * config.kv_heads * config.head_dim * kv_dtype.itemsize
    page_size = options.page_size or (64 if device.type == "cuda" else 16)
    tokens = _tokens(options, device, config.max_positions, token_bytes, lambda: _memory(model, page_size, options))
    pages = tokens // page_size
    if pages < 1:
        raise CapacityError(
            f"kv_bytes leaves no room for one page of {page_size} tokens, which takes "
            f"{token_bytes * page_size:,} bytes for {name}: raise it"
        )
    host_pages = options.host_kv_bytes // (token_bytes * page_size)
    if options.host_kv_bytes and host_pages < 1:
        raise CapacityError(
            f"host_kv_bytes is {options.host_kv_bytes:,}, but one page of {page_size} tokens takes "
            f"{token_bytes * page_size:,} bytes for {name}: raise it, or leave it at 0"
        )
    limit = min(config.max_positions, pages * page_size)
    if options.context is not None and options.context > limit:
        raise CapacityError(
            f"context {options.context} is more than {name} can hold: the model has {config.max_positions} positions "
            f"and the pool {pages * page_size} tokens. Lower it, raise kv_bytes, or give dual_chunk for more positions."
        )
    sizes = Sizes(
        context=options.context or limit,
        pages=pages,
        page_size=page_size,
        step_tokens=options.step_tokens,
        running=options.running,
        drafts=_DRAFTED if options.drafts else 0,
        sparse=options.attention == "sparse",
        host_pages=host_pages,
    )
    make: Callable[..., TorchRunner] = TorchRunner
    if (chunks := _chunks(config, sizes, options, name)) is not None:
        make = partial(ChunkedRunner, chunks=chunks)
    elif options.invariant:
        make = InvariantRunner
    elif options.attention == "sparse":
        make = partial(SparseRunner, sparse=options.sparse)
    runner = make(
        model,
        pages,
        page_size,
        options.step_tokens,
        options.running,
        tokens=vocab.size,
        host_pages=host_pages,
        kv_dtype=kv_dtype,
        capture=_capture(options, device),
    )
    runner.warm_up()
    return runner, vocab, sizes


def _config(config: ModelConfig, options: Options) -> ModelConfig:
    """The checkpoint's configuration with the chunks that the options say.

    Raises:
        ModelError: they do not fit it.
    """
    chunks = options.dual_chunk
    if chunks is None:
        return config
    if chunks.chunk_size > config.max_positions:
        raise ModelError(
            f"dual_chunk has a chunk_size of {chunks.chunk_size}, but the model was trained on {config.max_positions} "
            "positions: that is the most it can be"
        )
    return replace(config, dual_chunk=chunks, max_positions=max(config.max_positions, options.context or 0))


def _chunks(config: ModelConfig, sizes: Sizes, options: Options, name: str) -> DualChunk | None:
    """How contexts are cut; None where all are so short that they are not.

    Raises:
        ModelError: other options or the page size forbid it.
    """
    chunks = config.dual_chunk
    if chunks is None or sizes.context <= chunks.reach:
        return None
    if options.invariant or options.attention == "sparse":
        raise ModelError(
            f"{name} reads contexts of more than {chunks.reach} tokens in chunks, for which there is no invariant and "
            f"no sparse attention: leave these options out, or set context={chunks.reach}"
        )
    if chunks.length % sizes.page_size:
        raise ModelError(
            f"page_size {sizes.page_size} does not divide the chunks of {name}, which have {chunks.length} tokens: use "
            f"page_size={math.gcd(chunks.length, 64)}, or set context={chunks.reach}"
        )
    return chunks


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


def choose_kv_dtype(name: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of keys and values under activations of ``dtype``. ModelError if it cannot be used here."""
    if name == "auto":
        return dtype
    if name != "fp8":
        raise ModelError(f"kv_dtype {name!r} is not known; use auto or fp8")
    if device.type == "cuda":
        check_fp8("kv_dtype", device, "Leave kv_dtype out.")
        if dtype is torch.float32:
            raise ModelError("kv_dtype='fp8' has no kernel for activations in float32; use dtype='bfloat16'")
    return torch.float8_e4m3fn


def _capture(options: Options, device: torch.device) -> CudaCapture | None:
    plain = not options.invariant and options.attention == "dense"
    return CudaCapture(device) if options.graphs and plain and device.type == "cuda" else None


def _tokens(options: Options, device: torch.device, positions: int, token_bytes: int, memory: Callable[[], int]) -> int:
    """Tokens that the pool may hold; ``memory`` is asked for its bytes where no option says them.

    Raises:
        CapacityError: ``kv_bytes`` is more than there is. A CPU would find out when the pool is written.
    """
    if options.kv_bytes is not None:
        if device.type == "cpu" and options.kv_bytes > (most := available_memory()):
            raise CapacityError(f"kv_bytes is {options.kv_bytes:,}, but {most:,} bytes of memory are free: lower it")
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
