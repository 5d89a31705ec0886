"""Choosing the next token: bit mask, temperature, top-k, top-p, min-p, and noise that depends on (seed, position).

Tokens are drawn by the Gumbel-max trick: ``argmax(logits / temperature + gumbel)`` is a sample of the softmax. The
noise of a token is a hash of (seed, position, token), so a draw does not depend on what else is in the batch, and
every device that computes the same hash draws the same token, up to the rounding of a logarithm. Of equals the
lowest id wins on every device. `sample` chooses for a whole batch, `draw` for one row; the kernels are in
`agentkit.kernels.choose`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
#: Noise lies between -log(-log(2^-24)) = -2.8 and -log(2^-33) = 22.9.
_NOISE_RANGE = 25.75
#: Temperatures below this leave no room for noise between two different logits in fp32: they are greedy.
_COLDEST = 1e-8
#: Tokens of which one maximum is kept to bound the k-th largest logit from below.
_PIECE = 256
#: The mass of a row is summed in 64 bits with 44 behind the point.
_LARGEST_VOCABULARY = 1 << 19

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Filter:
    """What is kept of a distribution, applied in this order. The neutral values keep everything.

    Attributes:
        temperature: divides the logits; 0 means greedy, and the rest is then without effect.
        top_k: keep the k largest (and their equals); 0 keeps all.
        top_p: keep the smallest set of the most likely tokens whose mass reaches this (and the equals of the last).
        min_p: keep tokens at least this fraction as likely as the most likely one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without noise."""
        return self.temperature < _COLDEST

    @property
    def narrows(self) -> bool:
        """Whether a token that is allowed may be left out."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True, slots=True)
