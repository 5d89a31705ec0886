from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from agentkit.runtime.errors import AgentError
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import open_checkpoint
from agentkit.template import Assistant, Call, ChatTemplate, Message, System, ToolResult, User
from agentkit.transcript import Log, Transcript
from tests.qwen import qwen_folder
from tests.smol import smol_path


def two_ends() -> Vocabulary:
    """Qwen3's vocabulary with both end tokens that its generation_config.json names."""
    vocab = Vocabulary.from_folder(qwen_folder())
    ends = [vocab.control["<|im_end|>"], vocab.control["<|endoftext|>"]]
    return Vocabulary(Tokenizer.from_str(vocab.json), eos="<|im_end|>", chat_template=vocab.chat_template, end_ids=ends)


QWEN = ChatTemplate(two_ends())
SMOL = ChatTemplate(open_checkpoint(smol_path()).vocabulary())
END = QWEN.vocab.control["<|im_end|>"]
BEGIN = QWEN.vocab.control["<|im_start|>"]


class CountingTemplate(ChatTemplate):
    """Remembers what it encoded, to show that nothing is encoded twice."""

    def __init__(self, vocab: Vocabulary) -> None:
        super().__init__(vocab)
        self.messages: list[Message] = []
        self.ids: list[int] = []

    def encode_start(self, messages, tools=()):
        return self._record(messages, super().encode_start(messages, tools))

    def encode_next(self, messages):
        return self._record(messages, super().encode_next(messages))

    def _record(self, messages, ids):
        self.messages += messages
        self.ids += ids
        return ids


def letters(template: ChatTemplate, text: str) -> list[int]:
    """Ids of `text` spelt letter by letter, as no encoder would: what a model emits need not be canonical."""
    return [token for letter in text for token in template.vocab.encode(letter)]


@pytest.mark.parametrize("template", [QWEN, SMOL], ids=["qwen3", "smollm2"])
def test_forty_turns_encode_every_id_once_and_change_none(template):
    counting = CountingTemplate(template.vocab)
    transcript = Transcript(counting)
    said: list[Message] = [System("Be brief."), User("Count.")]
    transcript.append(*said)
    emitted: list[int] = []
    for turn in range(40):
        before = list(transcript.ids)
        answer = Assistant("", (Call("count", {"n": turn}),))
        ids = letters(template, f"<turn {turn}>")
        transcript.emit([*ids, template.vocab.end_id], answer)
        result = ToolResult("count", f"{turn}\n" * (turn % 3))
        transcript.append(result)
        emitted += ids
        said += [answer, result]
        assert transcript.ids[: len(before)] == before

    assert transcript.messages() == said
    assert counting.messages == [message for message in said if not isinstance(message, Assistant)]
    assert len(transcript.ids) == len(counting.ids) + len(emitted)
    assert [i for s in transcript.spans if s.kind == "assistant" for i in transcript.ids[s.start : s.end]] == emitted


def test_the_log_is_the_canonical_rendering_where_the_model_spoke_canonically():
    transcript = Transcript(QWEN)
    transcript.append(User("Where?"))
    transcript.emit(QWEN.vocab.encode("Let me look."), Assistant("Let me look."))
    transcript.append(ToolResult("grep", "a.py"), ToolResult("grep", "b.py"), User("Well?"))
    assert list(transcript.ids) == QWEN.encode_start(transcript.messages())


ACTIONS = st.lists(
    st.one_of(
        st.text(max_size=5).map(lambda text: [User(text)]),
        st.lists(st.builds(ToolResult, st.just("f"), st.text(max_size=5)), min_size=1, max_size=3),
        st.binary(max_size=4).map(lambda data: [int(byte) for byte in data]),
        st.just("fork"),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(ACTIONS, st.none() | st.sampled_from(sorted(QWEN.vocab.end_ids)))
def test_a_transcript_only_grows_and_its_spans_cover_it(actions, end):
    transcript = Transcript(QWEN)
    transcript.append(User("start"))
    kept: list[tuple[Transcript, list[int]]] = []
    for action in actions:
        before = list(transcript.ids)
        if action == "fork":
            kept.append((transcript, before))
            transcript = transcript.fork()
        elif action and isinstance(action[0], User | ToolResult):
            transcript.append(*action)
        elif transcript.awaits_model:
            transcript.emit(action + ([] if end is None else [end]), Assistant("said"))
        assert transcript.ids[: len(before)] == before
        edges = [0, *(span.end for span in transcript.spans)]
        assert [span.start for span in transcript.spans] == edges[:-1]
        assert edges[-1] == len(transcript.ids)
        # Every turn that was begun is ended exactly once, but for the one that is open.
        ids = list(transcript.ids)
        assert ids.count(BEGIN) == ids.count(END) + 1
    assert all(list(original.ids) == ids for original, ids in kept)


@pytest.mark.parametrize("end", [[], [END], [QWEN.vocab.control["<|endoftext|>"]]])
def test_the_end_of_a_turn_is_written_once_whatever_the_model_ended_with(end):
    transcript = Transcript(QWEN)
    transcript.append(User("q"))
    words = QWEN.vocab.encode("An answer")
    span = transcript.emit([*words, *end], Assistant("An answer"))
    assert transcript.ids[span.start : span.end] == words
    transcript.append(User("r"))
    assert transcript.ids[span.end :] == QWEN.encode_next([User("r")])
    assert transcript.ids[span.end] == END


def test_spans_say_what_each_stretch_is():
    transcript = Transcript(QWEN)
    transcript.append(System("s"), User("u"))
    transcript.emit([1, 2], Assistant("a"))
    transcript.append(ToolResult("f", "r"), User("v"))
    transcript.emit([3], Assistant("b"))
    transcript.append(User("w"))
    assert [span.kind for span in transcript.spans] == ["prompt", "assistant", "tool", "assistant", "user"]
    assert transcript.spans[2].messages == (ToolResult("f", "r"), User("v"))
    assert QWEN.vocab.decode(transcript.ids[transcript.spans[4].start :]).startswith("<|im_end|>\n<|im_start|>user\nw")


def test_a_question_left_unanswered_stands_as_an_empty_turn():
    transcript = Transcript(QWEN)
    transcript.append(User("first"))
    transcript.append(User("second"))
    assert transcript.messages() == [User("first"), Assistant(), User("second")]
    assert list(transcript.ids) == QWEN.encode_start(transcript.messages())


def test_the_model_speaks_only_in_its_turn():
    transcript = Transcript(QWEN)
    with pytest.raises(AgentError, match="not the model's turn"):
        transcript.emit([1], Assistant("a"))
    transcript.append(User("q"))
    transcript.emit([1], Assistant("a"))
    assert not transcript.awaits_model
    with pytest.raises(AgentError, match="not the model's turn"):
        transcript.emit([1], Assistant("a"))
    with pytest.raises(AgentError, match="nothing to append"):
        transcript.append()


def test_the_view_of_the_ids_is_live_and_read_only():
    transcript = Transcript(QWEN)
    view = transcript.ids
    assert len(view) == 0
    transcript.append(User("q"))
    assert len(view) == len(transcript.ids) > 0
    part = view[:3]
    part.append(0)
    assert view[:3] != part
    assert not hasattr(Log, "append")
    with pytest.raises(TypeError):
        view[0] = 1  # pyright: ignore


def test_a_fork_goes_on_by_itself():
    transcript = Transcript(QWEN)
    transcript.append(User("q"))
    other = transcript.fork()
    other.emit([1], Assistant("a"))
    assert transcript.awaits_model
    assert list(other.ids) == [*transcript.ids, 1]
    assert other.messages() == [User("q"), Assistant("a")]
