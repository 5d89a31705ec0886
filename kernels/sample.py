"""Choosing the next token: bit mask, temperature, top-k, top-p, min-p, and noise that depends on (seed, position).

Tokens are drawn by the Gumbel-max trick: ``argmax(logits / temperature + gumbel)`` is a sample of the softmax. The
noise of a token is a hash of (seed, position, token), so a draw does not depend on what else is in the batch, and
every device that computes the same hash draws the same token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
#: Bins over the logits in which the nucleus is located; only the bin where it ends is sorted.
_BINS = 4096
#: Noise from 24 bits lies between -log(log(2^25)) = -2.9 and log(2^25) = 17.4.
_NOISE_RANGE = 20.5


@dataclass(frozen=True, slots=True)
class Filter:
    """What is kept of a distribution, applied in this order. The neutral values keep everything.

    Attributes:
        temperature: divides the logits; 0 means greedy, and the rest is then without effect.
        top_k: keep the k largest (and their equals); 0 keeps all.
        top_p: keep the smallest set of the most likely tokens whose mass reaches this.
        min_p: keep tokens at least this fraction as likely as the most likely one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def apply_mask_reference(logits: Tensor, mask: Tensor) -> Tensor:
    """Definition: logits of tokens whose bit is 0 become −inf.

    Args:
        logits: ``[r, v]``.
        mask: ``[r, ceil(v / 32)]`` int32, token ``t`` at bit ``t % 32`` of word ``t // 32``.

    Returns:
        ``[r, v]``, a new tensor.
    """
    token = torch.arange(logits.shape[1], device=logits.device)
    allowed = (mask[:, token // 32] >> (token % 32)) & 1
    return logits.masked_fill(allowed == 0, -math.inf)


def apply_mask_(logits: Tensor, mask: Tensor) -> None:
    """`apply_mask_reference`, in place."""
    if logits.device.type != "cpu":
        logits.copy_(apply_mask_reference(logits, mask))
        return
    bits = np.unpackbits(mask.numpy().view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    logits.masked_fill_(torch.from_numpy(bits) == 0, -math.inf)  # pyright: ignore[reportUnknownMemberType]


def penalize_(logits: Tensor, seen: Tensor, penalty: float) -> None:
    """Repetition penalty (Keskar et al. 2019, arXiv:1909.05858), in place on one row.

    Args:
        logits: ``[v]``.
        seen: ``[n]`` int64, distinct tokens of the context.
        penalty: above 1 makes them less likely.
    """
    chosen = logits[seen]
    logits[seen] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Gumbel noise of some tokens at one position.

    Args:
        seed: of the request, any integer.
        position: index of the token to be drawn, counted from the start of the sequence.
        tokens: ``[n]`` int64.

    Returns:
        ``[n]`` fp32, from 24 random bits each. The row key is SplitMix64 (Steele et al. 2014), the per-token hash is
        the 32-bit finaliser "lowbias32" of Wellons' hash prospector.
    """
    key = _splitmix64(_splitmix64(seed & _MASK64) ^ (position & _MASK64))
    x = (tokens * 0x9E3779B9 + (key & _MASK32)) & _MASK32
    x ^= key >> 32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    x ^= x >> 16
    uniform = ((x >> 8).to(torch.float32) + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform))


def keep_reference(logits: Tensor, f: Filter) -> Tensor:
    """Definition by a full sort: which tokens of one row may be drawn.

    Args:
        logits: ``[v]`` fp32, −inf where masked.
        f: with a temperature above 0.

    Returns:
        ``[v]`` bool.
    """
    x = logits / f.temperature
    kept = x > -math.inf
    if 0 < f.top_k < int(kept.sum()):
        kept &= x >= x.sort(descending=True).values[f.top_k - 1]
    if f.top_p < 1:
        p = x.masked_fill(~kept, -math.inf).softmax(-1)
        ordered = p.sort(descending=True).values
        reached = int((ordered.cumsum(-1) < f.top_p).sum())
        kept &= p >= ordered[min(reached, len(ordered) - 1)]
    if f.min_p > 0:
        p = x.masked_fill(~kept, -math.inf).softmax(-1)
        kept &= p >= f.min_p * p.max()
    return kept


def draw(logits: Tensor, f: Filter, seed: int, position: int) -> int:
    """Draw one token.

    Args:
        logits: ``[v]`` fp32, −inf where masked.
        f: the filter.
        seed: of the request.
        position: of the token to be drawn.

    Returns:
        The token's id; the same for the same arguments.

    Raises:
        ValueError: nothing may be drawn: every logit is −inf, or one is NaN.
    """
    if f.temperature == 0:
        token = int(logits.argmax())
        if not logits[token] > -math.inf:
            raise ValueError("logits: no token is allowed here, or the logits are not numbers")
        return token
    tokens = _candidates(logits, f)
    x = logits[tokens] / f.temperature
    near = x > x.max() - _NOISE_RANGE  # the others cannot win, whatever their noise
    tokens, x = tokens[near], x[near]
    return int(tokens[(x + gumbel(seed, position, tokens)).argmax()])


def _candidates(logits: Tensor, f: Filter) -> Tensor:
    """The tokens that `keep_reference` keeps, without sorting the vocabulary."""
    tokens = (logits > -math.inf).nonzero().squeeze(-1)
    if len(tokens) == 0:
        raise ValueError("logits: no token is allowed here, or the logits are not numbers")
    x = logits[tokens] / f.temperature
    if 0 < f.top_k < len(x):
        chosen = x >= x.topk(f.top_k).values[-1]
        tokens, x = tokens[chosen], x[chosen]
    if f.top_p < 1:
        chosen = x >= _nucleus_edge(x, f.top_p)
        tokens, x = tokens[chosen], x[chosen]
    if f.min_p > 0:
        chosen = x >= x.max() + math.log(f.min_p)
        tokens = tokens[chosen]
    return tokens


def _nucleus_edge(x: Tensor, top_p: float) -> Tensor:
    """The smallest logit inside the nucleus: locate its bin by a weighted histogram, sort that bin alone."""
    p = x.softmax(-1)
    low = torch.clamp(x.min(), min=float(x.max()) - 64.0)  # below e^-64 of the top nothing can matter
    scale = (_BINS - 1) / torch.clamp(x.max() - low, min=1e-6)
    bins = ((x.max() - x) * scale).clamp(max=_BINS - 1).to(torch.int64)
    mass = torch.bincount(bins, weights=p, minlength=_BINS).cumsum(0)
    edge = min(int((mass < top_p).sum()), _BINS - 1)
    inside = bins == edge
    members, order = x[inside].sort(descending=True)
    before = float(mass[edge - 1]) if edge else 0.0
    reached = int((before + p[inside][order].double().cumsum(0) < top_p).sum())
    return members[min(reached, len(members) - 1)] if len(members) else x.min()


def log_probabilities(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log-probabilities under the model's own distribution, before mask, penalty and temperature.

    Args:
        logits: ``[v]`` fp32.
        token: the chosen one.
        count: how many of the most likely tokens to list.

    Returns:
        The chosen token's, and the most likely tokens with theirs, best first.
    """
    normaliser = logits.logsumexp(-1)
    values, tokens = logits.topk(count) if count else (logits[:0], logits[:0])
    top = [(int(t), float(v - normaliser)) for t, v in zip(tokens, values, strict=True)]
    return float(logits[token] - normaliser), top


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
