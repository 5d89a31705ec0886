"""``agentkit doctor``: what is installed, what agentkit would choose and why, and whether the model runs."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agentkit import models
from agentkit.cli.terminal import GREEN, RED, paint
from agentkit.runtime.errors import AgentError

if TYPE_CHECKING:
    import torch

    from agentkit.runtime.engine import Engine

_PACKAGES = ("torch", "triton", "transformers", "outlines", "llguidance")
#: Tokens the live check decodes.
_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at.
        text: what was found.
        remedy: what to do, if it is a problem.
    """

    topic: str
    text: str
    remedy: str | None = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe ``agentkit doctor``, which has no options."""
    parser.description = "Check this installation: a remedy for each problem; the exit code is 1 if there is one."
    parser.set_defaults(command=command)


def command(_: argparse.Namespace) -> int:
    """Print every finding as soon as it is made."""
    problems = 0
    for finding in findings():
        problems += finding.remedy is not None
        _print(finding)
    print(f"{problems} problem{'s' * (problems != 1)}" if problems else "everything works")
    return 1 if problems else 0


def findings() -> Iterator[Finding]:
    """Everything that is checked, cheap things first; what needs torch only where torch can be imported."""
    yield _python()
    yield from _packages()
    try:
        import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except (ImportError, OSError) as error:  # OSError: a shared library of its own is missing
        yield Finding("torch", f"cannot be imported: {error}", "Run `pip install --force-reinstall torch`.")
        return
    checks: tuple[Callable[[], Finding], ...] = (_device, _dtype, _memory, _threads)
    for check in checks:
        yield check()
    yield from _model()


def _python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}"
    supported = (3, 11) <= sys.version_info < (3, 13)
    return Finding("python", text, None if supported else "Make an environment with Python 3.11 or 3.12.")


def _packages() -> Iterator[Finding]:
    """Installed versions beside those that agentkit declares it needs."""
    from packaging.requirements import Requirement

    declared = map(Requirement, importlib.metadata.requires("agentkit-local") or ())
    needed = {need.name: need for need in declared if need.marker is None or need.marker.evaluate({"extra": ""})}
    for name in _PACKAGES:
        need = needed.get(name)
        wanted = f"Run `pip install '{name}{need.specifier}'`." if need else None
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "is not installed" if need else "is not installed, nor needed here", wanted)
            continue
        fits = need is None or need.specifier.contains(version, prereleases=True)
        yield Finding(
            name,
            version if fits else f"{version}, which agentkit does not work with",
            None if fits else wanted,
        )


def _device() -> Finding:
    import torch

    device = _chosen_device()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return Finding("device", f"cuda: {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    if shutil.which("nvidia-smi") is None:
        return Finding("device", "cpu: this machine has no NVIDIA driver")
    build = torch.version.cuda  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    if build is None:
        return Finding(
            "device",
            "cpu: there is an NVIDIA driver, but this torch was built without CUDA",
            "Install torch's CUDA build: https://pytorch.org/get-started/locally.",
        )
    return Finding(
        "device",
        f"cpu: torch was built for CUDA {build}, but finds no GPU",
        "Look at `nvidia-smi`: the driver may be too old for it. Look at CUDA_VISIBLE_DEVICES as well.",
    )


def _dtype() -> Finding:
    import torch

    from agentkit.runtime.load import choose_dtype as choose

    device = _chosen_device()
    dtype = choose(device)
    reason = "this CPU does not multiply bfloat16 natively"
    if dtype == torch.bfloat16:
        reason = f"the {'GPU' if device.type == 'cuda' else 'CPU'} multiplies it natively"
    return Finding("dtype", f"{str(dtype).removeprefix('torch.')}: {reason}")


def _chosen_device() -> torch.device:
    from agentkit.runtime.load import choose_device as choose

    return choose("auto")


def _memory() -> Finding:
    """Free memory, beside what the default model takes if it is installed."""
    from agentkit.runtime.load import available_memory

    free = available_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    try:
        path = models.resolve(_default_model())
    except AgentError:  # told by the check of the model
        return Finding("memory", text)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
    if _chosen_device().type == "cpu" and size > free:
        remedy = "Close other programs, or name a smaller model in AGENTKIT_MODEL."
        return Finding("memory", f"{text}, less than the {size / 1e9:.1f} GB of {_default_model()}", remedy)
    return Finding("memory", text)


def _threads() -> Finding:
    import torch

    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{threads} on {cores} cores"
    remedy = f"Set OMP_NUM_THREADS={cores}: threads that share a core wait for each other."
    return Finding("threads", text, remedy if threads > cores else None)


def _model() -> Iterator[Finding]:
    """Whether the default model is here, and whether it runs."""
    name = _default_model()
    chosen = "AGENTKIT_MODEL" if os.environ.get("AGENTKIT_MODEL") else "default"
    try:
        path = models.resolve(name)
        yield Finding("model", f"{name} ({chosen}) at {path}")
        yield _live(path, name)
    except AgentError as error:
        yield Finding("model", f"{name} ({chosen}) cannot be used", str(error))


def _default_model() -> str:
    from agentkit.loading import DEFAULT_MODEL

    return os.environ.get("AGENTKIT_MODEL") or DEFAULT_MODEL


def _live(path: Path, name: str) -> Finding:
    """Load the model and decode with it."""
    import anyio

    from agentkit.runtime.load import Options, load_engine

    began = time.perf_counter()
    with load_engine(path, Options(context=256), name) as engine:
        loaded = time.perf_counter() - began
        made, seconds = anyio.run(_decode, engine)
    # The first token is left out of the rate: the prompt was computed with it.
    rate = f"{(made - 1) / seconds:.0f} tok/s"
    return Finding("live check", f"loaded in {loaded:.1f} s, decoded {made} tokens at {rate}")


async def _decode(engine: Engine) -> tuple[int, float]:
    """How many tokens were decoded, and the seconds from the first to the last."""
    from agentkit.runtime.request import Request
    from agentkit.template import ChatTemplate, User

    ids = ChatTemplate(engine.vocab).encode_start([User("Say hello.")])
    async with engine.generate(Request(ids, max_tokens=_TOKENS, ignore_end=True)) as generation:
        await anext(generation)
        began = time.perf_counter()
        async for _ in generation:
            pass
        return len(generation.ids), time.perf_counter() - began


def _print(finding: Finding) -> None:
    mark = paint("ok", GREEN, sys.stdout) if finding.remedy is None else paint("!!", RED, sys.stdout)
    print(f"{mark} {finding.topic:<12} {finding.text}", flush=True)
    if finding.remedy is not None:
        print(f"   {'':<12} → {finding.remedy}", flush=True)
