"""How exact a kernel must be: no worse than twice the error of plain torch in the same precision.

The rule is that of FlashAttention's tests (Dao, flash-attention, ``hopper/test_flash_attn.py``). It needs no
tolerance chosen by hand: the peer's own error against the exact result is the yardstick.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_exact(ours: Tensor, peer: Tensor, exact: Tensor) -> None:
    """Assert ``max|ours − exact| ≤ 2 max|peer − exact| + rounding``.

    Args:
        ours: what the kernel returned.
        peer: the torch form of the same inputs in the same precision, in the dtype of ``ours``.
        exact: the torch form of the same inputs in fp64.

    The floor ``rounding`` is that of FlashAttention's rule, twice what adding and subtracting 0.3 in the dtype of
    ``ours`` changes the exact result by: where the peer happens to be exact, one rounding more is no error.
    """
    assert ours.dtype == peer.dtype, f"{ours.dtype} is not {peer.dtype}"
    assert exact.dtype is torch.float64
    assert ours.shape == peer.shape == exact.shape, f"{ours.shape}, {peer.shape}, {exact.shape}"
    if not ours.numel():
        return
    assert not (ours.isnan() & ~exact.isnan()).any(), "NaN where the exact result is a number"
    rounded = exact.to(torch.float32 if ours.element_size() == 1 else ours.dtype)
    rounding = 2 * ((rounded + 0.3 - 0.3).double() - rounded.double()).abs().max()
    error, allowed = (ours.double() - exact).abs().max(), 2 * (peer.double() - exact).abs().max() + rounding
    assert error <= allowed, f"error {error:.3e}, torch in the same precision allows {allowed:.3e}"
