"""Those of the repository's own kernel tests that choose a GPU where there is one, compiled instead of interpreted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator

from bench.gpu.card import Bench
from bench.gpu.report import Check, Item, Note
from bench.gpu.tree import ROOT

#: The other files of the folder put their tensors on the CPU: they are for the interpreter.
FILES = ("tests/kernels/test_attention_triton.py",)
#: What a rehearsal runs of them.
_ONE = "test_doubled_values_double_the_result"


def run(bench: Bench) -> Iterator[Item]:
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        yield Note("pytest or hypothesis is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.suite_plugin", "--tb=line", "-rfE", *FILES]
    if bench.rehearsal:
        command += ["-k", _ONE]
    elif importlib.util.find_spec("xdist") is not None:  # compiling is what takes the time
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    said = process.stdout.strip().splitlines()
    last = said[-1].strip("= ") if said else process.stderr.strip()[-300:]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    wrong = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    passed = process.returncode == 0 and counts.get("passed", 0) > 0
    yield Check(f"{', '.join(FILES)}: {last}", passed, 0.0, "; ".join(wrong)[:600])
    for word, count in counts.items():
        yield bench.figure(f"tests {word}", count, "", role="part")
