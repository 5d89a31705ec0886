"""A model that follows a script, for tests without weights.

Only the choice of tokens is scripted; what `Agent.decide` chooses takes a turn of the script as well. The chat
template, the turn grammar with its masks and forced tokens, sampling, pages, prefix tree and transcript are the real
ones, so a test fails where a real run would: at a call the grammar does not allow, at a turn nobody expected, at a
script that is not used up.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from agentkit.agent import LoadedModel, override
from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.errors import AgentError, CapacityError
from agentkit.runtime.generation import Generation
from agentkit.runtime.request import Chunk, Request
from agentkit.runtime.runner import Output
from agentkit.runtime.score import Continuations
from agentkit.runtime.sequence import Entry, Plan
from agentkit.runtime.vocab import Vocabulary
from agentkit.template import ChatTemplate, Tag, Tags

_CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: Logit of what the script wants, where all others are 0: their probability is below 1e-12.
_WANTED = 30.0


class ScriptError(AgentError):
    """The run and its script went apart; the message says where."""


@dataclass(frozen=True, slots=True)
class ScriptedCall:
    """A tool call of the script."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ScriptedTurn:
    """One turn: text, then calls; or the final output."""

    text: str = ""
    calls: tuple[ScriptedCall, ...] = ()


def call(name: str, /, **arguments: Any) -> ScriptedCall:
    """A call of the tool ``name``, a turn by itself unless it stands in `reply`."""
    return ScriptedCall(name, arguments)


def final(output: Any) -> ScriptedTurn:
    """The final answer: a text, or a value of the agent's output type; for `Agent.decide` the text of a choice."""
    if isinstance(output, str):
        return ScriptedTurn(output)
    value = TypeAdapter[Any](cast("type[Any]", type(output))).dump_python(output, mode="json")
    return ScriptedTurn(json.dumps(value, ensure_ascii=False))


def reply(text: str = "", *calls: ScriptedCall) -> ScriptedTurn:
    """One turn of several calls, with text before them or without."""
    return ScriptedTurn(text, calls)


@contextmanager
def scripted(*turns: ScriptedTurn | ScriptedCall, vocab: Vocabulary | None = None) -> Generator[Engine]:
    """Let every agent run inside the block follow the script, turn by turn.

    Args:
        turns: in order.
        vocab: a real tokenizer with its chat template; by default a built-in one of single bytes.

    Raises:
        ScriptError: the run wants another turn than the script has, or the block ends before the script does.
    """
    vocab = vocab or byte_vocabulary()
    template = ChatTemplate(vocab)
    script = deque(t if isinstance(t, ScriptedTurn) else ScriptedTurn(calls=(t,)) for t in turns)
    with _ScriptedEngine(vocab, script, template.tool_format.tags) as engine:
        token = override.set(LoadedModel(engine, template))
        try:
            yield engine
        finally:
            override.reset(token)
    if script:
        raise ScriptError(f"the run ended before its script: not used are {list(script)}")


class _Runner:
    """Stands in for the weights: all logits are 0 but that of the token the script wants.

    Attributes:
        lines: what each request is to say, and the length of the prompt behind which it says it.
    """

    weight_bytes = 0
    asynchronous = False
    memory = None
    digest = "scripted"

    def __init__(self, vocab: Vocabulary) -> None:
        self.vocab_size, self.end_id = vocab.size, vocab.end_id
        self.lines: dict[int, tuple[list[int], int]] = {}

    def step(self, plan: Plan) -> Output:
        logits = [self._row(entry.seq.rid, entry.start + entry.n) for entry in plan.entries if entry.sample]
        scores = [score for entry in plan.entries for score in self._scores(entry)]
        return Output(torch.stack(logits) if logits else torch.zeros(0, self.vocab_size), torch.tensor(scores))

    def _scores(self, entry: Entry) -> list[float]:
        end = entry.start + entry.n + 1
        rows = [self._row(entry.seq.rid, length) for length in range(end - entry.scored, end)]
        pairs = zip(rows, entry.targets, strict=True)
        return [float(value) for row, tokens in pairs for value in row.log_softmax(-1)[list(tokens)]]

    def _row(self, rid: int, length: int) -> Tensor:
        """Logits of what comes after the first ``length`` ids."""
        line, start = self.lines[rid]
        row = torch.zeros(self.vocab_size)
        row[line[length - start] if length - start < len(line) else self.end_id] = _WANTED
        return row


