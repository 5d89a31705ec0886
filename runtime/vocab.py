"""The tokens of one checkpoint: text to ids, ids to bytes, and which ids are control tokens.

Text that arrives is data: a control token written out in it (``<|im_end|>``, ``<tool_call>``) stays ordinary
text. Telling the tokenizer not to encode *special* tokens does not achieve that, because Qwen3 declares
several of its control tokens as not special; so text is encoded by a second tokenizer that lacks them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict, cast

from tokenizers import AddedToken, Tokenizer

from agentkit.runtime.config import end_ids
from agentkit.runtime.errors import ModelError

JsonObject = dict[str, object]
_REPLACEMENT = "\ufffd"


class _AddedToken(TypedDict):
    """What this module reads of an entry of ``added_tokens`` in tokenizer JSON."""

    id: int
    content: str


class Vocabulary:
    """The tokens of one checkpoint. Immutable; `encode` and `decode` may be called from any thread.

    Only byte-level BPE is supported: there every token is a known string of bytes, and any text can be
    encoded piece by piece.

    Args:
        tokenizer: knows every token, including the added ones. It is copied, not kept.
        eos: text of the token that ends a turn (what the chat template writes).
        bos: text of the token that begins a text, ``""`` for none. Never added by `encode`.
        chat_template: Jinja source, or None.
        end_ids: further ids that end a turn or a text.

    Attributes:
        size: number of ids the tokenizer defines (highest id + 1); the model's embedding may have more rows.
        control: text of every added token, declared special or not, to its id.
        end_ids: every id that ends a turn or a text.
        end_id: the id the chat template writes at the end of a turn.
        digest: SHA-256 (hex) of `json`.
        json: the whole tokenizer in the form of the ``tokenizers`` package, added tokens included.

    Raises:
        ModelError: not a byte-level BPE tokenizer, or `eos` is not one of its tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos: str,
        bos: str = "",
        chat_template: str | None = None,
        end_ids: Iterable[int] = (),
    ) -> None:
        data = cast("JsonObject", json.loads(tokenizer.to_str()))
        data["truncation"] = data["padding"] = None  # settings that would silently change what is encoded
        self.json: str = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        self.digest: str = hashlib.sha256(self.json.encode()).hexdigest()
        _require_byte_level(data)
        added = cast("list[_AddedToken]", data["added_tokens"])
        self.control: Mapping[str, int] = MappingProxyType({token["content"]: token["id"] for token in added})
        ids = cast("dict[str, int]", cast("JsonObject", data["model"])["vocab"]) | self.control
        if eos not in ids:
            raise ModelError(f"The tokenizer has no token {eos!r} to end a turn. Download its files again.")
        self.size: int = max(ids.values()) + 1
        self.end_id: int = ids[eos]
        self.end_ids: frozenset[int] = frozenset(end_ids) | {self.end_id}
        self.bos_text: str = bos
        self.eos_text: str = eos
        self.chat_template: str | None = chat_template
        self._bytes = _bytes_of_tokens(ids, self.control, self.size)
        self._plain = _without_control(data, self.control.keys())
        # Some vocabularies lack bytes that text can hold (SmolLM2: 0x04, 0xf1 and others).
        self._lacking = bytes(set(range(256)) - {token[0] for token in self._bytes if len(token) == 1})

    @classmethod
    def from_folder(cls, folder: Path) -> Vocabulary:
        """Read ``tokenizer.json`` and ``tokenizer_config.json``; also, where present, ``chat_template.jinja``
        and the end ids of ``generation_config.json`` and ``config.json``.

        Raises:
            ModelError: a file is missing or damaged, or the tokenizer is not byte-level BPE.
        """
        config = read_json(folder / "tokenizer_config.json")
        tokenizer = _read_tokenizer(folder / "tokenizer.json", config)
        others = [folder / name for name in ("generation_config.json", "config.json")]
        return cls(
            tokenizer,
            eos=_token_text(config, "eos_token"),
            bos=_token_text(config, "bos_token"),
            chat_template=_read_template(folder, config),
            end_ids=[i for path in others if path.is_file() for i in end_ids(read_json(path))],
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never one of a control token, and with nothing added before or after.

        Characters the vocabulary cannot express, and lone surrogates, become U+FFFD.
        """
        return self._plain.encode(self._expressible(text), add_special_tokens=False).ids

    def starts(self, text: str) -> list[int]:
        """Where each id of ``encode(text)`` begins, in characters of `text`; it never falls."""
        encoding = self._plain.encode(self._expressible(text), add_special_tokens=False)
        return [start for start, _ in encoding.offsets]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; a control token's text in UTF-8; ``b""`` for an id that pads the model.

        Raises:
            ValueError: `token` is negative.
        """
        if token < 0:
            raise ValueError(f"token ids are not negative: {token}")
        return self._bytes[token] if token < self.size else b""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def _expressible(self, text: str) -> str:
        if self._writes(text):
            return text
        return "".join(c if self._writes(c) else _REPLACEMENT for c in text)

    def _writes(self, text: str) -> bool:
        try:
            data = text.encode()
        except UnicodeEncodeError:  # a lone surrogate, for instance from a file name that is not UTF-8
            return False
        return len(data.translate(None, self._lacking)) == len(data)


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file.

    Raises:
        ModelError: the file is missing, is not JSON, or does not hold an object.
    """
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing. Download the model again with all of its JSON files.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Download the model again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not hold a JSON object. Download the model again.")
    return cast("JsonObject", data)


def byte_alphabet() -> dict[str, int]:
    """Character to byte, for the 256 characters by which byte-level BPE writes bytes (as in GPT-2).

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _require_byte_level(data: JsonObject) -> None:
    model = cast("JsonObject", data["model"])
    decoder = cast("JsonObject", data.get("decoder") or {})
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel" or model.get("byte_fallback"):
        raise ModelError(
            f"This tokenizer is {model.get('type')} with the decoder {decoder.get('type')}; agentkit "
            "supports byte-level BPE only (Qwen, SmolLM2, Llama 3). Choose such a model."
        )
    # Each of these makes the ids of a text depend on more than its own bytes, or on chance.
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ModelError(
                f"The tokenizer sets {key!r} to {model[key]!r}, which agentkit does not support. Choose a "
                "Qwen, SmolLM2 or Llama 3 model."
            )
    if '"add_prefix_space":true' in json.dumps(data.get("pre_tokenizer"), separators=(",", ":")):
        raise ModelError(
            "The tokenizer puts a space before every text (add_prefix_space), so texts cannot be encoded "
            "piece by piece. Choose a Qwen, SmolLM2 or Llama 3 model."
        )


def _bytes_of_tokens(ids: Mapping[str, int], control: Mapping[str, int], size: int) -> list[bytes]:
    alphabet = byte_alphabet()
    table = [b""] * size
    for text, token in ids.items():
        if text in control:
            table[token] = text.encode()
            continue
        try:
            table[token] = bytes([alphabet[character] for character in text])
        except KeyError:
            raise ModelError(
                f"Token {token} ({text!r}) of the tokenizer is not written in the byte-level alphabet. "
                "agentkit supports byte-level BPE only (Qwen, SmolLM2, Llama 3). Choose such a model."
            ) from None
    return table


def _without_control(data: JsonObject, control: Set[str]) -> Tokenizer:
    """The tokenizer that encodes text: no added tokens, and no way for merges to produce one."""
    model = cast("JsonObject", data["model"])
    vocab = cast("dict[str, int]", model["vocab"])
    merges = cast("list[tuple[str, str]]", model["merges"])
    plain: JsonObject = {**model, "unk_token": None}
    if not control.isdisjoint(vocab):  # SmolLM2 lists its control tokens in the model's vocabulary too
        plain["vocab"] = {text: token for text, token in vocab.items() if text not in control}
        plain["merges"] = [(a, b) for a, b in merges if control.isdisjoint((a, b, a + b))]
    bare: JsonObject = {**data, "added_tokens": [], "post_processor": None, "model": plain}
    return Tokenizer.from_str(json.dumps(bare))


def _read_tokenizer(path: Path, config: JsonObject) -> Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path} is missing. Download the model again with tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ModelError(f"{path} cannot be read ({error}). Download the model again.") from error
    # transformers adds the tokens that only tokenizer_config.json lists, so a checkpoint may rely on them.
    listed = cast("Mapping[str, JsonObject]", config.get("added_tokens_decoder") or {})
    for key, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        text = str(entry.get("content"))
        if tokenizer.token_to_id(text) is None:
            token = AddedToken(text, normalized=False, special=bool(entry.get("special")))
            tokenizer.add_tokens([token])  # pyright: ignore[reportUnknownMemberType]
        if tokenizer.token_to_id(text) != int(key):
            raise ModelError(
                f"{path} and tokenizer_config.json disagree about the id of {text!r}. Download both again."
            )
    return tokenizer


def _token_text(config: JsonObject, key: str) -> str:
    """A special token of tokenizer_config.json: a string, an object with ``content``, or null."""
    value = config.get(key)
    if isinstance(value, dict):
        value = cast("JsonObject", value).get("content")
    if value is None and key == "bos_token":
        return ""
    if not isinstance(value, str):
        raise ModelError(
            f"tokenizer_config.json: {key!r} must name a token, but is {value!r}. Download the file again."
        )
    return value


def _read_template(folder: Path, config: JsonObject) -> str | None:
    """The chat template: a file (transformers 5), or a text or named texts in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {str(entry["name"]): entry["template"] for entry in cast("list[JsonObject]", value)}
        value = named.get("default")
    return value if isinstance(value, str) else None
