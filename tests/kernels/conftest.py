"""Every kernel that a test of this folder launches runs with right bf16 and fp8 and under the sanitizer."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """Nothing to do where kernels are compiled (TRITON_INTERPRET=0) or there is no Triton."""
    if find_spec("triton") is None:
        yield
        return
    from triton import knobs

    if not knobs.runtime.interpret:
        yield
        return
    from tests.kernels.interpreter import exact_floats
    from tests.kernels.sanitizer import sanitized

    with exact_floats(), sanitized():
        yield
