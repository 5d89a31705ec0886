"""Reads one text after the other, or side by side, into records of one type: whole, or in parts that are joined."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio
import anyio.to_thread

from agentkit.agent import Agent, LoadedModel
from agentkit.confidence import Confidence
from agentkit.document import Evidence, Leaf, Node, Written, certainty, evidence, plain, read
from agentkit.gather import gather
from agentkit.limits import Limits
from agentkit.merge import lenient, merge, require_keys
from agentkit.output import Constraint, OutputError, constraint
from agentkit.result import RunResult
from agentkit.runtime.errors import AgentError, CapacityError
from agentkit.runtime.grammar import JsonSpec
from agentkit.runtime.request import Sampling, Usage
from agentkit.schema import Json, described
from agentkit.spans import Finder
from agentkit.split import Part, choose, split
from agentkit.template import Message, System, User
from agentkit.turn import OutputDelta

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine

Out = TypeVar("Out")

INSTRUCTIONS = "Extract the data from the text."
_PART = "The text is one part of a longer document. Answer null for what it does not say."
#: Of the context, the share that is kept back for the record, if `max_tokens` is more.
_RECORD_SHARE = 4
#: Tokens of a part that the next one begins with: a share of the part, and at most so many.
_OVERLAP_SHARE, _OVERLAP = 8, 128
#: Where a budget chooses among parts, it has room for at least so many.
_CHOICE = 4
_SMALLEST_PART = 16
#: What a template may write around a text that it does not write around none.
_MARGIN = 8
#: Characters from which a text is counted and cut off the event loop.
_LONG = 1 << 16


@dataclass(frozen=True, slots=True)
class Extracted(Generic[Out]):
    """One record, where it is from, and what it cost.

    Attributes:
        output: the record.
        evidence: of each string, number, true, false and null in the document that the model wrote, by its JSON pointer
            (``/items/0/price``): where the text has it, and how sure the model was.
        parts: of the text. One, unless it was long or a budget was given; then `Part.unread` says of each whether it
            was read.
        usage: tokens it cost.
    """

    output: Out
    evidence: Mapping[str, Evidence]
    parts: tuple[Part, ...]
    usage: Usage


class Extractor(Generic[Out]):
    """What all texts of one extraction share; `agentkit.extraction.extract` documents the arguments.

    Attributes:
        spec: what a record is decoded under, as a text that other types do not have.
        most: texts to be read at a time, once loaded: more would only wait in the engine.

    Raises:
        SchemaError: the type has no schema.
        ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        output: type[Out],
        *,
        instructions: str = INSTRUCTIONS,
        max_tokens: int = 1024,
        sampling: Sampling | None = None,
        part_tokens: int | None = None,
        budget: int | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        for name, value in (("part_tokens", part_tokens), ("budget", budget)):
            if value is not None and value < _SMALLEST_PART:
                raise ValueError(f"{name} must be at least {_SMALLEST_PART}, not {value}")
        if output is str:  # to an agent that is free text; here it is a value that stands in the text
            output = cast("type[Out]", {"type": "string"})
        self.part_tokens, self.budget, self.keys = part_tokens, budget, dict(keys or {})
        self._constraint = cast("Constraint[Out]", constraint(output))
        spec = self._constraint.spec
        self._schema = cast("Json", json.loads(spec.schema)) if isinstance(spec, JsonSpec) else None
        require_keys(self._schema, self.keys)
        sampling = sampling or Sampling()
        self._agent = Agent(
            output=output,
            instructions="\n".join(filter(None, [instructions, *described(self._schema or {})])),
            limits=Limits(steps=3, turn_tokens=max_tokens),  # two tries; the last step is none for a second one
            sampling=sampling if sampling.logprobs is not None else replace(sampling, logprobs=0),
        )
        self.spec = repr(spec)
        self.most = 1

    async def load(self, engine: Engine | None) -> None:
        """Get ready to read with a model; None in a `scripted` block.

        Raises:
            SchemaError: the schema cannot be decoded.
            CapacityError: the instructions leave no room for a text.
        """
        self._agent = replace(self._agent, model=engine)
        self._loaded: LoadedModel = await self._agent.load()
        engine = self._loaded.engine
        compiled = engine.compiler.submit(self._constraint.spec)
        await anyio.to_thread.run_sync(compiled.result)
        self._part_agent = self._agent
        if self._schema is not None:
            instructions = f"{self._agent.instructions}\n{_PART}".strip()
            output = cast("type[Out]", lenient(self._schema))
            self._part_agent = replace(self._agent, model=engine, output=output, instructions=instructions)
        sizes = engine.sizes
        self.most = sizes.running
        self._limiter = anyio.CapacityLimiter(2 * sizes.running)
        context = min(sizes.context, sizes.pages * sizes.page_size)
        messages: list[Message] = [System(self._part_agent.instructions), User("")]
        taken = len(self._loaded.template.encode_start(messages)) + _MARGIN
        self._room = context - taken - min(self._agent.limits.turn_tokens, context // _RECORD_SHARE)
        if self._room < _SMALLEST_PART:
            raise CapacityError(
                f"the instructions take {taken} tokens of the {context} that {engine.name} holds, and with room for a "
                "record nothing is left for a text: shorten them, lower max_tokens, or load with a larger `context`"
            )

    async def read(self, text: str, watch: Callable[[str], object] | None = None) -> Extracted[Out]:
        """The record of a text.

        Args:
            text: the text.
            watch: called with what the record has grown by; not where the text is read in parts.

        Raises:
            AgentError: as `agentkit.extraction.extract` says.
        """
        if not text.strip():
            raise AgentError("the text is empty: there is nothing to extract from it")
        parts = self._parts(text) if len(text) < _LONG else await anyio.to_thread.run_sync(self._parts, text)
        if len(parts) > 1:
            return await self._joined(text, parts)
        result, node = await self._run(self._agent, text, parts[0], watch)
        return Extracted(result.output, evidence(node), tuple(parts), result.usage)

    def _parts(self, text: str) -> list[Part]:
        """The text as one part if it can be, else as several, of which some may be left unread."""
        vocab = self._loaded.engine.vocab
        starts = vocab.starts(text)
        most = min(self._room, self.part_tokens or self._room)
        budget = self.budget or len(starts)
        if len(starts) <= min(most, budget):
            return [Part(0, len(text), len(starts))]
        if budget < len(starts):
            most = min(most, max(budget // _CHOICE, _SMALLEST_PART))
        overlap = min(most // _OVERLAP_SHARE, _OVERLAP)
        parts = split(text, starts, most, overlap, lambda part: len(vocab.encode(part)))
        return parts if self.budget is None else choose(parts, self.budget)

    async def _run(
        self, agent: Agent[Any], text: str, part: Part, watch: Callable[[str], object] | None = None
    ) -> tuple[RunResult[Any], Node]:
        """Have an agent read a part of a text."""
        async with self._limiter, agent.stream(text[part.start : part.end]) as run:
            async for event in run:
                if watch is not None and isinstance(event, OutputDelta):
                    watch(event.text)
        return run.result, self._tree(run.result, Finder(text, part.start, part.end))

    def _tree(self, result: RunResult[Any], finder: Finder) -> Node:
        """The document that a run has written, with the evidence of its leaves."""
        vocab = self._loaded.engine.vocab
        last = result.transcript.spans[-1]
        ids = result.transcript.ids[last.start : last.end]
        sizes = [len(vocab.token_bytes(token)) for token in ids]
        sizes += [1] * (len(result.logprobs) - len(ids))  # the token that ends the turn is not in the log
        document = vocab.decode(ids)
        confidence = Confidence(document, sizes, result.logprobs)

        def leaf(written: Written) -> Leaf:
            value, start, end = written.value, written.start, written.end
            span = finder.find(value, document[start:end])
            # Where a number ends is decided by the token behind it.
            end += isinstance(value, int | float) and not isinstance(value, bool)
            return Leaf(value, Evidence(span, confidence.of(start, end)))

        if self._schema is not None:
            return read(document, leaf)
        whole = Evidence(finder.find(document, document), confidence.of(0, len(document) + 1))
        return Leaf(document, whole)

    async def _joined(self, text: str, parts: Sequence[Part]) -> Extracted[Out]:
        """The record of a text in parts."""
        outcomes: list[Node | Exception | None] = [None] * len(parts)
        usages: list[Usage] = []

        async def one(index: int) -> None:
            if parts[index].unread:
                return
            try:
                result, outcomes[index] = await self._run(self._part_agent, text, parts[index])
                usages.append(result.usage)
            except AgentError as error:
                outcomes[index] = error

        await gather(one, range(len(parts)), self.most)
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        nodes = [outcome for outcome in outcomes if outcome is not None and not isinstance(outcome, Exception)]
        if not nodes:
            raise errors[0]
        told = tuple(
            replace(part, unread=str(outcome)) if isinstance(outcome, Exception) else part
            for part, outcome in zip(parts, outcomes, strict=True)
        )
        node = self._join(nodes, told)
        written = json.dumps(plain(node), ensure_ascii=False) if self._schema is not None else str(plain(node))
        output = self._constraint.parse(written)
        return Extracted(output, evidence(node), told, sum(usages, Usage()))

    def _join(self, nodes: list[Node], parts: Sequence[Part]) -> Node:
        if self._schema is None:
            return max(nodes, key=certainty)
        merged = merge(self._schema, nodes, self.keys)
        if merged.node is None or merged.missing:
            names = ", ".join(pointer or "the record" for pointer in merged.missing[:8])
            unread = sum(bool(part.unread) for part in parts)
            raise OutputError(
                f"no part of the text says anything of what the type requires: {names}. Let it be null there, or make "
                "it optional" + (f"; {unread} of {len(parts)} parts were not read." if unread else ".")
            )
        return merged.node