class _ScriptedEngine(Engine):
    """An engine whose generations take their turns from a script."""

    runner: _Runner

    def __init__(self, vocab: Vocabulary, script: deque[ScriptedTurn], tags: Tags) -> None:
        self._script, self._tags = script, tags
        self._decided: tuple[list[int], int] = ([], 0)
        super().__init__(_Runner(vocab), vocab, Sizes(context=1 << 18, pages=1 << 14), "scripted")

    def generate(self, request: Request) -> Generation:
        generation = super().generate(request)
        if request.targets is not None:
            self.runner.lines[generation.rid] = self._decided
            return generation
        line = self._line(self._next())
        self.runner.lines[generation.rid] = line, len(request.ids)
        return _Checked(self, generation.rid, request, line)

    async def continuations(
        self, ids: Sequence[int], options: Sequence[Sequence[int]], *, namespace: str = ""
    ) -> Continuations:
        turn = self._next()
        line = self._line(turn)
        if line not in [list(option) for option in options]:
            said = " and ".join(repr(self.vocab.decode(option[:-1])) for option in options)
            raise ScriptError(
                f"the script goes on with {self.vocab.decode(line[:-1])!r}, which is none of the choices {said}"
            )
        self._decided = line, len(ids)  # all of its requests are made before anything else can run
        try:
            return await super().continuations(ids, options, namespace=namespace)
        except CapacityError:
            self._script.appendleft(turn)
            raise

    def _next(self) -> ScriptedTurn:
        if not self._script:
            raise ScriptError("the run asks for one more turn than the script has")
        return self._script.popleft()

    def _line(self, wanted: ScriptedTurn) -> list[int]:
        """The ids the turn has when a model writes it as its chat template would."""
        ids = self.vocab.encode(wanted.text)
        for i, item in enumerate(wanted.calls):
            if i or wanted.text:
                ids += self.vocab.encode("\n")
            arguments = json.dumps(dict(item.arguments), ensure_ascii=False)
            body = f'\n{{"name": "{item.name}", "arguments": {arguments}}}\n'
            ids += self._joined(self._tags.open, body, self._tags.close)
        return [*ids, self.vocab.end_id]

    def _joined(self, opening: Tag, body: str, closing: Tag) -> list[int]:
        encode = self.vocab.encode
        if opening.token is None or closing.token is None:
            return encode(opening.text + body + closing.text)
        return [opening.token, *encode(body), closing.token]


class _Checked(Generation):
    """A generation that must keep to its line."""

    def __init__(self, engine: Engine, rid: int, request: Request, line: list[int]) -> None:
        super().__init__(engine, rid, request)
        self._line, self._vocab = line, engine.vocab

    async def __anext__(self) -> Chunk:
        chunk = await super().__anext__()
        if self.ids != self._line[: len(self.ids)]:
            kept = next(i for i, t in enumerate(self.ids) if self._line[i : i + 1] != [t])
            before = self._vocab.decode(self._line[:kept])
            raise ScriptError(
                f"after {before!r} the script goes on with {self._vocab.decode(self._line[kept:])!r}, which the "
                f"grammar of this turn does not allow; it gave {self._vocab.decode(self.ids[kept:])!r}"
            )
        return chunk


def byte_vocabulary() -> Vocabulary:
    """One token for each byte, and the control tokens of Qwen's tool format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(_CONTROL)  # pyright: ignore
    end = len(alphabet) + _CONTROL.index("<|endoftext|>")
    return Vocabulary(tokenizer, eos="<|im_end|>", chat_template=_CHATML, end_ids=[end])
