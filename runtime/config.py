"""The shape of a decoder-only transformer, read from ``config.json`` without guessed defaults.

A key that changes the result (``rope_theta``, the end tokens, a sliding window) is either read, or refused
with a `ModelError`; nothing is filled in. Differences between the families are fields, not classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from agentkit.runtime.errors import ModelError

Family = Literal["qwen3", "qwen2", "llama"]
Json = Mapping[str, object]
_MOST_LAYERS = 1024  # bounds the work that a lying configuration can cause

FAMILIES: Mapping[str, Family] = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the trained context.

    The fields and formulas are those of transformers' ``modeling_rope_utils`` with every default resolved, so
    that whoever builds the frequencies needs no further rule:

    - ``linear``: frequencies divided by ``factor``.
    - ``llama3``: ``factor``, ``original_positions``, ``low_freq_factor``, ``high_freq_factor``.
    - ``yarn`` (arXiv 2309.00071): ``factor``, ``original_positions``, ``beta_fast``, ``beta_slow``,
      ``truncate`` (whether the correction range is rounded to whole dimensions).

    ``attention_factor`` multiplies cosines and sines; it is 1 except for yarn.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_positions: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class DualChunk:
    """How contexts beyond the trained length are cut into chunks (`agentkit.kernels.chunked`).

    The fields are those of ``dual_chunk_attention_config`` in the configurations of Qwen's models.

    Attributes:
        chunk_size: the largest distance between a row and a key. At most what the model has been trained on.
        local_size: distances up to this are true ones, wherever chunks begin.
        original_positions: the length trained on, from which on scores are sharpened; 0 leaves them as they are.
    """

    chunk_size: int
    local_size: int
    original_positions: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.local_size < self.chunk_size:
            raise ValueError(f"local_size: {self.local_size} is not between 0 and a chunk_size of {self.chunk_size}")
        if self.original_positions < 0:
            raise ValueError(f"original_positions: {self.original_positions} must not be negative")

    @property
    def length(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size - self.local_size

    @property
    def reach(self) -> int:
        """The longest context that is attended to as if there were no chunks."""
        return min(self.length, self.original_positions or self.length)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the forward pass has to know about one checkpoint.

    Attributes:
        vocab_size: rows of the embedding, which may exceed the ids the tokenizer defines (padding).
        max_positions: longest sequence, in tokens.
        tied: the output projection is the embedding.
        qk_norm: RMS norm over every query and key head (Qwen3).
        qkv_bias: the query, key and value projections have biases (Qwen2).
        end_ids: ids that end a turn or a text, as far as the configuration files name them.
        dual_chunk: how longer contexts than it was trained on are read; None if they are not read otherwise.

    Raises:
        ModelError: counts that cannot belong together (a zero, heads that do not divide among the KV heads).
    """

    family: Family
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    end_ids: frozenset[int]
    dual_chunk: DualChunk | None = None

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name)
            for name in ("vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate")
        }
        for name, count in (counts | {"max_positions": self.max_positions}).items():
            if count < 1:
                raise _bad(f"{name} is {count}, but must be at least 1")
        if self.layers > _MOST_LAYERS:
            raise _bad(f"{self.layers} layers are more than any known model has")
        if self.heads % self.kv_heads:
            raise _bad(f"{self.heads} attention heads cannot share {self.kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise _bad(f"the head size {self.head_dim} is odd, so it cannot be rotated in pairs")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 1):
            raise _bad(f"rope_theta is {self.rope_theta}, but must be a finite number above 1")
        if not 0 < self.norm_eps < 1:
            raise _bad(f"the norm's epsilon is {self.norm_eps}, but must lie between 0 and 1")
        if self.dual_chunk is not None and self.rope_scaling is not None and self.rope_scaling.kind == "yarn":
            raise ModelError(
                "YaRN and dual chunk attention both stretch the model's positions: leave out one, rope_scaling or "
                "dual_chunk_attention_config."
            )
        outside = sorted(i for i in self.end_ids if not 0 <= i < self.vocab_size)
        if outside:
            raise _bad(f"the end ids {outside} lie outside the vocabulary of {self.vocab_size}")

    @classmethod
    def from_json(cls, config: Json, generation: Json | None = None) -> ModelConfig:
        """Read the content of ``config.json`` and, where there is one, of ``generation_config.json``.

        Raises:
            ModelError: a family or feature that is not supported, or a missing or malformed key (named).
        """
        family = _family(config)
        _refuse_unsupported(config, family)
        theta, scaling = _rope(config)
        hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
        # Qwen3 chooses the head size freely (0.6B: 16 heads of 128, hidden 1024), so there it is needed.
        if family != "qwen3" and config.get("head_dim") is None:
            head_dim = even_share(hidden, heads)
        else:
            head_dim = integer(config, "head_dim")
        return cls(
            family=family,
            vocab_size=integer(config, "vocab_size"),
            hidden=hidden,
            layers=integer(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=integer(config, "num_key_value_heads"),
            head_dim=head_dim,
            intermediate=integer(config, "intermediate_size"),
            max_positions=integer(config, "max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=number(config, "rms_norm_eps"),
            tied=_flag(config, "tie_word_embeddings"),
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2",
            end_ids=end_ids(config) | end_ids(generation or {}),
            dual_chunk=_dual_chunk(config),
        )


def integer(data: Json, key: str) -> int:
    """The whole number under `key`. Raises ModelError if it is missing or of another type."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _missing(key, "a whole number", value)
    return value


def number(data: Json, key: str) -> float:
    """The number under `key`. Raises ModelError if it is missing or of another type."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _missing(key, "a number", value)
    return float(value)


def end_ids(data: Json) -> frozenset[int]:
    """``eos_token_id`` as a set: absent or null, one id, or a list of ids."""
    value = data.get("eos_token_id")
    if value is None:
        return frozenset()
    ids = cast("list[object]", value) if isinstance(value, list) else [value]
    whole = [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]
    if len(whole) != len(ids):
        raise _missing("eos_token_id", "an id or a list of ids", ids)
    return frozenset(whole)


def even_share(hidden: int, heads: int) -> int:
    """Head size of a family that splits the hidden size evenly. Raises ModelError if that is impossible."""
    if heads < 1 or hidden % heads:
        raise _bad(f"the hidden size {hidden} does not divide into {heads} heads, and no head size is given")
    return hidden // heads


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """The attention factor that the YaRN paper (section 3.4) recommends for `factor` times the context."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _bad(what: str) -> ModelError:
    return ModelError(f"The model's configuration does not hold together: {what}. Download the model again.")


def _missing(key: str, kind: str, value: object) -> ModelError:
    state = "is missing" if value is None else f"is {value!r}"
    return ModelError(
        f"The model's configuration: {key!r} {state}, but must be {kind}. Download the model again, or put "
        "the value from the model's page into config.json."
    )


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"This model has {what}, which agentkit does not run. Use a dense Qwen3, Qwen2/2.5 or Llama checkpoint."
    )


def _flag(config: Json, key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _missing(key, "true or false", value)
    return bool(value)


def _family(config: Json) -> Family:
    value = config.get("architectures")
    names = cast("list[object]", value) if isinstance(value, list) else []
    if len(names) != 1:
        raise _missing("architectures", "a list of one name", names or None)
    name = str(names[0])
    if name not in FAMILIES:
        raise _unsupported(f"the architecture {name}")
    return FAMILIES[name]


def _refuse_unsupported(config: Json, family: Family) -> None:
    if config.get("hidden_act") != "silu":
        raise _unsupported(f"the activation {config.get('hidden_act')!r} (hidden_act)")
    # Qwen2 ignores attention_bias: its query, key and value projections always have biases, its output never.
    for key in ("mlp_bias",) if family == "qwen2" else ("attention_bias", "mlp_bias"):
        if _flag(config, key):
            raise _unsupported(f"biases in its projections ({key})")
    if config.get("quantization_config") is not None:
        raise _unsupported("weights quantised by another tool (quantization_config)")
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported("a partial rotary embedding (partial_rotary_factor)")
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        sliding = any(kind != "full_attention" for kind in cast("list[object]", kinds))
    else:
        # Without a list of layer types transformers lets the layers from max_window_layers on slide.
        windowed = _flag(config, "use_sliding_window") and config.get("sliding_window") is not None
        sliding = windowed and integer(config, "max_window_layers") < integer(config, "num_hidden_layers")
    if sliding:
        raise _unsupported("layers without full attention (layer_types, use_sliding_window)")


def _dual_chunk(config: Json) -> DualChunk | None:
    """``dual_chunk_attention_config``."""
    value = config.get("dual_chunk_attention_config")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _missing("dual_chunk_attention_config", "an object or null", value)
    given = cast("Json", value)
    known = ("chunk_size", "local_size", "original_max_position_embeddings")
    unknown = sorted(key for key in given if key not in known and not key.startswith("sparse_attention"))
    if unknown:
        raise _unsupported(f"dual chunk attention with {', '.join(unknown)} (dual_chunk_attention_config)")
    if given.get("sparse_attention_config") is not None:
        warnings.warn(
            "This model's sparse attention (sparse_attention_config) is left out: prompts are read in full, which is "
            "exact and takes longer.",
            stacklevel=2,
        )
    trained = 0 if given.get(known[2]) is None else integer(given, known[2])
    try:
        return DualChunk(integer(given, "chunk_size"), integer(given, "local_size"), trained)
    except ValueError as error:
        raise ModelError(
            f"The model's configuration: dual_chunk_attention_config has a bad {error}. Download the model again, or "
            "leave it out of config.json for contexts of the length that the model was trained on."
        ) from error


def _rope(config: Json) -> tuple[float, RopeScaling | None]:
    """The base period and the scaling: keys at top level (transformers 4) or in ``rope_parameters`` (5)."""
    given: list[dict[str, object]] = []
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise _missing(key, "an object or null", value)
        if value:
            given.append(dict(cast("Json", value)))
    if len(given) == 2 and given[0] != given[1]:
        raise _bad("rope_parameters and rope_scaling say different things")
    parameters = given[0] if given else {}
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise _unsupported("a rotary embedding per layer type (rope_parameters)")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported("a partial rotary embedding (partial_rotary_factor)")
    places = [place for place in (parameters, config) if place.get("rope_theta") is not None]
    thetas = {number(place, "rope_theta") for place in places}
    if len(thetas) != 1:
        if thetas:
            raise _bad(f"rope_theta is given twice, as {sorted(thetas)}")
        raise _missing("rope_theta", "a number, at top level or in rope_parameters", None)
    if config.get("original_max_position_embeddings") is not None:  # as transformers: top level goes first
        parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return thetas.pop(), _scaling(parameters, config)


def _scaling(parameters: Json, config: Json) -> RopeScaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _above(parameters, "factor", 0))
    if kind == "llama3":
        return _llama3(parameters)
    if kind == "yarn":
        return _yarn(parameters, config)
    raise _unsupported(f"a rotary embedding scaled by {kind!r} (rope_type)")


def _above(data: Json, key: str, bound: float) -> float:
    value = number(data, key)
    if not (math.isfinite(value) and value > bound):
        raise _missing(key, f"a number above {bound:g}", value)
    return value


def _llama3(parameters: Json) -> RopeScaling:
    low = _above(parameters, "low_freq_factor", 0)
    return RopeScaling(
        "llama3",
        _above(parameters, "factor", 0),
        int(_above(parameters, "original_max_position_embeddings", 0)),
        low_freq_factor=low,
        high_freq_factor=_above(parameters, "high_freq_factor", low),
    )


def _yarn(parameters: Json, config: Json) -> RopeScaling:
    original = int(_above(parameters, "original_max_position_embeddings", 0))
    if "factor" in parameters and parameters["factor"] is None:  # then it follows from the two lengths
        factor = integer(config, "max_position_embeddings") / original
    else:
        factor = _above(parameters, "factor", 0)
    # As in transformers, zero and null mean "the default" for a beta, and "not given" for an mscale.
    if parameters.get("attention_factor") is not None:
        attention = number(parameters, "attention_factor")
    elif parameters.get("mscale") and parameters.get("mscale_all_dim"):
        above, below = number(parameters, "mscale"), number(parameters, "mscale_all_dim")
        attention = yarn_magnitude(factor, above) / yarn_magnitude(factor, below)
    else:
        attention = yarn_magnitude(factor)
    return RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=attention,
        beta_fast=number(parameters, "beta_fast") if parameters.get("beta_fast") else 32.0,
        beta_slow=number(parameters, "beta_slow") if parameters.get("beta_slow") else 1.0,
        truncate=parameters.get("truncate") is None or _flag(parameters, "truncate"),
    )
