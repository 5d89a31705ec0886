"""Where Triton is not installed: everything imports, the CPU works, and a launch says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

KERNELS = sorted(p.stem for p in (Path(__file__).resolve().parents[2] / "kernels").glob("*.py") if p.stem != "__init__")

WITHOUT_TRITON = f"""
import importlib, sys
from importlib.abc import MetaPathFinder

class Hide(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name="triton")

sys.meta_path.insert(0, Hide())
for name in {KERNELS!r}:
    importlib.import_module(f"agentkit.kernels.{{name}}")

import torch
from agentkit.kernels import norm, silu
assert torch.equal(norm.rms_norm(torch.ones(2, 4), torch.ones(4), 0.0), torch.ones(2, 4))
for launch in (lambda: norm._rms_norm[(1,)](1, 2), lambda: silu.launch_silu_mul(torch.ones(2, 4))):
    try:
        launch()
    except RuntimeError as error:
        print(error)
"""

WITH_A_BROKEN_TRITON = """
import sys
from importlib.abc import MetaPathFinder

class Break(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton._C'", name="triton._C")

sys.meta_path.insert(0, Break())
import agentkit.kernels.jit
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def test_without_triton_all_but_a_launch_works() -> None:
    done = run(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == "_rms_norm is a Triton kernel: install triton, or use the CPU"
    assert lines[1].endswith("install triton, or use the CPU")


def test_a_broken_installation_is_not_taken_for_a_missing_one() -> None:
    done = run(WITH_A_BROKEN_TRITON)
    assert done.returncode != 0
    assert "No module named 'triton._C'" in done.stderr
