"""GGUF files: tiny ones written by the gguf package, the real SmolLM2, and files that lie."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agentkit.runtime.config import RopeScaling
from agentkit.runtime.errors import ModelError
from agentkit.runtime.vocab import Vocabulary, byte_alphabet
from agentkit.runtime.weights import Blocks, open_checkpoint
from tests.qwen import qwen_folder
from tests.smol import smol_path

HEADER_BYTES = 8000  # enough for the metadata and some tensor entries of the tiny files below
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDE, LAYERS = 256, 4, 2, 64, 512, 2
TOKENS = [*byte_alphabet(), "<|im_end|>", "<|endoftext|>", "<tool>", "ab", "[PAD260]"]
TYPES = [*[1] * 256, 3, 3, 4, 1, 5]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODELS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny_state(arch: str, tied: bool = False) -> dict[str, torch.Tensor]:
    config, model = MODELS[arch]
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=len(TOKENS),
            hidden_size=HIDDEN,
            intermediate_size=WIDE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    state: dict[str, torch.Tensor] = made.state_dict()
    if tied:
        del state["lm_head.weight"]
    return {name: torch.randn_like(value) for name, value in state.items()}


def gguf_name(name: str) -> str:
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, end = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{end}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{end}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of llama.cpp's converter: within a head, row i of each half side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    arch: str,
    state: dict[str, torch.Tensor],
    kind: Kind = Kind.F32,
    drop: tuple[str, ...] = (),
    extra: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """Write a GGUF file in the way of llama.cpp's converter."""
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
    }
    for key, value in numbers.items():
        if key not in drop:
            writer.add_uint32(f"{arch}.{key}", value)
    for key, value in {"rope.freq_base": 5e5, "attention.layer_norm_rms_epsilon": 1e-6}.items():
        if key not in drop:
            writer.add_float32(f"{arch}.{key}", value)
    add_tokenizer(writer, TOKENS, TYPES, ["a b"], "gpt-2", eos=256)
    extra(writer)
    for name, value in state.items():
        array = value.numpy()
        if arch == "llama" and "q_proj" in name:
            array = interleaved(array, HEADS)
        if arch == "llama" and "k_proj" in name:
            array = interleaved(array, KV_HEADS)
        raw = gguf.quants.quantize(array, kind) if array.ndim == 2 else array
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind if array.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(
    writer: gguf.GGUFWriter, tokens: list[str], types: list[int], merges: list[str], pre: str, eos: int
) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(eos)
    writer.add_chat_template("{{ messages }}")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "qwen3", tiny_state("qwen3")).read_bytes()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_shapes_and_row_order_come_back(tmp_path: Path, arch: str, tied: bool) -> None:
    state = tiny_state(arch, tied)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", arch, state))
    assert set(checkpoint.names()) == set(state)
    for name, value in state.items():
        tensor = checkpoint.tensor(name)
        assert isinstance(tensor, torch.Tensor)
        assert torch.equal(tensor, value), name
    config = checkpoint.config
    assert (config.family, config.tied, config.qk_norm, config.qkv_bias) == (
        arch,
        tied,
        arch == "qwen3",
        arch == "qwen2",
    )
    assert (config.rope_theta, config.rope_scaling, config.max_positions) == (5e5, None, 512)
    assert (config.end_ids, config.vocab_size) == ({256, 257}, len(TOKENS))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_every_kind_is_widened_as_by_the_gguf_package(tmp_path: Path, arch: str, kind: Kind) -> None:
    state = tiny_state(arch)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", arch, state, kind))
    for name, value in state.items():
        expected = value.numpy()
        if value.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
        tensor = checkpoint.tensor(name)
        dense = tensor.dense(torch.float32) if isinstance(tensor, Blocks) else tensor.float()
        assert isinstance(tensor, Blocks) is (value.ndim == 2 and kind.name.startswith("Q"))
        assert np.array_equal(dense.numpy(), expected), name
        if isinstance(tensor, Blocks):
            assert torch.equal(tensor.dense(torch.bfloat16), dense.to(torch.bfloat16))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"]),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_blocks_are_widened_exactly(kind: Any, rows: int, blocks: int, seed: int) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    matrix = Blocks(kind, (rows, blocks * elements), torch.from_numpy(raw))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, Kind[kind])
    dense = matrix.dense(torch.float32).numpy()
    assert np.array_equal(dense, expected, equal_nan=True)
    parts = matrix.nibbles()
    assert (parts is None) is (kind not in ("Q4_0", "Q4_1", "Q4_K"))
    if parts is not None:
        q, scale, minimum = parts
        assert (q.dtype, scale.dtype, minimum.dtype) == (torch.uint8, torch.float32, torch.float32)
        assert int(q.max()) <= 15
        assert scale.shape == minimum.shape == (rows, blocks * elements // 32)
        rebuilt = q.view(rows, -1, 32) * scale[..., None] + minimum[..., None]
        finite = torch.isfinite(scale) & torch.isfinite(minimum)
        reference = torch.from_numpy(expected).view(rows, -1, 32)
        assert torch.equal(rebuilt[finite], reference[finite])


def test_widening_in_chunks_is_seamless() -> None:
    rows, columns = 600, 16384  # more elements than are widened at once
    data = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    raw = gguf.quants.quantize(data, Kind.Q8_0)
    dense = Blocks("Q8_0", (rows, columns), torch.from_numpy(raw)).dense(torch.float16)
    assert np.array_equal(dense.numpy(), gguf.quants.dequantize(raw, Kind.Q8_0).astype(np.float16))


# SmolLM2 itself


def test_the_weights_of_smollm2_are_those_that_transformers_reads() -> None:
    path = smol_path()
    checkpoint = open_checkpoint(path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert theirs.config.rope_parameters["rope_theta"] == checkpoint.config.rope_theta == 1e5
    assert set(checkpoint.names()) == set(state) - {"lm_head.weight"}
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        dense = tensor.dense(torch.float32) if isinstance(tensor, Blocks) else tensor
        assert torch.equal(dense, state[name]), name


PIECES = [
    *("hello", "World", "don't", "I'LL", "x1y22z333", "3.14159", "1234567", "٣٤٥", "²³", "½"),
    *(" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", "\u00a0", "\u3000", "\u200b"),
    *("naïve", "e\u0301", "你好", "日本語", "한국어", "नमस्ते", "שלום", "مرحبا", "👩‍👩‍👧", "🇩🇪"),
    *("def f(x):", "    return x**2", "if(a!=b){c+=1;}", "<div class='a'>", "// --", "$$", "...", "’s", "_"),
]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map("".join))
def test_text_of_smollm2_is_encoded_as_by_transformers(text: str) -> None:
    """transformers reads no pre-tokenizer from GGUF, so the cuts around every digit are made here."""
    text = SMOL.decode(SMOL.encode(text))  # some characters are not in the vocabulary
    pieces = [""]
    for character in text:
        if unicodedata.category(character).startswith("N"):
            pieces += [character, ""]
        else:
            pieces[-1] += character
    expected = [i for piece in pieces if piece for i in THEIRS.encode(piece, add_special_tokens=False)]
    assert SMOL.encode(text) == expected


SMOL = open_checkpoint(smol_path()).vocabulary()
THEIRS = AutoTokenizer.from_pretrained(smol_path().parent, gguf_file=smol_path().name)


def test_control_tokens_and_template_of_smollm2_are_those_of_transformers() -> None:
    assert set(SMOL.control) == {str(t) for t in THEIRS.added_tokens_decoder.values()}
    assert SMOL.chat_template == THEIRS.chat_template
    assert (SMOL.eos_text, SMOL.bos_text) == (THEIRS.eos_token, THEIRS.bos_token)


# Tokenizers


def test_the_tokenizer_of_qwen3_survives_the_way_through_gguf(tmp_path: Path) -> None:
    """Written as llama.cpp's converter does: control tokens by kind, the padding as unused tokens."""
    ours = Vocabulary.from_folder(qwen_folder())
    data = json.loads(ours.json)
    special = {token["content"]: token["special"] for token in data["added_tokens"]}
    ids = {**data["model"]["vocab"], **ours.control}
    tokens = sorted(ids, key=lambda text: ids[text])
    types = [1 if t not in special else 3 if special[t] else 4 for t in tokens]
    padding = [f"[PAD{i}]" for i in range(len(tokens), len(tokens) + 267)]
    merges = [" ".join(pair) for pair in data["model"]["merges"]]
    kept = tokenizer_file(tmp_path, [*tokens, *padding], [*types, *[5] * 267], merges, "qwen2", ours.end_id)
    theirs = open_checkpoint(kept).vocabulary()
    assert (theirs.size, theirs.end_ids, theirs.control) == (ours.size, {151643, 151645}, ours.control)
    assert all(theirs.token_bytes(i) == ours.token_bytes(i) for i in range(0, 152000, 11))
    for text in ["".join(PIECES), *PIECES, "<|im_end|><tool_call>"]:
        assert theirs.encode(text) == ours.encode(text)


def tokenizer_file(folder: Path, tokens: list[str], types: list[int], merges: list[str], pre: str, eos: int) -> Path:
    """A GGUF file of one small layer around a vocabulary."""
    writer = gguf.GGUFWriter(folder / "vocab.gguf", "qwen2")
    add_tokenizer(writer, tokens, types, merges, pre, eos)
    for key in ("block_count", "attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"qwen2.{key}", 1)
    for key in ("embedding_length", "feed_forward_length", "context_length"):
        writer.add_uint32(f"qwen2.{key}", 2)
    writer.add_float32("qwen2.rope.freq_base", 1e6)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 2), np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(2, np.float32))
    for name in NAMES.values():
        if not name.endswith(("q_norm", "k_norm")):
            shape = (2,) if name.endswith("norm") else (2, 2)
            writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    for name in "qkv":
        writer.add_tensor(f"blk.0.attn_{name}.bias", np.zeros(2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "vocab.gguf"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "3", "4", " ", "5"]),
        ("qwen2", ["1", "2", "3", "4", " ", "5"]),
        ("llama-bpe", ["123", "4", " ", "5"]),
        ("gpt-2", ["1234", " 5"]),
    ],
)
def test_digits_are_grouped_as_each_family_was_trained(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    """With merges for every digit group, what comes out shows where the text was cut."""
    tokens = [*byte_alphabet(), "12", "123", "1234", "Ġ5", "<e>"]
    merges = ["1 2", "12 3", "123 4", "Ġ 5"]
    path = tokenizer_file(tmp_path, tokens, [*[1] * (len(tokens) - 1), 3], merges, pre, len(tokens) - 1)
    vocabulary = open_checkpoint(path).vocabulary()
    assert [vocabulary.token_bytes(i).decode() for i in vocabulary.encode("1234 5")] == pieces


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pre": "deepseek-llm"}, "deepseek-llm"),
        ({"pre": "default"}, "default"),
        ({"types": [1, 1]}, "kinds"),
        ({"types": [*TYPES[:-1], 6]}, "kinds"),
        ({"tokens": [*TOKENS[:-2], "a", "[PAD]"]}, "twice"),
        ({"merges": ["a b c"]}, "does not join"),
        ({"merges": ["a zz"]}, "does not fit together"),
        ({"tokens": ["▁a", *TOKENS[1:]]}, "alphabet"),
        ({"eos": 10**6}, "end a turn|end ids"),
    ],
)
def test_vocabularies_that_cannot_be_right_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    given_values = {"tokens": TOKENS, "types": TYPES, "merges": ["a b"], "pre": "gpt-2", "eos": 256}
    with pytest.raises(ModelError, match=says):
        open_checkpoint(tokenizer_file(tmp_path, **{**given_values, **change})).vocabulary()


