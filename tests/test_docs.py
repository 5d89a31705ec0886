"""Every snippet in the documentation runs, as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import smol

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{index}")
    for page in PAGES
    for index, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet(code: str, tmp_path: Path) -> None:
    smol.smol_path()
    script = tmp_path / "snippet.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_demo_answers_its_tasks_with_two_tools_each() -> None:
    demo = ROOT / "examples" / "demo.py"
    done = subprocess.run([sys.executable, str(demo)], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for block in done.stdout.split("\n> ")[1:4]:
        assert block.count("  call ") >= 2
        assert block.count("  result ") == block.count("  call ")
        assert block.count("  answer ") == 1
    assert done.stdout.count("Bill(") == 5
    assert re.search(r"tokens: \d+ prefilled, \d+ cached, \d+ decoded, \d+ forced", done.stdout)
    assert "tok/s" in done.stdout
