"""outlines' black-box generator over our engine, on the embedded model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Literal

import pytest
from outlines.generator import BlackBoxGenerator
from outlines.inputs import Chat
from outlines.types import Regex
from pydantic import BaseModel

from agentkit import SchemaError
from agentkit.outlines_model import OutlinesModel
from agentkit.runtime.load import load_engine
from tests import smol


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def model() -> Iterator[OutlinesModel]:
    with load_engine(smol.smol_path()) as engine:
        yield OutlinesModel(engine)


def chat(text: str) -> Chat:
    return Chat([{"role": "user", "content": text}])


def test_pydantic_model(model: OutlinesModel) -> None:
    prompt = chat("Anna Smith is 34 years old. Answer with JSON.")
    text = BlackBoxGenerator(model, Person)(prompt, max_tokens=60)  # pyright: ignore
    assert Person.model_validate_json(text) == Person(name="Anna Smith", age=34)


def test_types_and_terms_of_outlines(model: OutlinesModel) -> None:
    assert BlackBoxGenerator(model, Literal["yes", "no"])("Is ice cold? ") in ("yes", "no")  # pyright: ignore
    year = BlackBoxGenerator(model, Regex("[0-9]{4}"))("The war ended in ")  # pyright: ignore
    assert re.fullmatch("[0-9]{4}", year)
    numbers = BlackBoxGenerator(model, list[int])("The first primes: ", max_tokens=60)  # pyright: ignore
    assert all(isinstance(n, int) for n in json.loads(numbers))


def test_batch_and_stream_give_the_same(model: OutlinesModel) -> None:
    generator = BlackBoxGenerator(model, None)  # pyright: ignore
    prompts = ["The capital of France is", "The opposite of hot is"]
    batch = generator.batch(prompts, max_tokens=12)
    assert batch == ["".join(generator.stream(prompt, max_tokens=12)) for prompt in prompts]
    assert "Paris" in batch[0]


def test_a_stream_may_be_left(model: OutlinesModel) -> None:
    stream = BlackBoxGenerator(model, None).stream("Once upon a time", max_tokens=200)  # pyright: ignore
    assert next(stream)
    stream.close()  # pyright: ignore
    assert model.engine.stats().pages_private == 0


def test_what_cannot_be_is_refused_and_the_next_works(model: OutlinesModel) -> None:
    with pytest.raises(SchemaError):
        model.generate("x", {"type": "nothing"})
    assert model.generate("The capital of France is", max_tokens=3)