# Options of the architecture


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"type": "none", "factor": 2.0}, None),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 128}, "yarn"),
    ],
)
def test_rotary_scaling_is_read(tmp_path: Path, extra: dict[str, Any], expected: object) -> None:
    path = write(tmp_path / "m.gguf", "qwen3", tiny_state("qwen3"), extra=add_scaling(extra))
    scaling = open_checkpoint(path).config.rope_scaling
    if expected != "yarn":
        assert scaling == expected
        return
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_positions) == ("yarn", 4.0, 128)
    assert scaling.attention_factor == pytest.approx(0.1 * np.log(4) + 1, rel=1e-12)


def add_scaling(values: dict[str, Any]) -> Callable[[gguf.GGUFWriter], object]:
    def add(writer: gguf.GGUFWriter) -> None:
        for key, value in values.items():
            method = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            method(f"qwen3.rope.scaling.{key}", value)

    return add


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (add_scaling({"type": "longrope", "factor": 2.0}), "longrope"),
        (add_scaling({"type": "linear"}), "factor"),
        (add_scaling({"type": "linear", "factor": -1.0}), "scales"),
        (add_scaling({"type": "yarn", "factor": 4.0, "yarn_attn_factor": 2.0}), "yarn_attn_factor"),
        (add_scaling({"type": "yarn", "factor": 4.0}), "original_context_length"),
        (lambda w: w.add_float32("qwen3.rope.scale_linear", 2.0), "scales"),
        (lambda w: w.add_uint32("qwen3.attention.sliding_window", 4096), "sliding_window"),
        (lambda w: w.add_uint32("qwen3.expert_count", 8), "expert_count"),
        (lambda w: w.add_uint32("qwen3.rope.dimension_count", 32), "dimension_count"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(32, np.float32)), "rope_freqs"),
        (lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.ones(32, np.float32)), "ffn_gate_exps"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(256, np.float32)), "no place"),
    ],
)
def test_options_that_cannot_be_run_are_refused(tmp_path: Path, extra: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        open_checkpoint(write(tmp_path / "m.gguf", "qwen3", tiny_state("qwen3"), extra=extra))


@pytest.mark.parametrize(
    "key",
    [
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "rope.freq_base"),
        *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    ],
)
def test_a_missing_key_is_an_error_that_names_it(tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelError, match=key):
        open_checkpoint(write(tmp_path / "m.gguf", "qwen3", tiny_state("qwen3"), drop=(key,)))


