"""Reading config.json: what transformers writes is read exactly, and whatever would be guessed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from agentkit.runtime.config import DualChunk, ModelConfig, RopeScaling
from agentkit.runtime.errors import ModelError

QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_published_configuration_of_qwen3_4b() -> None:
    config = ModelConfig.from_json(QWEN3_4B, {"eos_token_id": [151645, 151643]})
    assert config == ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden=2560,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=9728,
        max_positions=262144,
        rope_theta=5e6,
        rope_scaling=None,
        norm_eps=1e-6,
        tied=True,
        qk_norm=True,
        qkv_bias=False,
        end_ids=frozenset({151645, 151643}),
    )


@pytest.mark.parametrize(("cls", "family"), [(Qwen3Config, "qwen3"), (Qwen2Config, "qwen2"), (LlamaConfig, "llama")])
def test_what_transformers_5_writes(cls: type[Qwen3Config], family: str, tmp_path: Path) -> None:
    written = cls(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=7,
        rope_parameters={"rope_type": "default", "rope_theta": 123456.0},
        architectures=[f"{family.capitalize()}ForCausalLM"],
    )
    written.save_pretrained(tmp_path)
    config = ModelConfig.from_json(json.loads((tmp_path / "config.json").read_text()))
    assert (config.family, config.rope_theta, config.rope_scaling) == (family, 123456.0, None)
    assert (config.hidden, config.heads, config.kv_heads, config.head_dim) == (64, 4, 2, 16)
    assert (config.qk_norm, config.qkv_bias) == (family == "qwen3", family == "qwen2")
    assert config.end_ids == {7}
    assert config.tied is False


NEEDED = [
    *("architectures", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "vocab_size"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
]


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_key_is_an_error_that_names_it(key: str) -> None:
    with pytest.raises(ModelError, match=key):
        ModelConfig.from_json({k: v for k, v in QWEN3_4B.items() if k != key})


def test_head_size_of_a_family_that_divides_evenly() -> None:
    data = {k: v for k, v in QWEN3_4B.items() if k != "head_dim"}
    assert ModelConfig.from_json({**data, "architectures": ["LlamaForCausalLM"]}).head_dim == 80
    with pytest.raises(ModelError, match="does not divide"):
        ModelConfig.from_json({**data, "architectures": ["LlamaForCausalLM"], "hidden_size": 2561})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": []}, "architectures"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "twice"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "per layer type"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"num_key_value_heads": 7}, "evenly"),
        ({"num_hidden_layers": 0}, "layers"),
        ({"num_hidden_layers": 10**12}, "layers"),
        ({"hidden_size": -64}, "hidden"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"head_dim": 127}, "127"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rms_norm_eps": 0}, "epsilon"),
        ({"eos_token_id": 151936}, "151936"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_what_cannot_run_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        ModelConfig.from_json({**QWEN3_4B, **change})


def test_qwen2_has_its_biases_whatever_attention_bias_says() -> None:
    for flag in (True, False):
        config = ModelConfig.from_json({**QWEN3_4B, "architectures": ["Qwen2ForCausalLM"], "attention_bias": flag})
        assert config.qkv_bias
        assert not config.qk_norm


def test_windows_that_no_layer_uses_are_full_attention() -> None:
    unused = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36}
    assert ModelConfig.from_json({**QWEN3_4B, **unused}) == ModelConfig.from_json(QWEN3_4B)
    listed = {"layer_types": ["full_attention"] * 36}
    assert ModelConfig.from_json({**QWEN3_4B, **listed}) == ModelConfig.from_json(QWEN3_4B)


def test_end_ids_are_united_from_both_files() -> None:
    assert ModelConfig.from_json(QWEN3_4B, {"eos_token_id": 151643}).end_ids == {151643, 151645}
    assert ModelConfig.from_json({**QWEN3_4B, "eos_token_id": None}, {}).end_ids == frozenset()


def test_llama3_and_linear_scaling_in_both_spellings() -> None:
    expected = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert ModelConfig.from_json({**QWEN3_4B, "rope_scaling": LLAMA3_SCALING}).rope_scaling == expected
    modern = {k: v for k, v in QWEN3_4B.items() if not k.startswith("rope")}
    modern["rope_parameters"] = {**LLAMA3_SCALING, "rope_theta": 5e5}
    config = ModelConfig.from_json(modern)
    assert (config.rope_theta, config.rope_scaling) == (5e5, expected)
    old = {**QWEN3_4B, "rope_scaling": {"type": "linear", "factor": 2}}
    assert ModelConfig.from_json(old).rope_scaling == RopeScaling("linear", 2.0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_factor": 1.25},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"mscale": 0.7},
        {"factor": None},
        {"factor": 0.5},
        {"beta_fast": 24, "beta_slow": 2, "truncate": False},
        {"beta_fast": None, "beta_slow": 0},
    ],
)
def test_yarn_resolves_its_defaults_as_transformers_does(change: dict[str, object]) -> None:
    given = {**YARN, **change}
    scaling = ModelConfig.from_json({**QWEN3_4B, "rope_scaling": given}).rope_scaling
    assert scaling is not None
    model = SimpleNamespace(
        rope_parameters={**given, "rope_theta": 5e6},
        standardize_rope_params=lambda: None,
        head_dim=128,
        hidden_size=2560,
        num_attention_heads=32,
        max_position_embeddings=262144,
    )
    _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](model)
    assert scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert scaling.factor == (given["factor"] or 262144 / 32768)
    assert scaling.original_positions == 32768
    assert scaling.beta_fast == (change.get("beta_fast") or 32)
    assert scaling.beta_slow == (change.get("beta_slow") or 1)
    assert scaling.truncate is change.get("truncate", True)


def test_dual_chunk_attention_is_read_as_qwen_writes_it() -> None:
    given = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    config = ModelConfig.from_json({**QWEN3_4B, "dual_chunk_attention_config": given})
    assert config.dual_chunk == DualChunk(262144, 8192, 262144)
    assert config.dual_chunk.length == config.dual_chunk.reach == 253952
    del given["original_max_position_embeddings"]
    config = ModelConfig.from_json({**QWEN3_4B, "dual_chunk_attention_config": given})
    assert config.dual_chunk == DualChunk(262144, 8192, 0)
    assert ModelConfig.from_json({**QWEN3_4B, "dual_chunk_attention_config": None}).dual_chunk is None
    sparse = {
        **given,
        "sparse_attention_enabled": True,
        "sparse_attention_config": [{"0": ["vertical_and_slash", 30, 800, 1]}],
    }
    with pytest.warns(UserWarning, match="sparse_attention_config.* is left out"):
        assert ModelConfig.from_json({**QWEN3_4B, "dual_chunk_attention_config": sparse}) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "'dual_chunk_attention_config' is .*but must be an object or null"),
        ({"local_size": 8}, "'chunk_size' is missing, but must be a whole number"),
        ({"chunk_size": 64, "local_size": 1.5}, "'local_size' is 1.5"),
        ({"chunk_size": 64, "local_size": 64}, "a bad local_size: 64 .*leave it out of config.json"),
        ({"chunk_size": 64, "local_size": 8, "original_max_position_embeddings": -1}, "a bad original_positions: -1"),
        ({"chunk_size": 64, "local_size": 8, "shift": 1}, "dual chunk attention with shift"),
    ],
)
def test_dual_chunk_attention_that_cannot_be_is_refused(given: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_json({**QWEN3_4B, "dual_chunk_attention_config": given})


def test_yarn_and_dual_chunk_attention_are_not_both_taken() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 65536}
    given = {"chunk_size": 64, "local_size": 8}
    with pytest.raises(ModelError, match="leave out one, rope_scaling or dual_chunk_attention_config"):
        ModelConfig.from_json({**QWEN3_4B, "rope_scaling": yarn, "dual_chunk_attention_config": given})
