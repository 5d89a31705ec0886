"""For pytest's ``-p``: imports from this repository's folders where the package is not installed."""

from __future__ import annotations

from bench.gpu.tree import prepare

prepare()
