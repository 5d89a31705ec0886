"""Compile kernels for GPUs that are not there, and read from the machine code what they need.

A *variant* is a kernel as the engine launches it: types, constants, options. Each file ``variants_*.py`` beside this
one has a function ``variants() -> list[Variant]``. ``budget.json`` holds what was measured, with a little slack, for
each minor version of Triton; ``test_compiled.py`` fails where a variant needs more.

    python -m tests.kernels.compiled                     print the facts of all variants
    python -m tests.kernels.compiled --match rms         of those whose name contains a word
    python -m tests.kernels.compiled --write             renew this Triton version's part of the budget
                                                         (with --match, only the matching variants' entries)

It runs in a process of its own, without TRITON_INTERPRET, under which nothing can be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BUDGET = Path(__file__).with_name("budget.json")
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
#: Those that have e4m3.
FP8_TARGETS = TARGETS[1:]
#: Shared memory that a block may use, in bytes (CUDA C++ Programming Guide, table of technical specifications).
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
#: Instructions that say how a kernel works: products of tiles, copies to shared memory in the background, wide
#: accesses. On AMD ``mfma`` are the products and ``dwordx4`` the wide accesses.
_CUDA_WORDS = {
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
    "UTCHMMA": r"\bUTCHMMA\b",
    "LDGSTS": r"\bLDGSTS\b",
    "LDG128": r"\bLDG\.[\w.]*128",
    "STG128": r"\bSTG\.[\w.]*128",
}
_HIP_WORDS = {
    "mfma": r"\bv_mfma",
    "load128": r"\b(?:global|buffer)_load_dwordx4",
    "store128": r"\b(?:global|buffer)_store_dwordx4",
}


@dataclass(frozen=True)
class Variant:
    """A kernel as the engine launches it.

    Attributes:
        name: unique, e.g. ``"rms_norm-bf16-2560"``.
        fn: the ``@jit`` function.
        signature: type of each argument that is no constant, e.g. ``{"X": "*bf16", "rows": "i32", "eps": "fp32"}``.
        constexprs: the constants.
        options: ``num_warps``, ``num_stages``.
        divisible: arguments (pointers, strides) that are multiples of 16, as Triton finds out at a launch.
        targets: architectures to compile for.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    divisible: Sequence[str] = ()
    targets: Sequence[str] = TARGETS


@dataclass(frozen=True)
class Facts:
    """What the machine code of a variant needs on one target.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's stack and local memory.
        spills: instructions that store or load spilled registers; on AMD, spilled registers.
        shared: bytes of shared memory of a block.
        counts: how many of the instructions that say how it works.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    counts: dict[str, int]


def variants() -> list[Variant]:
    """All variants of all files."""
    found: list[Variant] = []
    for path in sorted(Path(__file__).parent.glob("variants_*.py")):
        found += importlib.import_module(f"tests.kernels.{path.stem}").variants()
    names = [v.name for v in found]
    assert len(set(names)) == len(names), f"two variants of one name: {sorted(n for n in names if names.count(n) > 1)}"
    return found


def cases() -> list[str]:
    """``variant@target``, all there are."""
    return [f"{v.name}@{target}" for v in variants() for target in v.targets]


def measure(case: str) -> Facts:
    """Compile one case and read its facts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, target = case.rsplit("@", 1)
    variant = next(v for v in variants() if v.name == name)
    arguments = variant.fn.arg_names
    known = {*variant.signature, *variant.constexprs}
    assert known == set(arguments), f"{name}: {sorted(known ^ set(arguments))} do not fit the kernel's arguments"
    source = ASTSource(
        variant.fn,
        {a: "constexpr" if a in variant.constexprs else variant.signature[a] for a in arguments},
        dict(variant.constexprs),
        {(arguments.index(a),): [["tt.divisibility", 16]] for a in variant.divisible},
    )
    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    kernel = triton.compile(source, target=gpu, options=dict(variant.options))
    return _cuda(kernel) if cuda else _hip(kernel)


