"""Tiny random checkpoints of every family, written by transformers itself, and engines on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from agentkit.runtime.engine import Engine
from agentkit.runtime.load import Options, load_engine

ENDS = ["<|im_end|>", "<|endoftext|>"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e6}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False, "rope_parameters": {"rope_theta": 1e6}}),
    "llama": ("Llama", {"tie_word_embeddings": False, "rope_parameters": {"rope_theta": 1e4}}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
}


def write(folder: Path, family: str) -> Any:
    """Save a random model of 3 layers with a byte-level tokenizer; returns transformers' own model of it."""
    name, fields = FAMILIES[family]
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", *ENDS])
    config = getattr(transformers, f"{name}Config")(
        vocab_size=288,  # padded: the tokenizer defines 259
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=[tokenizer.token_to_id(end) for end in ENDS],
        bos_token_id=None,
        **fields,
    )
    torch.manual_seed(sum(map(ord, family)))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual initialisation, so that outputs depend on the whole context and are far from ties.
            parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.dim() > 1 else torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": ENDS[0], "chat_template": None}))
    return model


@contextmanager
def engine(folder: Path, **fields: Any) -> Iterator[Engine]:
    """An engine in exact fp32; small pages, so that sequences cross many of them."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "packed": False,
        "page_size": 4,
        "kv_bytes": 1 << 22,
    }
    with load_engine(folder, Options(**{**defaults, **fields})) as made:
        yield made
