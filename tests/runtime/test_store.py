"""A conversation in a file: it goes on without a prefill where its KV fits, and with one where it does not; a file that
cannot be trusted touches nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import StoreError
from agentkit.runtime.request import Request
from agentkit.runtime.store import Saved, Stored, save
from tests import tiny

pytestmark = pytest.mark.anyio

PROMPT = [1 + (7 * i) % 90 for i in range(101)]
NEW = [5, 6, 7]
#: Bytes of the KV of a token of the tiny Qwen3: 3 layers, keys and values, 2 heads of 32 values in fp32.
TOKEN = 3 * 2 * 2 * 32 * 4


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny.write(path, "qwen3")
    return path


async def run(engine: Engine, ids: list[int], tokens: int = 24) -> Any:
    async with engine.generate(Request(ids, max_tokens=tokens, ignore_end=True)) as generation:
        async for _ in generation:
            pass
    return generation


@pytest.fixture(scope="module")
async def conversation(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], list[int]]:
    """A saved conversation, its ids, and how it goes on where it is not interrupted."""
    path = tmp_path_factory.mktemp("saved") / "a"
    with tiny.engine(folder) as engine:
        ids = [*PROMPT, *(await run(engine, PROMPT)).ids]
        assert save(engine, path, ids, {"note": "mine"}) == Saved(125, 124, path.stat().st_size)
        following = (await run(engine, [*ids, *NEW])).ids
    return path, ids, following


def restore(engine: Engine, path: Path, **options: Any) -> tuple[list[int], int, str]:
    with Stored(path) as stored:
        stored.require(engine)
        return stored.ids, *stored.restore(engine, **options)


Conversation = tuple[Path, list[int], list[int]]


async def test_a_fresh_engine_goes_on_without_computing_anything_again(
    folder: Path, conversation: Conversation
) -> None:
    path, ids, following = conversation
    with tiny.engine(folder) as engine:
        assert restore(engine, path) == (ids, 124, "")
        engine.check()
        again = await run(engine, [*ids, *NEW])
        usage = again.finish.usage
        assert (usage.cached, usage.prefilled) == (124, 1 + len(NEW))  # the last id of an answer is never computed
        assert again.ids == following
        assert restore(engine, path) == (ids, 125, "")  # it is there already
        engine.check()


async def test_kv_of_8_bits_goes_to_a_file_and_back(folder: Path, tmp_path: Path) -> None:
    with tiny.engine(folder, kv_dtype="fp8") as engine:
        ids = [*PROMPT, *(await run(engine, PROMPT)).ids]
        saved = save(engine, tmp_path / "a", ids, {})
        following = (await run(engine, [*ids, *NEW])).ids
    with tiny.engine(folder, kv_dtype="fp8") as engine:
        assert restore(engine, tmp_path / "a") == (ids, saved.kv_tokens, "")
        again = await run(engine, [*ids, *NEW])
        assert again.finish.usage.prefilled == len(ids) + len(NEW) - saved.kv_tokens
        assert again.ids == following
    with tiny.engine(folder) as engine:
        assert restore(engine, tmp_path / "a")[1:] == (
            0,
            "its KV does not fit this engine: dtype float8_e4m3fn instead of float32",
        )


async def test_ids_alone_suffice(folder: Path, conversation: Conversation, tmp_path: Path) -> None:
    _, ids, following = conversation
    path = tmp_path / "b"
    with tiny.engine(folder) as engine:
        assert save(engine, path, ids, {}, kv=False) == Saved(125, 0, path.stat().st_size)
        assert path.stat().st_size < 1500
        assert restore(engine, path) == (ids, 0, "the file holds no KV")
        assert (await run(engine, [*ids, *NEW])).ids == following


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"page_size": 8}, "page_size 4 instead of 8"),
        ({"dtype": "bfloat16"}, "dtype float32 instead of bfloat16"),
        ({"packed": True}, "exact True instead of False"),
        ({"attention": "sparse"}, "attention dense instead of Sparse"),
    ],
)
async def test_kv_that_does_not_fit_is_computed_again(
    folder: Path, conversation: Conversation, fields: dict[str, Any], says: str
) -> None:
    path, ids, following = conversation
    with tiny.engine(folder, **fields) as engine:
        found, cached, missing = restore(engine, path)
        assert (found, cached) == (ids, 0)
        assert says in missing
        again = await run(engine, [*ids, *NEW])
        assert again.finish.usage.prefilled == len(ids) + len(NEW)
        assert fields.get("page_size") is None or again.ids == following
        engine.check()


async def test_kv_is_not_used_where_it_is_not_wanted(folder: Path, conversation: Conversation) -> None:
    path, ids, _ = conversation
    with tiny.engine(folder) as engine:
        assert restore(engine, path, kv=False) == (ids, 0, "kv=False")


@pytest.mark.parametrize("pages", [33, 20, 32])
async def test_a_small_pool_takes_the_longest_prefix_that_fits(
    folder: Path, conversation: Conversation, pages: int
) -> None:
    path, _, _ = conversation
    with tiny.engine(folder, kv_bytes=pages * 4 * TOKEN) as engine:
        await run(engine, [9] * 60, 1)  # other's pages are evicted for it
        found, cached, missing = restore(engine, path)
        assert cached == min(124, 4 * pages)
        assert bool(missing) == (cached < 124)
        engine.check()
        usage = (await run(engine, found[:70], 4)).finish.usage  # and its own pages for another
        assert (usage.cached, usage.prefilled) == (69, 1)
        engine.check()


async def test_a_pool_whose_pages_are_in_use_takes_what_is_left(folder: Path, conversation: Conversation) -> None:
    path, _, _ = conversation
    with tiny.engine(folder, kv_bytes=40 * 4 * TOKEN) as engine:
        async with engine.generate(Request([9] * 80, max_tokens=60, ignore_end=True)) as other:
            async for _ in other:
                if len(other.ids) == 1:
                    _, cached, missing = restore(engine, path)
                    engine.check()
        assert 0 < cached < 124
        assert "no room" in missing
        alone = await run(engine, [9] * 80, 60)
    assert other.ids == alone.ids


async def test_what_is_cached_already_is_not_brought_again(folder: Path, conversation: Conversation) -> None:
    path, ids, following = conversation
    with tiny.engine(folder) as engine:
        await run(engine, ids[:50], 1)
        assert engine.stats().pages_cached == 13
        assert restore(engine, path)[1:] == (124, "")
        assert engine.stats().pages_cached == 31  # the partial page that was there has been completed
        assert (await run(engine, [*ids, *NEW])).ids == following
        engine.check()


async def test_many_pieces_are_as_good_as_one(
    folder: Path, conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ids, following = conversation
    monkeypatch.setattr("agentkit.runtime.store._PIECE", 3 * 4 * TOKEN)
    with tiny.engine(folder) as engine:
        assert restore(engine, path) == (ids, 124, "")
        save(engine, tmp_path / "c", ids, {"note": "mine"})
        assert (tmp_path / "c").read_bytes() == path.read_bytes()
        assert (await run(engine, [*ids, *NEW])).ids == following


async def test_nothing_of_others_is_in_the_file(folder: Path, tmp_path: Path) -> None:
    """The last page of a conversation may have held more: a rejected draft, or a longer one that begins alike."""
    with tiny.engine(folder) as engine:
        await run(engine, PROMPT[:50], 2)
        save(engine, tmp_path / "d", PROMPT[:46], {})
        blocks = engine.exporter(PROMPT[:46]).read(11, 1)
    assert blocks[0, :, :2].abs().min() > 0
    assert blocks[0, :, 2:].abs().max() == 0


async def test_another_model_or_tokenizer_is_refused(folder: Path, conversation: Conversation, tmp_path: Path) -> None:
    path, _, _ = conversation
    tiny.write(tmp_path, "qwen2")
    with tiny.engine(tmp_path) as engine:
        with pytest.raises(StoreError, match="Load the model it was saved with"):
            restore(engine, path)
        assert engine.stats().pages_cached == 0
    tiny.write(tmp_path, "qwen3")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|start|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with tiny.engine(tmp_path) as engine, pytest.raises(StoreError, match="tokenizer"):
        restore(engine, path)


def test_a_fine_tune_is_another_model(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny.write(tmp_path, "qwen3")
    with tiny.engine(folder) as one, tiny.engine(tmp_path) as two:
        assert one.runner.digest == two.runner.digest
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 1e-3 * torch.randn(96, 64)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with tiny.engine(folder) as one, tiny.engine(tmp_path) as two:
        assert one.runner.digest != two.runner.digest


def refused(engine: Engine, path: Path) -> None:
    with pytest.raises(StoreError, match="damaged|no saved session|format"):
        restore(engine, path)
    engine.check()
    assert engine.stats().pages_cached == 0


def test_a_damaged_file_touches_nothing(folder: Path, conversation: Conversation, tmp_path: Path) -> None:
    path, _, _ = conversation
    data = path.read_bytes()
    dice = random.Random(0)
    places = [*range(52), *(dice.randrange(len(data)) for _ in range(60)), *range(len(data) - 8, len(data))]
    bad = tmp_path / "bad"
    with tiny.engine(folder) as engine:
        for place in places:
            bad.write_bytes(data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :])
            refused(engine, bad)
        for length in [0, 1, 51, 52, 53, 500, *(dice.randrange(len(data)) for _ in range(20)), len(data) - 1]:
            bad.write_bytes(data[:length])
            refused(engine, bad)
        bad.write_bytes(data + b"\0")
        refused(engine, bad)
        assert restore(engine, path)[1] == 124


def forged(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with another header, whose checksum is right."""
    length = int.from_bytes(data[12:20], "little")
    header = json.loads(data[52 : 52 + length])
    change(header)
    text = json.dumps(header).encode()
    return data[:12] + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text + data[52 + length :]


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "too many ids": lambda h: h["ids"].update(count=126),
    "a negative count": lambda h: h["ids"].update(count=-1),
    "a huge count": lambda h: h["ids"].update(count=1 << 60),
    "a count that is a text": lambda h: h["ids"].update(count="125"),
    "more KV than ids": lambda h: h["kv"].update(tokens=126),
    "fewer tokens than bytes": lambda h: h["kv"].update(tokens=120),
    "more bytes than the file": lambda h: h["kv"].update(bytes=1 << 50),
    "a negative section": lambda h: h["kv"].update(bytes=-4),
    "no KV but its bytes": lambda h: h.update(kv=None),
    "no model": lambda h: h.pop("model"),
    "a note that is a list": lambda h: h.update(note=[]),
    "ids of another checksum": lambda h: h["ids"].update(sha256="0" * 64),
    "KV of another checksum": lambda h: h["kv"].update(sha256="0" * 64),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_touches_nothing(folder: Path, conversation: Conversation, tmp_path: Path, lie: str) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(forged(conversation[0].read_bytes(), LIES[lie]))
    with tiny.engine(folder) as engine:
        refused(engine, bad)