def _cuda(kernel: Any) -> Facts:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _output(knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    counts = {name: len(re.findall(word, code)) for name, word in _CUDA_WORDS.items()}
    return Facts(registers, stack + local, spills, kernel.metadata.shared, _present(counts))


def _hip(kernel: Any) -> Facts:
    code = kernel.asm["amdgcn"]

    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found, name
        return int(found.group(1))

    spills = note("vgpr_spill_count") + note("sgpr_spill_count")
    counts = {name: len(re.findall(word, code)) for name, word in _HIP_WORDS.items()}
    return Facts(
        note("vgpr_count"), note("private_segment_fixed_size"), spills, kernel.metadata.shared, _present(counts)
    )


def _present(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def entry(facts: Facts) -> dict[str, Any]:
    """A budget from what was measured: registers up to the next multiple of 8 and one more, the rest as it is."""
    return {
        "registers": facts.registers + 15 & ~7,
        "stack": facts.stack,
        "spills": facts.spills,
        "shared": facts.shared,
        "uses": sorted(facts.counts),
    }


def excess(facts: Facts, budget: Mapping[str, Any], target: str) -> list[str]:
    """What is over a budget, in words; empty where nothing is."""
    found = [
        f"{what}: {getattr(facts, what)}, budget {budget[what]}"
        for what in ("registers", "stack", "spills", "shared")
        if getattr(facts, what) > budget[what]
    ]
    found += [f"no {word} any more" for word in budget["uses"] if word not in facts.counts]
    if facts.shared > SHARED_LIMIT[target]:
        found.append(f"shared: {facts.shared}, the GPU has {SHARED_LIMIT[target]}")
    return found


def minor_version() -> str:
    """Of Triton, as the budget's parts are named."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def read_budget() -> dict[str, dict[str, Any]]:
    """The part of ``budget.json`` for the installed Triton; for a version that was not measured, the widest."""
    parts = json.loads(BUDGET.read_text(encoding="utf-8"))
    if minor_version() in parts:
        return parts[minor_version()]
    merged: dict[str, dict[str, Any]] = {}
    for part in parts.values():
        for case, new in part.items():
            old = merged.setdefault(case, new)
            merged[case] = {
                what: sorted({*old[what]} & {*new[what]}) if what == "uses" else max(old[what], new[what])
                for what in new
            }
    return merged


def _attempt(case: str) -> Facts | str:
    try:
        return measure(case)
    except Exception as error:  # whatever a compiler raises: the other cases are still of interest
        return f"{type(error).__name__}: {error}"


def measure_all(names: Sequence[str], workers: int | None = None) -> dict[str, Facts | str]:
    """`measure` in several processes; where it fails, why."""
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        return dict(zip(names, pool.map(_attempt, names), strict=True))


def in_subprocess(names: Sequence[str]) -> dict[str, Facts | str]:
    """`measure_all` from a process whose Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "facts.json"
        command = [sys.executable, "-m", "tests.kernels.compiled", "--json", str(file), "--cases", *names]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=root)
        assert done.returncode == 0, done.stderr
        found = json.loads(file.read_text(encoding="utf-8"))
    return {case: facts if isinstance(facts, str) else Facts(**facts) for case, facts in found.items()}


def _write(measured: Mapping[str, Facts], names: Sequence[str]) -> None:
    parts = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {}
    part = {case: old for case, old in parts.get(minor_version(), {}).items() if case in names}
    part |= {case: entry(facts) for case, facts in measured.items()}
    parts[minor_version()] = part
    lines = ",\n".join(
        f" {json.dumps(version)}: {{\n"
        + ",\n".join(f"  {json.dumps(case)}: {json.dumps(parts[version][case])}" for case in sorted(parts[version]))
        + "\n }"
        for version in sorted(parts)
    )
    BUDGET.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def main() -> None:
    """The command line, see the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.compiled")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--cases", nargs="+", help="only these cases")
    parser.add_argument("--workers", type=int, help="processes; all processors' count if not given")
    parser.add_argument("--write", action="store_true", help="renew the budget")
    parser.add_argument("--json", type=Path, help="write the facts to a file instead of printing them")
    given = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it is until 3.9, which asks for a choice
    everything = cases()
    names = [case for case in given.cases or everything if given.match in case]
    measured = measure_all(names, given.workers)
    if given.json:
        plain = {case: facts if isinstance(facts, str) else asdict(facts) for case, facts in measured.items()}
        given.json.write_text(json.dumps(plain), encoding="utf-8")
    else:
        for case, facts in measured.items():
            print(f"{case:48} {facts}")
    if given.write:
        _write({case: facts for case, facts in measured.items() if not isinstance(facts, str)}, everything)
    failed = [case for case, facts in measured.items() if isinstance(facts, str)]
    if failed and not given.json:
        raise SystemExit(f"{len(failed)} of {len(measured)} did not compile: {', '.join(failed)}")


if __name__ == "__main__":
    main()
