"""What a command is pointed at: text in a file or on standard input, Python objects by name, schemas."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from agentkit.runtime.errors import AgentError, SchemaError


def read_text(file: str) -> str:
    """The text of a file, of standard input for ``-``.

    Raises:
        AgentError: it cannot be read or is not UTF-8.
    """
    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise AgentError(f"{name} cannot be read: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise AgentError(f"{name} is not UTF-8 (byte {error.start}). Convert it first.") from error


def python_object(spec: str) -> Any:
    """The object that ``package.module:name`` or ``path/file.py:name`` stands for; imports the module.

    Modules are found as ``python -m`` finds them: the current folder comes first. A file is imported once,
    with its folder on the path, so that it can import its neighbours.

    Raises:
        AgentError: there is no such module or name, or the module fails when it is imported.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise AgentError(f"{spec!r} names no Python object. Write MODULE:NAME or FILE.py:NAME.")
    module = _guarded(_from_file if source.endswith(".py") else _from_path, source)
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        public = ", ".join(n for n in vars(module) if not n.startswith("_")) or "nothing"
        raise AgentError(f"{source} has no {name}. It defines {public}.") from None


def output_type(spec: str) -> Any:
    """The type that a ``.json`` file holds the JSON schema of, or that `python_object` finds.

    Raises:
        AgentError: it cannot be read or imported.
        SchemaError: the file is not a JSON object.
    """
    if not spec.endswith(".json"):
        return python_object(spec)
    try:
        schema = json.loads(read_text(spec))
    except ValueError as error:
        raise SchemaError(f"{spec} is not JSON: {error}. Correct it.") from error
    if not isinstance(schema, dict):
        raise SchemaError(f'{spec} is not a JSON schema. Write an object, such as {{"type": "object"}}.')
    return schema  # pyright: ignore[reportUnknownVariableType]


def _guarded(load: Callable[[str], ModuleType], source: str) -> ModuleType:
    """The module, with whatever it raises on import told in one line: where it happened, and what."""
    try:
        return load(source)
    except AgentError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{source}.".startswith(f"{error.name}."):
            raise AgentError(
                f"There is no module {source}. Name one that Python can import from here, or FILE.py:NAME."
            ) from error
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise AgentError(
            f"{source} fails on import: {type(error).__name__}: {error} "
            f"({where.filename}, line {where.lineno}). Correct it."
        ) from error


def _from_path(module: str) -> ModuleType:
    _search(os.getcwd())
    return importlib.import_module(module)


def _from_file(file: str) -> ModuleType:
    path = Path(file).resolve()
    name = str(path)  # cannot clash with a module that was imported by name
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise AgentError(f"There is no file {file}. Check the path.")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    _search(str(path.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _search(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)