def test_ids_and_kv_that_are_none_touch_nothing(folder: Path, conversation: Conversation, tmp_path: Path) -> None:
    data = conversation[0].read_bytes()
    bad = tmp_path / "bad"

    def section(start: int, stop: int, value: bytes, name: str) -> None:
        new = data[:start] + value + data[start + len(value) :]
        checksum = hashlib.sha256(new[start:stop]).hexdigest()
        bad.write_bytes(forged(new, lambda header: header[name].update(sha256=checksum)))

    length = int.from_bytes(data[12:20], "little")
    with tiny.engine(folder) as engine:
        section(52 + length, 52 + length + 500, (288).to_bytes(4, "little"), "ids")
        refused(engine, bad)
        section(52 + length, 52 + length + 500, b"\xff" * 4, "ids")
        refused(engine, bad)
        section(52 + length + 500, len(data), b"\xff" * 4, "kv")  # NaN
        refused(engine, bad)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    with tiny.engine(folder) as engine:
        with pytest.raises(StoreError, match="choose another place"):
            save(engine, tmp_path / "nowhere" / "a", [1, 2], {})
        (tmp_path / "taken").mkdir()
        with pytest.raises(StoreError, match="choose another place"):
            save(engine, tmp_path / "taken", [1, 2], {})
        with pytest.raises(TypeError):
            save(engine, tmp_path / "b", [1, 2], {"note": object()})
        with pytest.raises(StoreError, match="name a file"):
            restore(engine, tmp_path / "missing")
    assert os.listdir(tmp_path) == ["taken"]


def test_of_a_closed_engine_the_ids_are_saved(folder: Path, conversation: Conversation, tmp_path: Path) -> None:
    with tiny.engine(folder) as engine:
        restore(engine, conversation[0])
    assert save(engine, tmp_path / "a", [1, 2], {}).kv_tokens == 0
    with tiny.engine(folder) as engine:
        assert restore(engine, tmp_path / "a") == ([1, 2], 0, "the file holds no KV")
