"""Our engine under outlines' own generators, on the embedded model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any, Literal

import anyio
import outlines
import pytest
from outlines.inputs import Chat
from outlines.types import CFG, Regex
from pydantic import BaseModel

from agentkit import SchemaError
from agentkit.outlines_model import OutlinesModel
from agentkit.runtime.load import load_engine
from tests import smol


class Person(BaseModel):
    name: str
    age: int


ANNA = Person(name="Anna Smith", age=34)
PROMPT = "Anna Smith is 34 years old. Answer with JSON."


@pytest.fixture(scope="module")
def model() -> Iterator[OutlinesModel]:
    with load_engine(smol.smol_path()) as engine:
        yield OutlinesModel(engine)


def test_its_generator_makes_documents_of_a_pydantic_model(model: OutlinesModel) -> None:
    generator: Any = outlines.Generator(model, Person)
    assert Person.model_validate_json(generator(PROMPT, max_tokens=60)) == ANNA
    assert Person.model_validate_json(model(PROMPT, Person, max_tokens=60)) == ANNA


def test_its_types_and_terms_are_taken(model: OutlinesModel) -> None:
    assert model("Is ice cold?", Literal["yes", "no"]) in ("yes", "no")
    assert re.fullmatch("[0-9]{4}", model("When did the war end?", Regex("[0-9]{4}")))
    assert model("Which is it?", CFG('start: "left" | "right"')) in ("left", "right")
    numbers = json.loads(model("The first primes as a list.", list[int], max_tokens=60))
    assert numbers
    assert all(isinstance(n, int) for n in numbers)
    # outlines' own conversion of a list of models is a regular expression that refuses most documents.
    people = json.loads(model("Anna is 34, Bob is 7. JSON.", list[Person], max_tokens=80))
    assert all(Person.model_validate(one) for one in people)


def test_a_batch_and_a_stream_give_what_a_call_gives(model: OutlinesModel) -> None:
    generator: Any = outlines.Generator(model, Person)
    prompts = [PROMPT, "Bob Jones is 7 years old. Answer with JSON."]
    batch = generator.batch(prompts, max_tokens=60)
    assert batch == ["".join(generator.stream(prompt, max_tokens=60)) for prompt in prompts]
    assert batch == model.batch(prompts, Person, max_tokens=60)
    assert [Person.model_validate_json(text) for text in batch] == [ANNA, Person(name="Bob Jones", age=7)]


def test_an_application_fills_its_template(model: OutlinesModel) -> None:
    template = outlines.Template.from_string("{{ name }} is {{ age }} years old. Answer with JSON.")
    text = outlines.Application(template, Person)(model, {"name": "Anna Smith", "age": 34}, max_tokens=60)
    assert Person.model_validate_json(text) == ANNA


def test_a_text_is_what_a_user_says(model: OutlinesModel) -> None:
    said = Chat([{"role": "user", "content": PROMPT}])
    assert model.type_adapter.format_input(PROMPT) == model.type_adapter.format_input(said)
    told = Chat([{"role": "system", "content": "Be brief."}, *said.messages])
    assert "system\nBe brief." in model.engine.vocab.decode(model.type_adapter.format_input(told))


def test_a_stream_may_be_left(model: OutlinesModel) -> None:
    generator: Any = outlines.Generator(model)
    stream = generator.stream("Tell me a long story.", max_tokens=200)
    assert next(stream)
    stream.close()
    assert model.engine.stats().pages_private == 0


def test_it_may_be_called_where_an_event_loop_runs(model: OutlinesModel) -> None:
    async def notebook() -> str:
        return model("Is ice cold?", Literal["yes", "no"])

    assert anyio.run(notebook) in ("yes", "no")


def test_nothing_of_the_process_is_changed(model: OutlinesModel) -> None:
    """A logits processor of outlines, of any backend, makes torch's compiler swallow its errors from then on."""
    import torch._dynamo

    before = torch._dynamo.config.suppress_errors
    model("Is ice cold?", Literal["yes", "no"])
    assert torch._dynamo.config.suppress_errors == before
    assert "vllm" not in sys.modules


def test_what_cannot_be_is_refused_and_the_next_works(model: OutlinesModel) -> None:
    image: Any = Chat([{"role": "user", "content": ["look", object()]}])
    with pytest.raises(SchemaError):
        model.generate("x", {"type": "nothing"})
    with pytest.raises(TypeError, match="max_new_tokens is no option of this model; there are .*max_tokens"):
        model("x", max_new_tokens=5)
    with pytest.raises(TypeError, match="text alone"):
        model(image)
    with pytest.raises(TypeError, match="a text or an outlines Chat, not list"):
        model(["x"])
    with pytest.raises(NotImplementedError, match="logits processors"):
        outlines.Generator(model, processor=lambda ids, logits: logits)  # pyright: ignore
    assert model("Is ice cold?", Literal["yes", "no"]) in ("yes", "no")
