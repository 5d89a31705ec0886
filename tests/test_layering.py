"""Who may import whom : tools → agentkit → runtime → kernels, never upward; the planner without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVEL = {"kernels": 0, "runtime": 1, "agentkit": 2, "tools": 3}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer(module: str) -> str | None:
    """The layer of a module of ours, None for one of others'."""
    parts = module.split(".")
    if parts[0] != "agentkit":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "agentkit"


@pytest.mark.parametrize("folder", sorted(LEVEL))
def test_nothing_imports_upward(folder: str) -> None:
    assert modules(folder)
    for path in modules(folder):
        for line, module in imports(path):
            target = layer(module)
            if target is None or (folder == "agentkit" and path.parent.name == "cli"):
                continue  # the command line may reach the tools
            if module == "agentkit" and folder != "agentkit":
                continue  # `from agentkit.x import y` is looked at by its full name
            assert LEVEL[target] <= LEVEL[folder], f"{path.relative_to(ROOT)}:{line} imports {module}"


@pytest.mark.parametrize("name", ["pages", "host", "radix", "sequence", "plan", "draft"])
def test_the_planner_imports_no_torch(name: str) -> None:
    code = f"import sys, agentkit.runtime.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_package_loads_prints_and_fetches_nothing() -> None:
    code = (
        "import sys, socket\n"
        "def refuse(*_): raise AssertionError('network at import')\n"
        "socket.socket.connect = refuse\n"
        "import agentkit\n"
        "heavy = {'torch', 'transformers', 'outlines', 'llguidance', 'gguf', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
