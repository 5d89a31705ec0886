"""Safetensors folders: everything a header can lie about is found before memory is mapped by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agentkit.runtime.errors import ModelError
from agentkit.runtime.weights import Checkpoint, open_checkpoint, required_tensors

Header = dict[str, Any]
SIZES: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    "bos_token_id": None,
    "eos_token_id": 3,
}
MODELS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def write(folder: Path, family: str = "qwen3", shard: str = "5GB", **change: Any) -> dict[str, torch.Tensor]:
    """Write a tiny random checkpoint with transformers; return its tensors."""
    config, model = MODELS[family]
    torch.manual_seed(0)
    made = model(config(**{**SIZES, **change})).to(torch.bfloat16)
    made.save_pretrained(folder, max_shard_size=shard)
    return made.state_dict()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def split(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: object, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("family", list(MODELS))
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_read_as_transformers_wrote_it(tmp_path: Path, family: str, tied: bool) -> None:
    state = write(tmp_path, family, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tied is tied
    assert set(checkpoint.names()) == set(required_tensors(checkpoint.config))
    assert set(checkpoint.names()) == set(state) - ({"lm_head.weight"} if tied else set())
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        assert isinstance(tensor, torch.Tensor)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state[name]), name


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    state = write(tmp_path, shard="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(as_tensor(checkpoint, name), state[name]) for name in checkpoint.names())


def as_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor = checkpoint.tensor(name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def test_tensors_are_mapped_and_writes_do_not_reach_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    checkpoint = open_checkpoint(folder)
    one, two = as_tensor(checkpoint, "model.norm.weight"), as_tensor(checkpoint, "model.norm.weight")
    assert one.data_ptr() == two.data_ptr()
    one.fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before


def test_digest_tells_weights_and_configurations_apart(folder: Path) -> None:
    first = open_checkpoint(folder).digest
    assert open_checkpoint(folder).digest == first
    header, body = split(folder / "model.safetensors")
    join(folder / "model.safetensors", header, body[:-64] + bytes(64))
    changed = open_checkpoint(folder).digest
    assert changed != first
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert open_checkpoint(folder).digest not in (first, changed)


def edit_config(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


NAME = "model.norm.weight"


def entry(**change: Any) -> Callable[[Header], None]:
    return lambda header: header[NAME].update(change)


def shift(start: int, end: int) -> Callable[[Header], None]:
    def move(header: Header) -> None:
        a, b = header[NAME]["data_offsets"]
        header[NAME]["data_offsets"] = [a + start, b + end]

    return move


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (entry(dtype="F4_MADE_UP"), "unknown type"),
        (entry(dtype=None), "unknown type"),
        (entry(dtype="F32"), "does not fit"),
        (entry(shape=[31]), "does not fit"),
        (entry(shape=[1 << 62, 1 << 62]), "does not fit"),
        (entry(shape=[-32]), "valid shape"),
        (entry(shape="32"), "valid shape"),
        (entry(shape=[1 << 80]), "valid shape"),
        (entry(shape=[1] * 100), "valid shape"),
        (entry(data_offsets=[0]), "valid shape"),
        (entry(data_offsets=[64, 0]), "does not fit"),
        (entry(data_offsets=[0, 64]), "overlap"),
        (shift(-2, -2), "overlap"),
        (shift(1 << 40, 1 << 40), "ends before"),
        (lambda header: header.update({NAME: 5}), "unknown type"),
        (lambda header: header.pop(NAME), "describes"),
        (lambda header: header.update({"model.other": header.pop(NAME)}), "is missing"),
    ],
)
def test_a_lying_header_is_refused(folder: Path, lie: Callable[[Header], object], says: str) -> None:
    path = folder / "model.safetensors"
    header, body = split(path)
    lie(header)
    join(path, header, body)
    with pytest.raises(ModelError, match=says):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: data[:5], "too short"),
        (lambda data: data[:100], "header has"),
        (lambda data: data[:-1], "ends before"),
        (lambda data: data + b"\0", "describes"),
        (lambda data: (1 << 63).to_bytes(8, "little") + data[8:], "header has"),
        (lambda data: (200_000_000).to_bytes(8, "little") + bytes(10), "header has"),
        (lambda data: data[:8] + b"[" + data[9:], "not valid JSON"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        (lambda data: (4).to_bytes(8, "little") + b"\xff\xfe{}", "not valid JSON"),
        (lambda data: (50000).to_bytes(8, "little") + b"[" * 50000, "not valid JSON"),
        (lambda data: (18).to_bytes(8, "little") + b'{"a": {}, "a": {}}', "twice"),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=says):
        open_checkpoint(folder)


def test_a_weight_type_that_cannot_be_run_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, body = split(path)
    header[NAME]["dtype"] = "I16"
    join(path, header, body)
    with pytest.raises(ModelError, match="I16"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"intermediate_size": 64}, "has the shape"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* is missing"),
        ({"num_hidden_layers": 1}, "no place"),
        ({"architectures": ["LlamaForCausalLM"]}, "no place"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "is missing"),
        ({"vocab_size": 80}, "has the shape"),
    ],
)
def test_weights_and_configuration_must_belong_together(folder: Path, change: dict[str, Any], says: str) -> None:
    edit_config(folder, **change)
    with pytest.raises(ModelError, match=says):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "place", ["../model-00001.safetensors", "/etc/passwd", "..", "sub/x.safetensors", "config.json", 5, ""]
)
def test_the_index_cannot_reach_outside_its_folder(tmp_path: Path, place: object) -> None:
    write(tmp_path, shard="12KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NAME] = place
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names no safetensors file"):
        open_checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    write(tmp_path, shard="12KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = next(shard for shard in index["weight_map"].values() if shard != index["weight_map"][NAME])
    moved = {"weight_map": {**index["weight_map"], NAME: other}}
    path.write_text(json.dumps(moved))
    with pytest.raises(ModelError, match="disagree"):
        open_checkpoint(tmp_path)
    path.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(ModelError, match="weight_map"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write(tmp_path, shard="12KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    second = {"model.again": {"dtype": "BF16", "shape": [0], "data_offsets": [64, 64]}}
    second |= {NAME: {"dtype": "BF16", "shape": [32], "data_offsets": [0, 64]}}
    join(tmp_path / "again.safetensors", second, bytes(64))
    index["weight_map"]["model.again"] = "again.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"disagree about the tensor '{NAME}'"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, shard="12KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        open_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        open_checkpoint(tmp_path / "model.bin")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="JSON object"):
        open_checkpoint(tmp_path)


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        open_checkpoint(folder)