class Rows:
    """How each row of a batch is sampled; made by `Rows.of`.

    Attributes:
        temperature: ``[r]`` fp64, 0 for greedy.
        top_p: ``[r]`` fp64.
        log_min_p: ``[r]`` fp64, −inf for none.
        top_k: ``[r]`` int64, 0 for all.
        seed: ``[r]`` int64, the low 64 bits of the request's seed.
        position: ``[r]`` int64, of the token to be drawn.
        narrows: whether a row has more than a temperature. Known without asking the device, so that the kernels
            for it are launched only where they are needed.
        greedy: whether all rows are greedy: seeds and positions are then without effect. Known in the same way.
    """

    temperature: Tensor
    top_p: Tensor
    log_min_p: Tensor
    top_k: Tensor
    seed: Tensor
    position: Tensor
    narrows: bool
    greedy: bool

    @staticmethod
    def of(
        filters: Sequence[Filter],
        seeds: Sequence[int],
        positions: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Rows:
        """Rows of these filters, two transfers for all.

        Args:
            filters: one for each row.
            seeds: of the requests, any integers.
            positions: of the tokens to be drawn, counted from the start of each sequence.
            device: where the logits are.

        Raises:
            ValueError: the three are not of one length, or a number is out of its range; it names the argument.
        """
        if not len(filters) == len(seeds) == len(positions):
            raise ValueError(f"seeds, positions: {len(seeds)} and {len(positions)} for {len(filters)} filters")
        for f in filters:
            _check(f)
        floats = [
            [0.0 if f.greedy else f.temperature for f in filters],
            [f.top_p for f in filters],
            [_log(f.min_p) for f in filters],
        ]
        wholes = [[min(f.top_k, 2**31) for f in filters], [_signed(s) for s in seeds], [_signed(p) for p in positions]]
        temperature, top_p, log_min_p = _sent(floats, torch.float64, device)
        top_k, seed, position = _sent(wholes, torch.int64, device)
        narrows, greedy = any(f.narrows for f in filters), all(f.greedy for f in filters)
        return Rows(temperature, top_p, log_min_p, top_k, seed, position, narrows, greedy)

    def at(self, positions: Sequence[int]) -> Rows:
        """The same for tokens at other positions, one for each row."""
        if len(positions) != len(self):
            raise ValueError(f"positions: {len(positions)} for {len(self)} rows")
        return replace(self, position=_sent([_signed(p) for p in positions], torch.int64, self.position.device))

    def __len__(self) -> int:
        return len(self.temperature)


def _sent(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Numbers on a device; on a GPU without waiting for what runs there, as a copy of memory that is not pinned may."""
    pinned = torch.device(device).type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was chosen.

    Attributes:
        ids: ``[r]`` int64. −1 where nothing may be drawn: every logit is masked or −inf, or one that is not masked
            is NaN or +inf. A device cannot raise, so the caller makes an error of it when it reads the ids.
        logprob: ``[r]`` fp32, the natural log-probability of the chosen token under the softmax of the row as it was
            given, before mask and temperature; NaN where the id is −1. None where it was not asked for.
    """

    ids: Tensor
    logprob: Tensor | None


def sample(logits: Tensor, mask: Tensor | None, rows: Rows, logprobs: bool = False) -> Sampled:
    """Choose a token for each row of a batch: `apply_mask_reference`, then `draw`, whatever else is in the batch.

    Args:
        logits: ``[r, v]`` fp32, rows contiguous; not changed. Where a row is penalised, `penalize_` comes first, and
            its log-probabilities are those of the penalised row.
        mask: ``[r, ceil(v / 32)]`` int32 as in `apply_mask_reference`; None allows everything.
        rows: how each row is sampled, on the device of the logits.
        logprobs: report the log-probability of the chosen tokens. It costs a pass over the row on the CPU.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; it names the argument.
    """
    _check_batch(logits, mask, rows)
    if logits.device.type == "cuda":
        from agentkit.kernels.choose import choose

        return Sampled(*choose(logits, mask, rows, logprobs))
    ids = torch.from_numpy(_sample(logits, mask, rows))  # pyright: ignore[reportUnknownMemberType]
    if not logprobs:
        return Sampled(ids, None)
    chosen = logits.gather(1, ids.clamp(min=0).unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
    return Sampled(ids, chosen.masked_fill(ids < 0, math.nan))


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
        ``[n]`` fp32, ``-log(-log(1 - v))`` of ``v``, 32 bits of a hash as a fraction. The small ``v``, which win, keep
        all 24 bits of an fp32; the largest is cut to ``1 - 2^-24``, because at 1 the noise would be infinite. The row
        key is SplitMix64 (Steele et al. 2014), the per-token hash is the 32-bit finaliser "lowbias32" of Wellons'
        hash prospector.
    """
    noise = _gumbel(_key(seed, position), tokens.cpu().numpy())
    return torch.from_numpy(noise).to(tokens.device)  # pyright: ignore[reportUnknownMemberType]


def keep_reference(logits: Tensor, f: Filter) -> Tensor:
    """Definition by a full sort: which tokens of one row may be drawn.

    All filters cut at a logit, so equals stay or go together. Tokens whose logit lies so near to that of top-p that
    the rounding of the masses decides are kept by one implementation and not by another.

    Args:
        logits: ``[v]`` fp32, −inf where masked.
        f: with a temperature above 0.

    Returns:
        ``[v]`` bool.
    """
    x = logits * _inverse(f.temperature)
    kept = x > -math.inf
    if 0 < f.top_k < int(kept.sum()):
        kept &= x >= x.sort(descending=True).values[f.top_k - 1]
    if f.top_p < 1:
        ordered = x.masked_fill(~kept, -math.inf).sort(descending=True).values
        mass = ordered.double().softmax(-1).cumsum(-1)
        reached = int((mass < f.top_p).sum())
        kept &= x >= ordered[min(reached, int(kept.sum()) - 1)]
    if f.min_p > 0:
        kept &= x >= x.max() + _log(f.min_p)
    return kept


def draw(logits: Tensor, f: Filter, seed: int, position: int) -> int:
    """Draw one token: of those that `keep_reference` keeps, the one whose scaled logit plus noise is largest.

    Args:
        logits: ``[v]`` fp32, −inf where masked.
        f: the filter.
        seed: of the request.
        position: of the token to be drawn.

    Returns:
        The token's id; the same for the same arguments.

    Raises:
        ValueError: nothing may be drawn: every logit is −inf, or one is NaN or +inf.
    """
    token = _draw(logits.numpy(), None, f, seed, position)
    if token < 0:
        raise ValueError("logits: no token is allowed here, or the logits are not numbers")
    return token


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


def target_log_probabilities(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Natural log-probabilities of given tokens, several for one row or none: log-softmax, then a selection.

    Args:
        logits: ``[r, v]`` fp32.
        rows: ``[k]`` int64, the row of each target.
        tokens: ``[k]`` int64, its column.

    Returns:
        ``[k]`` fp32.
    """
    return logits[rows, tokens] - logits.logsumexp(-1)[rows]


def _check(f: Filter) -> None:
    ranges = {"temperature": (f.temperature, 0, math.inf), "top_k": (f.top_k, 0, math.inf)}
    for name, (value, low, high) in (ranges | {"top_p": (f.top_p, 0, 1), "min_p": (f.min_p, 0, 1)}).items():
        if not low <= value <= high:  # also refuses NaN
            raise ValueError(f"{name}: {value}, expected {low} to {high}")


def _check_batch(logits: Tensor, mask: Tensor | None, rows: Rows) -> None:
    if logits.ndim != 2 or logits.dtype is not torch.float32 or not 0 < logits.shape[1] < _LARGEST_VOCABULARY:
        raise ValueError(
            f"logits: {logits.dtype} {tuple(logits.shape)}, expected float32 [r, v], v below {_LARGEST_VOCABULARY}"
        )
    if logits.stride(1) != 1:
        raise ValueError(f"logits: strides {logits.stride()}, expected consecutive values in a row")
    if len(rows) != len(logits):
        raise ValueError(f"rows: {len(rows)} for {len(logits)} rows of logits")
    if rows.seed.device != logits.device:
        raise ValueError(f"rows: on {rows.seed.device}, the logits are on {logits.device}")
    if mask is None:
        return
    words = -(-logits.shape[1] // 32)
    if mask.dtype is not torch.int32 or mask.shape != (len(logits), words) or (words > 1 and mask.stride(1) != 1):
        raise ValueError(
            f"mask: {mask.dtype} {tuple(mask.shape)}, expected int32 {(len(logits), words)} with consecutive words"
        )
    if mask.device != logits.device:
        raise ValueError(f"mask: on {mask.device}, the logits are on {logits.device}")


def _sample(logits: Tensor, mask: Tensor | None, rows: Rows) -> _Ints:
    """`sample` on the CPU; −1 where nothing may be drawn."""
    values = logits.numpy()
    words = None if mask is None else mask.numpy()
    if rows.greedy:
        ids, settled = _best(values, words)
        others = np.flatnonzero(~settled).tolist() if not settled.all() else []
    else:
        ids, others = np.empty(len(values), dtype=np.int64), range(len(values))
    if not others:
        return ids
    columns: list[list[Any]] = [
        column.tolist()  # pyright: ignore[reportUnknownMemberType]
        for column in (rows.temperature, rows.top_p, rows.log_min_p, rows.top_k, rows.seed, rows.position)
    ]
    for row in others:
        temperature, top_p, log_min_p, top_k, seed, position = (column[row] for column in columns)
        allowed, tokens = (values[row], None) if words is None else _allowed(values[row], words[row])
        f = Filter(temperature, top_k, top_p, math.exp(log_min_p))
        ids[row] = _draw(allowed, tokens, f, seed, position)
    return ids


def _best(values: _Floats, words: NDArray[np.int32] | None) -> tuple[_Ints, NDArray[np.bool_]]:
    """The best token of each row, and whether it may be taken: more often than not, and then no mask is unpacked."""
    best = values.argmax(1)
    row = np.arange(len(best))
    legal = np.isfinite(values[row, best])
    return best, legal if words is None else legal & (words[row, best >> 5] >> (best & 31) & 1).astype(bool)


def _allowed(values: _Floats, words: NDArray[np.int32]) -> tuple[_Floats, _Ints | None]:
    """The logits of the allowed tokens and their ids in order; all logits, −inf where masked, without ids.

    Which of the two depends on where the mask is sparse: words that are all 0 or all 1 are not unpacked.
    """
    some, others = np.flatnonzero(words), np.flatnonzero(words != -1)
    if len(some) * 4 < len(words):
        tokens = _bits(words, some)
        tokens = tokens[: np.searchsorted(tokens, len(values))]
        return values[tokens], tokens
    if len(others) * 4 < len(words):
        values, masked = values.copy(), _bits(~words, others)
        values[masked[: np.searchsorted(masked, len(values))]] = -math.inf
        return values, None
    bits = np.unpackbits(words.view(np.uint8), count=len(values), bitorder="little")
    # +inf where allowed, −inf where not: ten times faster than a selection, and NaN becomes +inf, refused as well.
    return np.fmin(values, (bits.astype(np.float32) - np.float32(0.5)) * np.float32(math.inf)), None


def _bits(words: NDArray[np.int32], at: _Ints) -> _Ints:
    """Which bits are set in some of the words, in order."""
    bits = np.flatnonzero(np.unpackbits(words[at].view(np.uint8), bitorder="little"))
    return at[bits >> 5] * 32 + (bits & 31)


def _draw(values: _Floats, tokens: _Ints | None, f: Filter, seed: int, position: int) -> int:
    """`draw` among tokens in ascending order, all where None; −1 where nothing may be drawn."""
    best = int(values.argmax()) if len(values) else 0  # of a NaN, if there is one
    if not len(values) or not np.isfinite(values[best]):
        return -1
    if not f.greedy:
        x = values * np.float32(_inverse(f.temperature))
        top = x[best]
        if not np.isfinite(top):
            return -1
        # Below the range of the noise no token can win.
        kept = np.flatnonzero(x >= max(_edge(x, top, f), top - np.float32(_NOISE_RANGE)))
        noise = _gumbel(_key(seed, position), kept if tokens is None else tokens[kept])
        best = int(kept[(x[kept] + noise).argmax()])
    return best if tokens is None else int(tokens[best])


def _edge(x: _Floats, top: np.float32, f: Filter) -> np.float32:
    """The smallest scaled logit that `keep_reference` keeps, or less where nothing depends on it."""
    edge = top + np.float32(_log(f.min_p))
    if 0 < f.top_k < len(x) and f.top_k < np.count_nonzero(x > -math.inf):
        kth = _kth_largest(x, f.top_k)
        edge = max(edge, kth)
        x = x[x >= kth] if f.top_p < 1 else x
    if f.top_p < 1:
        # All tokens below this together have less than the mass that is left out.
        likely = np.sort(x[x >= top + np.float32(math.log((1 - f.top_p) / len(x)) - 0.01)])[::-1]
        mass = np.exp(likely - top).cumsum(dtype=np.float64)
        total = float(np.exp(x - top).sum(dtype=np.float64) if len(x) > len(likely) else mass[-1])
        edge = max(edge, np.float32(likely[min(int(np.searchsorted(mass, f.top_p * total)), len(likely) - 1)]))
    return edge


def _kth_largest(x: _Floats, k: int) -> np.float32:
    """The k-th largest of more than k numbers: it is not below the k-th largest of the pieces' maxima."""
    pieces = len(x) // _PIECE
    if k <= pieces:
        crest = x[: pieces * _PIECE].reshape(pieces, _PIECE).max(1)
        x = x[x >= np.partition(crest, -k)[-k]]
    return np.partition(x, -k)[-k]


def _gumbel(key: int, tokens: NDArray[Any]) -> _Floats:
    return _noise(_hash(key, tokens))


def _hash(key: int, tokens: NDArray[Any]) -> NDArray[np.uint32]:
    x = tokens.astype(np.uint32) * np.uint32(0x9E3779B9) + np.uint32(key & _MASK32)  # modulo 2^32
    x ^= np.uint32(key >> 32)
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    x ^= x >> 16
    return x


def _noise(x: NDArray[np.uint32]) -> _Floats:
    v = (x.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    v = np.minimum(v, np.float32(1 - 2.0**-24))
    u = 1 - v
    return -np.log((v - (1 - u)) - np.log(u))  # the bracket is what rounding took from v


def _key(seed: int, position: int) -> int:
    return _splitmix64(_splitmix64(seed & _MASK64) ^ (position & _MASK64))


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _inverse(temperature: float) -> float:
    """1 / temperature, both rounded to fp32: one product for each logit, the same on every device."""
    return float(np.float32(1) / np.float32(temperature))


def _log(min_p: float) -> float:
    """log(min_p) rounded to fp32."""
    return float(np.float32(math.log(min_p))) if min_p > 0 else -math.inf


def _signed(x: int) -> int:
    """The low 64 bits, as int64 holds them."""
    return ((x + 2**63) & _MASK64) - 2**63
