"""A conversation in a file: its ids, and the KV of those that were cached.

::

    8s I Q 32s   magic, version of the format, bytes of the header, SHA-256 of the header
    header       JSON, blanks at its end: the model, what the sections hold and their SHA-256, and the caller's note
    ids          int32, little-endian
    KV           blocks of pages, all layers of a page together

The ids are the conversation. KV only saves their prefill, so it is used where it fits and left out where it does not.
Everything is checked before the engine hears of it; nothing is ever unpickled. A checksum tells damage, not malice:
nobody can see from KV whether it is what the model computes for these ids, and the engine would use it for every
conversation that begins like this one. Restore files of others with ``kv=False``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from agentkit.runtime.errors import EngineError, StoreError

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine
    from agentkit.runtime.kv import PagedKV

T = TypeVar("T")
Json = dict[str, object]

MAGIC, VERSION = b"agentkit", 1
_PREFIX = struct.Struct("<IQ32s")  # behind the magic
_PIECE = 1 << 25  # bytes of KV that the engine moves between two of its steps


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file has been given.

    Attributes:
        tokens: of the conversation.
        kv_tokens: so many of them, from the first one on, with their KV.
        bytes: of the file.
    """

    tokens: int
    kv_tokens: int
    bytes: int


def save(engine: Engine, path: Path, ids: Sequence[int], note: Json, *, kv: bool = True, namespace: str = "") -> Saved:
    """Write ids, and the KV of those that are cached, to a file that appears when it is complete.

    KV is left out where the model has none, where nothing is cached, and where the engine has closed: `Saved` says so.
    Blocks; the engine goes on with other requests meanwhile.

    Args:
        ids: of the conversation.
        note: kept with them; what JSON can say.
        kv: whether to write KV.
        namespace: as of a `Request`.

    Raises:
        StoreError: the file cannot be written.
    """
    ids = list(ids)
    try:
        with _appearing(path) as file, engine.pin(ids, namespace=namespace):
            return _write(engine, file, ids, note, kv, namespace)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error}): choose another place, or make room there") from error


