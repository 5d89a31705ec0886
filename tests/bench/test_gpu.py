"""`bench/gpu.py` rehearsed: every path but the timing runs without a card, and a wrong kernel is not passed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from agentkit.kernels import silu
from bench.gpu import other_proofs
from bench.gpu.correctness import prove
from bench.gpu.report import REHEARSAL, Figure, Report, Section, Target
from bench.gpu.sections import SECTIONS
from tests.kernels.interpreter import exact_floats

ROOT = Path(__file__).resolve().parents[2]


def test_a_rehearsal_runs_every_section_and_marks_every_figure(tmp_path: Path) -> None:
    written, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    process = subprocess.run(
        [sys.executable, "bench/gpu.py", "--rehearse", "--json", str(written), "--markdown", str(table)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads(written.read_text(encoding="utf-8"))
    assert found["rehearsal"]
    assert found["passed"]
    assert list(found["sections"]) == [entry.name for entry in SECTIONS]
    assert {section["status"] for section in found["sections"].values()} == {"ok"}
    proofs = found["sections"]["correctness"]["checks"]
    assert len(proofs) > 40
    assert all(proof["passed"] for proof in proofs)
    figures = [figure for section in found["sections"].values() for figure in section["figures"]]
    assert len(figures) > 50
    assert all(figure["rehearsal"] for figure in figures)
    said = process.stdout.strip().splitlines()[-1]
    assert REHEARSAL in said
    assert "target" in said
    assert REHEARSAL.capitalize() in table.read_text(encoding="utf-8")


def judged(*names: str) -> Section:
    """Some proofs of the gate, as a section."""
    section = Section("correctness")
    for item in prove([(name, partial(other_proofs._gate, 2, 40, torch.float16)) for name in names]):
        section.add(item)
    return section.judge()


def test_a_wrong_kernel_fails_the_run_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    right = silu.launch_silu_mul

    def wrong(gate_up: Tensor) -> Tensor:
        out = right(gate_up)
        out[-1, -1] += 0.1
        return out

    with exact_floats():
        assert Report(True, sections=[judged("gate")]).exit_code == 0
        monkeypatch.setattr(silu, "launch_silu_mul", wrong)
        report = Report(True, sections=[judged("gate")])
    assert report.exit_code == 1
    assert "FAILED correctness" in report.last_line()
    assert "gate" in report.markdown()


def test_a_missed_target_is_marked_and_fails_nothing() -> None:
    figures = [
        Figure("slow", 2.0, "TB/s", share=0.5, floor="copy", target=Target(0.85, goal=0.9)),
        Figure("fast", 30.0, "µs", target=Target(40, of="value", at_most=True)),
    ]
    report = Report(False, sections=[Section("attention-decode", figures=figures), Section("transformers", "cut")])
    assert report.exit_code == 0
    assert report.last_line() == "slow 50% (target 85%, goal 90%, missed) · fast 30 µs (target at most 40)"
    assert report.markdown().count("**missed**") == 1
    assert Report(False, sections=[Section("fp8", "failed")]).exit_code == 1
