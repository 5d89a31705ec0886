"""A decode step of one row on the CPU against the forms for any step, over all ways its context can lie in the pool."""

from __future__ import annotations

import pytest
import torch

from agentkit.kernels.attention import Work, paged_attention_reference
from agentkit.kernels.cache import FP8_LIMIT, HeadNorms, rotate_and_write_reference
from agentkit.kernels.decode import Decode
from agentkit.kernels.rope import angles, whole
from tests.kernels.rule import assert_as_exact

LAYERS, SLOTS = 2, 3000
RUNS = {
    "its own token only": ((7, 1),),
    "one run": ((3, 41),),
    "runs in pieces": ((40, 16), (8, 16), (90, 3)),
    "one run in two parts, of which one is shorter": ((100, 333),),
    "stretches that end within runs": ((500, 900), (20, 200), (1500, 1101)),
}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 32), (12, 2, 128)])
@pytest.mark.parametrize("fp8", [False, True])
def test_step_of_one_row_is_what_any_step_is(
    monkeypatch: pytest.MonkeyPatch,
    runs: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    fp8: bool,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    heads, kv_heads, d = shape
    used = torch.cat([torch.arange(first, first + n) for first, n in runs])
    kv = torch.full((LAYERS, SLOTS, 2, kv_heads, d), torch.nan, dtype=dtype)  # nothing outside the runs may be read
    kv[:, used] = torch.randn(LAYERS, len(used), 2, kv_heads, d).to(dtype)
    kv = kv.to(torch.float8_e4m3fn) if fp8 else kv
    cos, sin = angles(torch.tensor([4096]), 5e6 ** -(torch.arange(0, d, 2) / d))
    norms = HeadNorms(torch.randn(d).to(dtype), torch.randn(d).to(dtype), 1e-6) if d == 128 else None
    decode = Decode(kv, runs, *whole(cos, sin, torch.float32), heads, torch.float32)
    for layer in range(LAYERS):
        qkv = torch.randn(1, heads + 2 * kv_heads, d).to(dtype)
        qkv[0, -1] *= 1000  # values beyond the range of fp8
        got = decode(layer, qkv.flatten(1), norms)
        _, peer = rotate_and_write_reference(qkv, cos, sin, kv_heads, norms)
        wide = norms and HeadNorms(norms.query.double(), norms.key.double(), norms.eps)
        query, exact = rotate_and_write_reference(qkv.double(), cos, sin, kv_heads, wide)
        if fp8:
            peer, exact = (x.clamp(-FP8_LIMIT, FP8_LIMIT) for x in (peer, exact))
        assert_as_exact(kv[layer, used[-1:]], peer.to(kv.dtype), exact)
        keys, values = kv[layer].double().unbind(1)
        want = paged_attention_reference(query, keys, values, [Work(0, 1, runs)], d**-0.5)
        torch.testing.assert_close(got.double(), want.flatten(1), rtol=1e-5, atol=1e-5)
