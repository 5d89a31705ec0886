from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from agentkit.runtime.errors import AgentError
from agentkit.runtime.text import Detokenizer, Piece, Screened, StopStrings
from agentkit.runtime.vocab import Vocabulary

CONTROL = ("<|end|>", "<tool_call>")


def byte_vocabulary() -> Vocabulary:
    """One token for each byte, and two control tokens: any bytes at all can be spelt."""
    bytes_to_ids = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_to_ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    return Vocabulary(tokenizer, eos="<|end|>")


VOCAB = byte_vocabulary()
ID_OF_BYTE = {VOCAB.token_bytes(token): token for token in range(256)}
TOKENS = st.lists(
    st.one_of(
        st.text(max_size=3).map(lambda text: list(text.encode())),
        st.binary(max_size=3).map(list),
        st.sampled_from(["€", "🙂", "e\u0301"]).map(lambda text: list(text.encode())[:-1]),
    ).map(lambda data: [ID_OF_BYTE[bytes([byte])] for byte in data])
    | st.sampled_from([[VOCAB.control[text]] for text in CONTROL] + [[VOCAB.size + 5]]),
    max_size=8,
).map(lambda groups: [token for group in groups for token in group])


def cut(items, cuts):
    """`items` in consecutive groups that end at the given places."""
    places = sorted({place % (len(items) + 1) for place in cuts} | {0, len(items)})
    return [items[a:b] for a, b in pairwise(places)]


def spell(text: str) -> list[int]:
    return [ID_OF_BYTE[bytes([byte])] for byte in text.encode()]


@settings(deadline=None)
@given(TOKENS, st.lists(st.integers(0, 100), max_size=6))
def test_joined_pieces_equal_bytes_decoded_at_once_for_every_grouping(tokens, cuts):
    detokenizer = Detokenizer(VOCAB)
    pieces = [piece for group in cut(tokens, cuts) for piece in detokenizer.feed_many(group)]
    pieces += detokenizer.flush()
    assert "".join(piece.text for piece in pieces) == VOCAB.decode(tokens)
    controls = set(VOCAB.control.values())
    assert [p.control for p in pieces if p.control is not None] == [t for t in tokens if t in controls]


@settings(deadline=None)
@given(TOKENS)
def test_feeding_one_at_a_time_gives_the_same_text_between_control_tokens(tokens):
    def merged(pieces):
        joined: list[Piece] = []
        for piece in pieces:
            if joined and piece.control is None and joined[-1].control is None:
                piece = Piece(joined.pop().text + piece.text)
            joined.append(piece)
        return joined

    single, many = Detokenizer(VOCAB), Detokenizer(VOCAB)
    one_by_one = [piece for token in tokens for piece in single.feed(token)] + single.flush()
    assert merged(one_by_one) == merged(many.feed_many(tokens) + many.flush())


def test_a_split_character_is_held_back_until_it_is_whole():
    detokenizer = Detokenizer(VOCAB)
    shown = [detokenizer.feed(token) for token in spell("a🙂")]
    assert shown == [[Piece("a")], [], [], [], [Piece("🙂")]]
    assert detokenizer.flush() == []


def test_flush_gives_a_broken_tail_once():
    detokenizer = Detokenizer(VOCAB)
    assert detokenizer.feed_many(spell("€")[:2]) == []
    assert detokenizer.flush() == [Piece("\ufffd")]
    assert detokenizer.flush() == []
    assert detokenizer.feed_many(spell("€")) == [Piece("€")]


def test_a_control_token_is_told_apart_from_its_text_and_ends_a_broken_character():
    token = VOCAB.control["<tool_call>"]
    detokenizer = Detokenizer(VOCAB)
    assert detokenizer.feed_many(spell("<tool_call>")) == [Piece("<tool_call>")]
    detokenizer.feed(spell("€")[0])
    assert detokenizer.feed(token) == [Piece("\ufffd"), Piece("<tool_call>", control=token)]


def test_a_stream_of_broken_bytes_is_shown_as_it_comes():
    detokenizer = Detokenizer(VOCAB)
    assert [detokenizer.feed(ID_OF_BYTE[b"\xff"]) for _ in range(3)] == [[Piece("\ufffd")]] * 3


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read character by character; at the first end of a stop string, cut off the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


SHORT = st.text("ab<", min_size=1, max_size=4)


@settings(deadline=None)
@given(st.text("ab<c", max_size=20), st.lists(SHORT, max_size=4), st.lists(st.integers(0, 100), max_size=6))
def test_stop_strings_equal_the_definition_for_every_grouping(text, stops, cuts):
    screen = StopStrings(stops)
    shown = [screen.push(group) for group in cut(text, cuts)]
    stop = next((one.stop for one in shown if one.stop is not None), None)
    tail = "" if stop is not None else screen.flush()
    assert ("".join(one.text for one in shown) + tail, stop) == first_stop(text, stops)


@settings(deadline=None)
@given(st.text("ab<c", max_size=20), SHORT)
def test_a_single_stop_string_cuts_where_find_says(text, stop):
    screen = StopStrings([stop])
    shown = screen.push(text)
    at = text.find(stop)
    assert shown.text + screen.flush() == (text[:at] if at >= 0 else text)


@settings(deadline=None)
@given(st.text("ab<c", max_size=20), st.lists(SHORT, min_size=1, max_size=4))
def test_only_a_possible_beginning_is_held_back(text, stops):
    screen = StopStrings(stops)
    shown = screen.push(text)
    if shown.stop is None:
        held = text[len(shown.text) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_text_after_a_stop_is_dropped():
    screen = StopStrings(["END"])
    assert screen.push("a EN") == Screened("a ")
    assert screen.push("D and more") == Screened("", "END")
    assert screen.push("still more") == Screened("", "END")
    assert screen.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(AgentError, match="empty"):
        StopStrings(["a", ""])
