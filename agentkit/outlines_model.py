"""Our engine as a model of outlines.

    from outlines.generator import BlackBoxGenerator
    from agentkit.outlines_model import OutlinesModel

    invoice = BlackBoxGenerator(OutlinesModel(load()), Invoice)
    invoice(Chat([{"role": "user", "content": text}]))

outlines' own generators drive a model through logits processors, which have no forced tokens, no rollback, no grammar
for each row and, by default, a backend that lets invalid JSON through. A black-box generator hands the output type to
the model instead, and so to our grammars.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import anyio
from anyio.from_thread import start_blocking_portal
from outlines.inputs import Chat

from agentkit.gather import gather
from agentkit.output import constraint
from agentkit.runtime.engine import Engine
from agentkit.runtime.request import Request, Sampling
from agentkit.runtime.text import Detokenizer
from agentkit.template import Assistant, ChatTemplate, Message, System, User

_ROLES = {"system": System, "user": User, "assistant": Assistant}


class OutlinesModel:
    """What `outlines.generator.BlackBoxGenerator` asks of a model.

    Prompts are a text, which the model continues as it stands, or an outlines `Chat`, which goes through the model's
    chat template. Keyword arguments of a call are those of `Sampling`, and ``max_tokens``.

    Args:
        engine: made by `agentkit.load`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._template = ChatTemplate(engine.vocab) if engine.vocab.chat_template is not None else None

    def generate(self, model_input: str | Chat, output_type: Any = None, **options: Any) -> str:
        """The whole output for one prompt."""
        return self.generate_batch([model_input], output_type, **options)[0]

    def generate_batch(self, model_input: Sequence[str | Chat], output_type: Any = None, **options: Any) -> list[str]:
        """The outputs for several prompts, decoded together."""
        requests = [self._request(prompt, output_type, options) for prompt in model_input]
        return anyio.run(gather, self._whole, requests)

    def generate_stream(self, model_input: str | Chat, output_type: Any = None, **options: Any) -> Iterator[str]:
        """The output in pieces, as they are decoded."""
        request = self._request(model_input, output_type, options)
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

    def _request(self, prompt: str | Chat, output_type: Any, options: dict[str, Any]) -> Request:
        sampling = {name: value for name, value in options.items() if name != "max_tokens"}
        spec = None if output_type in (None, str) else constraint(output_type).spec
        return Request(
            ids=self._encode(prompt),
            max_tokens=options.get("max_tokens"),
            grammar=spec,
            sampling=Sampling(**sampling),
        )

    def _encode(self, prompt: str | Chat) -> list[int]:
        if isinstance(prompt, str):
            return self.engine.vocab.encode(prompt)
        if self._template is None:
            raise TypeError("this model has no chat template: pass a text instead of a Chat")
        messages: list[Message] = [_ROLES[str(m["role"])](str(m["content"])) for m in prompt.messages]
        return self._template.encode_start(messages)
