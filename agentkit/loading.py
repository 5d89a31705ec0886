"""From the name of a model to a running engine."""

from __future__ import annotations

import os
from pathlib import Path

from agentkit.models import resolve
from agentkit.runtime.engine import Engine
from agentkit.runtime.load import Options, load_engine

DEFAULT_MODEL = "smollm2-135m"


def load(model: str | Path | None = None, options: Options | None = None) -> Engine:
    """Load a model; give the engine to every agent that shall use it, and close it at the end.

    Args:
        model: a name (``Qwen/Qwen3-4B-Instruct-2507``, ``smollm2-135m``), a folder, or a ``.gguf`` file. Default: the
            environment variable AGENTKIT_MODEL, else ``smollm2-135m``.
        options: device, dtype, sizes.

    Raises:
        ModelError: it is not there, or cannot be trusted; the message says how to get it.
    """
    name = str(model or os.environ.get("AGENTKIT_MODEL") or DEFAULT_MODEL)
    return load_engine(resolve(name), options, name)
