"""Kernels run in Triton's interpreter unless TRITON_INTERPRET says otherwise; Triton reads it when it is imported."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