def test_other_architectures_and_types_are_named(tmp_path: Path) -> None:
    state = tiny_state("qwen3")
    with pytest.raises(ModelError, match="gemma3"):
        open_checkpoint(write(tmp_path / "a.gguf", "gemma3", state))
    with pytest.raises(ModelError, match=r"Q5_0.*Q4_K_M"):
        open_checkpoint(write(tmp_path / "b.gguf", "qwen3", state, Kind.Q5_0))
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight' is missing"):
        open_checkpoint(write(tmp_path / "c.gguf", "qwen3", state))


# Files that lie


def entry_of(data: bytes, name: bytes) -> int:
    """Offset of the number of dimensions in a tensor's entry."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


def patch(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


def patch_tensor(field: int, value: int) -> Callable[[bytes], bytes]:
    """Fields of the entry of a matrix: 0 dimensions, 4 and 12 shape, 20 type, 24 offset."""
    kind = "<I" if field in (0, 20) else "<Q"
    return lambda data: patch(entry_of(data, b"blk.1.attn_v.weight") + field, struct.pack(kind, value))(data)


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (lambda data: b"", "cannot be read"),
        (patch(0, b"GGML"), "does not begin"),
        (patch(4, struct.pack("<I", 1)), "version 1"),
        (patch(4, struct.pack(">I", 3)), "version"),
        (patch(8, struct.pack("<Q", 1 << 60)), "count"),
        (patch(8, struct.pack("<Q", 60000)), "damaged"),
        (patch(16, struct.pack("<Q", 1 << 60)), "count"),
        (patch(16, struct.pack("<Q", 60000)), "damaged"),
        (patch(24, struct.pack("<Q", 1 << 60)), "ends inside"),
        (patch_tensor(0, 1 << 31), "dimensions"),
        (patch_tensor(0, 0), "dimensions"),
        (patch_tensor(4, 1 << 62), "outside the file"),
        (patch_tensor(4, 0), "impossible shape"),
        (patch_tensor(12, 64), "has the shape"),
        (patch_tensor(20, 9999), "unknown type"),
        (patch_tensor(20, int(Kind.F64)), "overlap"),
        (patch_tensor(20, int(Kind.I32)), "I32"),
        (patch_tensor(24, 1 << 62), "outside the file"),
        (patch_tensor(24, 1), "off the alignment"),
        (patch_tensor(24, 0), "overlap"),
        (lambda data: data[:-1], "outside the file"),
        (lambda data: data[: len(data) // 2], "outside the file"),
        (lambda data: data.replace(b"blk.1.attn_v.weight", b"blk.0.attn_v.weight"), "twice"),
        (lambda data: data.replace(b"blk.1.attn_v.weight", b"blk.1.attn_\xff.weight"), "UTF-8"),
        (lambda data: data.replace(b"general.architecture", b"qwen3.context_length"), "twice"),
    ],
)
def test_a_lying_file_is_refused(original: bytes, tmp_path: Path, lie: Callable[[bytes], bytes], says: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(lie(original))
    with pytest.raises(ModelError, match=says):
        open_checkpoint(path)


def test_a_file_cut_off_anywhere_is_refused(original: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for size in [*range(200), *range(200, len(original), len(original) // 50)]:
        path.write_bytes(original[:size])
        with pytest.raises(ModelError):
            open_checkpoint(path)


def array_of(kind: int, inner: int, count: int) -> bytes:
    """A file with one key, whose value claims to be an array of `count` elements."""
    key = struct.pack("<Q", 1) + b"k"
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", kind, inner, count) + bytes(64)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (array_of(9, 8, 1 << 40), "count"),
        (array_of(9, 8, 1 << 20), "ends inside"),
        (array_of(9, 12, 1 << 22), "ends inside"),
        (array_of(9, 9, 4), "unsupported kind"),
        (array_of(9, 77, 4), "unsupported kind"),
        (array_of(77, 0, 0), "unknown kind"),
    ],
)
def test_arrays_that_claim_too_much_are_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=says):
        open_checkpoint(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_escape_as_another_error(
    data: st.DataObject, original: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any change to the header either still makes a checkpoint or is a ModelError."""
    changed = bytearray(original[:HEADER_BYTES])
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, HEADER_BYTES - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(bytes(changed))
    os.truncate(path, len(original))  # the weights do not matter: a hole is enough
    with contextlib.suppress(ModelError):
        open_checkpoint(path).vocabulary()