@contextlib.contextmanager
def _appearing(path: Path) -> Generator[IO[bytes]]:
    """A file that takes its place when the block ends well, and of which nothing is left otherwise."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _write(engine: Engine, file: IO[bytes], ids: list[int], note: Json, kv: bool, namespace: str) -> Saved:
    numbers = np.array(ids, dtype="<i4").tobytes()
    memory = engine.runner.memory if kv else None
    header: Json = {
        "model": {"name": engine.name, "digest": engine.runner.digest, "tokenizer": engine.vocab.digest},
        "ids": {"count": len(ids), "sha256": hashlib.sha256(numbers).hexdigest()},
        "kv": None if memory is None else _section(memory, len(ids), 1 << 62, "0" * 64),
        "note": note,
    }
    room = len(_json(header))  # what is not known yet takes less than this
    file.write(bytes(len(MAGIC) + _PREFIX.size + room) + numbers)
    tokens = 0
    if memory is not None:
        digest = hashlib.sha256()
        size = 0
        for blocks, held in _exported(engine, memory, ids, namespace):
            data = _bytes(blocks)
            digest.update(data)
            size += file.write(data)
            tokens = held
        header["kv"] = _section(memory, tokens, size, digest.hexdigest()) if tokens else None
    text = _json(header).ljust(room)
    file.seek(0)
    file.write(MAGIC + _PREFIX.pack(VERSION, room, hashlib.sha256(text).digest()) + text)
    return Saved(len(ids), tokens, file.seek(0, os.SEEK_END))


def _exported(engine: Engine, memory: PagedKV, ids: list[int], namespace: str) -> Iterator[tuple[Tensor, int]]:
    """Blocks of what is cached, piece by piece, and the tokens they hold together with those before them."""
    first = 0
    with contextlib.suppress(EngineError):  # it has closed: then there is no KV, or no more
        export = engine.exporter(ids, namespace=namespace)
        size = memory.format.page_size
        while len(blocks := export.read(first, _pages(memory))):
            first += len(blocks)
            yield blocks, min(first * size, export.tokens)


def _section(memory: PagedKV, tokens: int, size: int, digest: str) -> Json:
    return {"tokens": tokens, "bytes": size, "sha256": digest, "format": asdict(memory.format)}


def _json(header: Json) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _bytes(blocks: Tensor) -> memoryview:
    return blocks.view(torch.uint8).flatten().numpy().data


def _pages(memory: PagedKV) -> int:
    """How many pages make a piece."""
    return max(1, _PIECE // memory.block_bytes)


@dataclass(frozen=True, slots=True)
class KVSection:
    """The KV of a file: of the first ``tokens`` ids, in the last ``bytes`` bytes."""

    tokens: int
    bytes: int
    sha256: str
    format: Json


class Stored:
    """A file that has been read and found sound, up to its KV, which `restore` looks at.

    A context manager: it holds the file open.

    Attributes:
        ids: of the conversation.
        note: what the caller gave to `save`.

    Raises:
        StoreError: there is no such file, it is no saved conversation, of a later format, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error}): name a file that a session was saved to") from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def require(self, engine: Engine) -> None:
        """Raise StoreError unless the ids are of the engine's model and tokenizer."""
        if self._model != engine.runner.digest:
            raise StoreError(
                f"{self.path} was saved with other weights ({self._name}) than those of {engine.name}: token ids of "
                "one model mean nothing to another. Load the model it was saved with."
            )
        if self._tokenizer != engine.vocab.digest:
            raise StoreError(
                f"{self.path} was saved with the tokenizer of {self._name}, which is another than that of "
                f"{engine.name}: its ids would be other words. Load the model with the files it was saved with."
            )
        bad = next((t for t in self.ids if not 0 <= t < engine.runner.vocab_size), None)
        if bad is not None:
            raise self._damaged(f"it holds the id {bad}, which is no token of {engine.name}")

    def restore(self, engine: Engine, *, kv: bool = True, namespace: str = "") -> tuple[int, str]:
        """Give the engine the KV of the file, as far as it fits. Blocks; the engine goes on meanwhile.

        KV of another dtype, page size or layout, or made with weights in another form, is not used. Where the page
        pool is too small, the beginning is.

        Args:
            engine: that `require` has found to be right.
            kv: whether to use the KV at all.
            namespace: as of a `Request`.

        Returns:
            How many of the ids are cached now, and why it is not all that were when they were saved; empty if it is.

        Raises:
            StoreError: the KV is damaged. Then none of it is used.
            EngineError: the engine has closed.
        """
        missing = self._import(engine, namespace) if kv else "kv=False"
        return engine.cached(self.ids, namespace=namespace), missing

    def _import(self, engine: Engine, namespace: str) -> str:
        """Bring what fits and is not there yet; returns why the rest is missing."""
        memory, section = engine.runner.memory, self._kv
        if section is None:
            return "the file holds no KV"
        if memory is None:
            return "the model of this engine has no KV"
        if differences := memory.format.differences(section.format):
            return f"its KV does not fit this engine: {', '.join(differences)}"
        if engine.cached(self.ids, namespace=namespace) >= section.tokens:
            return ""
        self._verify(section, memory)
        to = engine.importer(self.ids, namespace=namespace)
        size = memory.format.page_size
        at = to.tokens // size
        self._file.seek(-section.bytes + at * memory.block_bytes, os.SEEK_END)
        for blocks in self._blocks(section.bytes - at * memory.block_bytes, memory):
            at += len(blocks)
            if not to.write(blocks, min(at * size, section.tokens)):
                return f"the page pool had no room for more than {to.tokens} of {section.tokens} tokens"
        return ""

    def _read(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if self._file.read(len(MAGIC)) != MAGIC:
            raise StoreError(f"{self.path} is no saved session: name a file that a session was saved to")
        version, length, digest = cast("tuple[int, int, bytes]", _PREFIX.unpack(self._take(_PREFIX.size)))
        if version != VERSION:
            raise StoreError(
                f"{self.path} has the format {version}, this agentkit reads {VERSION}: use the agentkit that wrote it"
            )
        before = len(MAGIC) + _PREFIX.size
        if length > size - before:
            raise self._damaged(f"its header should have {length:,} bytes")
        text = self._take(length)
        if hashlib.sha256(text).digest() != digest:
            raise self._damaged("the checksum of its header differs")
        try:
            header = _object(cast("object", json.loads(text)))
            model, ids = _object(header["model"]), _object(header["ids"])
            self._name, self._model, self._tokenizer = (_of(str, model[key]) for key in ("name", "digest", "tokenizer"))
            count, checksum = _of(int, ids["count"]), _of(str, ids["sha256"])
            self._kv = _kv_section(header["kv"], count)
            self.note = _object(header["note"])
        except (ValueError, KeyError, RecursionError) as error:
            raise self._damaged(f"its header does not say what it should: {error!r}") from error
        behind = 0 if self._kv is None else self._kv.bytes
        if count < 0 or before + length + 4 * count + behind != size:
            raise self._damaged(f"it has {size:,} bytes, which is not what its header says")
        data = self._take(4 * count)
        if hashlib.sha256(data).hexdigest() != checksum:
            raise self._damaged("the checksum of its ids differs")
        self.ids = cast("list[int]", np.frombuffer(data, dtype="<i4").tolist())

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise self._damaged("it ends too early")
        return data

    def _verify(self, section: KVSection, memory: PagedKV) -> None:
        """Read the KV once, before any page is touched."""
        pages = -(-section.tokens // memory.format.page_size)
        if section.bytes != pages * memory.block_bytes:
            raise self._damaged(f"{section.tokens} tokens of KV cannot have {section.bytes:,} bytes")
        digest = hashlib.sha256()
        self._file.seek(-section.bytes, os.SEEK_END)
        for blocks in self._blocks(section.bytes, memory):
            digest.update(_bytes(blocks))
            if not blocks.float().isfinite().all():  # torch cannot ask fp8
                raise self._damaged("its KV are not all numbers")
        if digest.hexdigest() != section.sha256:
            raise self._damaged("the checksum of its KV differs")

    def _blocks(self, count: int, memory: PagedKV) -> Iterator[Tensor]:
        """The next so many bytes of the file as blocks, piece by piece."""
        piece = _pages(memory) * memory.block_bytes
        for start in range(0, count, piece):
            data = bytearray(self._take(min(piece, count - start)))
            yield torch.frombuffer(data, dtype=memory.dtype).view(-1, *memory.block_shape)

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"{self.path} is damaged: {what}. Use another copy of it, or begin a new session.")


def _kv_section(value: object, count: int) -> KVSection | None:
    if value is None:
        return None
    entry = _object(value)
    tokens, size = _of(int, entry["tokens"]), _of(int, entry["bytes"])
    if not (0 < tokens <= count and size > 0):
        raise ValueError(f"{tokens} of {count} tokens with {size} bytes of KV")
    return KVSection(tokens, size, _of(str, entry["sha256"]), _object(entry["format"]))


def _object(value: object) -> Json:
    return cast("Json", _of(dict, value))


def _of(kind: type[T], value: object) -> T:
    """A value of a header, which must be of a kind."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{value!r:.80} where a {kind.__name__} belongs")
    return value
