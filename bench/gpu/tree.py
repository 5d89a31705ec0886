"""Imports from this repository's folders where the package is not installed, as on a machine rented by the hour.

The folders ``kernels/`` and ``runtime/`` become `agentkit.kernels` and `agentkit.runtime`. `agentkit` itself is an
empty package then: its own modules need grammar libraries, and nothing measured here does.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepare() -> None:
    """Make `agentkit.kernels`, `agentkit.runtime` and `tests.kernels` importable."""
    if not _installed():
        _package("agentkit", None)
        for name in ("kernels", "runtime"):
            _package(f"agentkit.{name}", ROOT / name)
    for name in ("tests", "tests.kernels"):  # by path: other projects install packages of this name
        if name not in sys.modules:
            _package(name, ROOT.joinpath(*name.split(".")))


def _installed() -> bool:
    """Whether `agentkit.kernels` can be found, without running ``agentkit/__init__.py`` to find out."""
    spec = importlib.util.find_spec("agentkit")
    if spec is None:
        return False
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    return any(find("agentkit.kernels", spec.submodule_search_locations) for find in finders if find)


def _package(name: str, folder: Path | None) -> None:
    """Register a folder as a package; no folder is a package without modules of its own."""
    init = folder / "__init__.py" if folder is not None else None
    if init is not None and init.exists():
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
    else:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)] if folder is not None else []
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
