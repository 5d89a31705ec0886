"""Our engine as a model of outlines.

    import outlines
    from agentkit import load
    from agentkit.outlines_model import OutlinesModel

    model = OutlinesModel(load())
    invoice = outlines.Generator(model, Invoice)
    invoice("Bakery Lindqvist, 2026-05-02, TOTAL 14.50")

outlines drives local models through logits processors, which have no forced tokens, no rollback, no grammar for each
row and, by default, a backend that lets invalid JSON through. A black-box model is handed the output type instead, and
so our grammars are.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import fields
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal
from outlines.inputs import Chat
from outlines.models.base import ModelTypeAdapter
from outlines.models.vllm_offline import VLLMOffline

from agentkit.gather import gather
from agentkit.output import constraint
from agentkit.runtime.engine import Engine
from agentkit.runtime.grammar import GrammarSpec
from agentkit.runtime.request import Request, Sampling
from agentkit.runtime.text import Detokenizer
from agentkit.runtime.vocab import Vocabulary
from agentkit.template import Assistant, ChatTemplate, Message, System, User

T = TypeVar("T")
_ROLES = {"system": System, "user": User, "assistant": Assistant}
_OPTIONS = {field.name for field in fields(Sampling)} | {"max_tokens"}


class Adapter(ModelTypeAdapter):
    """What outlines calls prompts and output types, as a request to the engine has them."""

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        self._template = ChatTemplate(vocab) if vocab.chat_template is not None else None

    def format_input(self, model_input: str | Chat) -> list[int]:
        """The ids of a prompt.

        Raises:
            TypeError: neither a text nor a chat of texts, or a chat for a model without a chat template.
        """
        if isinstance(model_input, str):
            if self._template is None:
                return self._vocab.encode(model_input)
            return self._template.encode_start([User(model_input)])
        if not isinstance(model_input, Chat):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a prompt is a text or an outlines Chat, not {type(model_input).__name__}")
        if self._template is None:
            raise TypeError("this model has no chat template: pass a text instead of a Chat")
        return self._template.encode_start([_message(**message) for message in model_input.messages])

    def format_output_type(self, output_type: Any = None) -> GrammarSpec | None:
        """The grammar of an output type; None where it may be any text.

        Raises:
            SchemaError: it has no schema, or one that cannot be decoded.
        """
        return None if output_type in (None, str) else constraint(output_type).spec


def _message(role: str, content: Any) -> Message:
    if role not in _ROLES:
        raise TypeError(f"the role of a message is system, user or assistant, not {role!r}")
    if not isinstance(content, str):
        raise TypeError("this model reads text alone: give each message of the Chat a text as its content")
    return _ROLES[role](content)


class OutlinesModel(VLLMOffline):
    """A model for `outlines.Generator`, `outlines.Application`, and to be called as it is.

    As with outlines' own local models a text is what a user says, where the model has a chat template, and otherwise a
    text to go on from; a `Chat` is a whole conversation. Keyword arguments of a call are those of `Sampling`, and
    ``max_tokens``. May be called from any thread, and where an event loop runs, which then waits.

    `outlines.Generator` takes instances of the classes it lists and of no others. The one that means the same as ours,
    a model in this process that is handed the output type, is `VLLMOffline`: it is inherited from for that alone, and
    nothing of vLLM is used.

    Args:
        engine: made by `agentkit.load`.
    """

    def __init__(self, engine: Engine) -> None:  # the base class wants a model of vLLM
        self.engine = engine
        self.type_adapter = Adapter(engine.vocab)

    def generate(self, model_input: str | Chat, output_type: Any = None, **inference_kwargs: Any) -> str:
        """The whole output for one prompt.

        Raises:
            SchemaError: the output type has no schema, or one that cannot be decoded.
            CapacityError: the prompt does not fit the context, or no output fits ``max_tokens``.
            TypeError: a prompt or an option that there is not.
        """
        return self.generate_batch([model_input], output_type, **inference_kwargs)[0]

    def generate_batch(
        self, model_input: Sequence[str | Chat], output_type: Any = None, **inference_kwargs: Any
    ) -> list[str]:
        """The outputs for several prompts, decoded together. For what it raises see `generate`."""
        requests = self._requests(model_input, output_type, inference_kwargs)
        return _wait(lambda: gather(self._whole, requests, self.engine.sizes.running))

    def generate_stream(
        self, model_input: str | Chat, output_type: Any = None, **inference_kwargs: Any
    ) -> Iterator[str]:
        """The output in pieces, as they are decoded. For what it raises see `generate`; closing it ends the output."""
        [request] = self._requests([model_input], output_type, inference_kwargs)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[str]:
        with start_blocking_portal() as portal:
            pieces = self._pieces(request)
            try:
                while (piece := portal.call(anext, pieces, None)) is not None:
                    yield piece
            finally:
                portal.call(pieces.aclose)

    async def _whole(self, request: Request) -> str:
        async with aclosing(self._pieces(request)) as pieces:
            return "".join([piece async for piece in pieces])

    async def _pieces(self, request: Request) -> AsyncGenerator[str, None]:
        detokenizer = Detokenizer(self.engine.vocab)
        async with self.engine.generate(request) as generation:
            async for chunk in generation:
                for piece in detokenizer.feed_many(chunk.ids):
                    if piece.control is None:
                        yield piece.text
        for piece in detokenizer.flush():
            yield piece.text

    def _requests(self, prompts: Sequence[str | Chat], output_type: Any, options: dict[str, Any]) -> list[Request]:
        unknown = options.keys() - _OPTIONS
        if unknown:
            raise TypeError(f"{min(unknown)} is no option of this model; there are {', '.join(sorted(_OPTIONS))}")
        spec = self.type_adapter.format_output_type(output_type)
        sampling = Sampling(**{name: value for name, value in options.items() if name != "max_tokens"})
        most = options.get("max_tokens")
        return [
            Request(ids=self.type_adapter.format_input(p), max_tokens=most, grammar=spec, sampling=sampling)
            for p in prompts
        ]


def _wait(work: Callable[[], Awaitable[T]]) -> T:
    """The result of a coroutine, run on a thread of its own: the caller's may be running an event loop."""
    with start_blocking_portal() as portal:
        return portal.call(work)
