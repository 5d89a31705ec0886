"""The engine: one thread that plans, runs and samples steps, behind an asynchronous face of token ids."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self, TypeVar, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from agentkit.kernels.sample import Rows, sample
from agentkit.runtime.errors import AgentError, CapacityError, EngineError
from agentkit.runtime.generation import Bell, Generation
from agentkit.runtime.grammar import GrammarCompiler
from agentkit.runtime.host import HostPool
from agentkit.runtime.kv import PagedKV
from agentkit.runtime.live import Live
from agentkit.runtime.pages import PagePool
from agentkit.runtime.pins import Pin
from agentkit.runtime.plan import Scheduler
from agentkit.runtime.radix import PrefixTree
from agentkit.runtime.request import Chunk, Finish, Request, Usage
from agentkit.runtime.runner import Runner
from agentkit.runtime.score import Continuations, Options, Scored, finishes
from agentkit.runtime.sequence import Plan, State
from agentkit.runtime.transfer import Export, Import
from agentkit.runtime.vocab import Vocabulary

T = TypeVar("T")

#: Up to this many decoding sequences have drafts: with more, a step has many rows as it is, and each costs.
_FEW = 4

#: What a step has brought a request: chunks, and the error that ends it, if one does.
Outcome = tuple[Live, list[Chunk], AgentError | None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of an engine.

    Attributes:
        context: most tokens in one sequence.
        pages: pages in the KV pool.
        page_size: tokens in a page.
        step_tokens: most tokens computed in one step; longer prompts are prefilled in chunks of it.
        running: most sequences in one step.
        drafts: most guesses at what follows that one sequence has verified in one step; 0 for none.
        host_pages: pages in the host's memory for those that are evicted from the pool; 0 forgets them.
    """

    context: int
    pages: int
    page_size: int = 16
    step_tokens: int = 512
    running: int = 64
    drafts: int = 0
    host_pages: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """A look at the engine between two steps.

    Attributes:
        running: sequences that hold pages.
        waiting: sequences that do not yet, or no longer.
        pages_free: pages nobody holds.
        pages_cached: pages in the prefix tree.
        pages_private: pages of running sequences.
        pages_host: pages that have been evicted to the host's memory.
        steps: steps run so far.
        computed: tokens sent through the model so far.
    """

    running: int
    waiting: int
    pages_free: int
    pages_cached: int
    pages_private: int
    pages_host: int
    steps: int
    computed: int


class Engine:
    """Token ids in, token ids out, many requests at once.

    Args:
        runner: executes steps.
        vocab: the tokens of the model.
        sizes: the pool must be the one the runner holds.
        name: of the model, for messages.
    """

    def __init__(self, runner: Runner, vocab: Vocabulary, sizes: Sizes, name: str = "model") -> None:
        self.vocab, self.sizes, self.name = vocab, sizes, name
        self.compiler = GrammarCompiler(vocab, runner.vocab_size)
        self.runner = runner
        self._pool = PagePool(sizes.pages)
        self._tree = PrefixTree(self._pool, sizes.page_size, HostPool(sizes.host_pages))
        self._scheduler = Scheduler(
            self._pool, self._tree, sizes.page_size, sizes.step_tokens, sizes.running, sizes.context
        )
        self._static = self._static_mask(runner.vocab_size)
        self._live: dict[int, Live] = {}
        self._rids = itertools.count(1)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._bells: WeakValueDictionary[object, Bell] = WeakValueDictionary()
        self._closed = False
        self._steps = self._computed = 0
        self._masks = ThreadPoolExecutor(1, "agentkit-masks")
        self._thread = threading.Thread(target=self._loop, name="agentkit-engine", daemon=True)
        self._thread.start()
        # Python ends threads that come back from native code after it has begun to exit, which C++ answers by
        # aborting the process. So the thread ends first, whoever has forgotten to close the engine.
        atexit.register(self.close)

    def _static_mask(self, vocab_size: int) -> Tensor:
        """Ids that free text may use: no padded id, no control token but those that end the text."""
        allowed = np.zeros(vocab_size, dtype=bool)
        allowed[: self.vocab.size] = True
        allowed[list(self.vocab.control.values())] = False
        allowed[list(self.vocab.end_ids)] = True
        padded = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
        padded[:vocab_size] = allowed
        return torch.from_numpy(np.packbits(padded, bitorder="little").view(np.int32))  # pyright: ignore[reportUnknownMemberType]

    # The caller's side: any thread, any event loop.

    def generate(self, request: Request) -> Generation:
        """Make a generation; it starts when its ``async with`` block is entered.

        Raises:
            CapacityError: the prompt can never fit.
        """
        longest, what = self._longest()
        if len(request.ids) + 1 > longest:
            raise CapacityError(
                f"the prompt has {len(request.ids)} tokens; {what} of {self.name} holds {longest}, one of them for the "
                "answer. Shorten the prompt, or load the model with a larger `context` or `kv_bytes`."
            )
        bad = next((t for t in request.ids if not 0 <= t < self.runner.vocab_size), None)
        if bad is not None:
            raise ValueError(f"ids holds {bad}, which is no token of {self.name} (0 to {self.runner.vocab_size - 1})")
        return Generation(self, next(self._rids), request)

    def _longest(self) -> tuple[int, str]:
        """Most tokens of one sequence, and what sets the limit."""
        pool = self.sizes.pages * self.sizes.page_size
        return (pool, "the page pool") if pool < self.sizes.context else (self.sizes.context, "the context")

    async def score(self, ids: Sequence[int], start: int = 1, *, namespace: str = "") -> Scored:
        """Log-probabilities of ``ids[start:]``, each token given all before it.

        What is cached of ``ids[:start]`` is not computed again. The rest goes through the model in chunks like any
        prompt, beside other requests, and no more than a few rows of logits exist at once.

        Args:
            ids: the whole text.
            start: first position scored, at least 1: nothing stands before the first token.
            namespace: as of a `Request`.

        Raises:
            ValueError: no ids, ``start`` outside of them, or an id that is no token.
            CapacityError: they can never fit.
        """
        if len(ids) < 2:
            raise ValueError(f"ids has {len(ids)} tokens: give at least two, as a token is scored behind another")
        if not 1 <= start < len(ids):
            raise ValueError(f"start must lie between 1 and {len(ids) - 1} for {len(ids)} ids, not at {start}")
        found = await self.continuations(ids[:start], [ids[start:]], namespace=namespace)
        return Scored(found.logprobs[0], found.usage)

    async def continuations(
        self, ids: Sequence[int], options: Sequence[Sequence[int]], *, namespace: str = ""
    ) -> Continuations:
        """Log-probabilities of several continuations of one prompt, which is computed once.

        The longest option is computed together with the prompt, the others then beside each other, each from where it
        parts from the longest.

        Args:
            ids: the prompt.
            options: token ids of each continuation.
            namespace: as of a `Request`.

        Raises:
            ValueError: no ids, no options, one without tokens, or an id that is no token.
            CapacityError: the prompt with its longest option can never fit.
        """
        if not ids:
            raise ValueError("ids is empty: give at least one token, such as the beginning of a text")
        if not options or not all(options):
            raise ValueError("options: give at least one, each with at least one token")
        longest, what = self._longest()
        count = len(ids) + max(map(len, options))
        if count > longest:
            raise CapacityError(
                f"what is to be scored has {count} tokens with all before it; {what} of {self.name} holds {longest}. "
                "Shorten it, or load the model with a larger `context` or `kv_bytes`."
            )
        bad = next((t for option in options for t in option if not 0 <= t < self.vocab.size), None)
        if bad is not None:  # those beyond are rows of the model's table that pad it
            raise ValueError(f"{bad} is to be scored, which is no token of {self.name} (0 to {self.vocab.size - 1})")
        asked = Options(options)
        branches = asked.branches()
        trunk, *others = [self.generate(branch.request(ids, namespace)) for branch in branches]
        ends = await finishes([trunk]) + await finishes(others)
        for branch, end in zip(branches, ends, strict=True):
            branch.take(end.logprobs)
        return Continuations(asked.logprobs(), sum((end.usage for end in ends), Usage()))

    def start(self, generation: Generation) -> None:
        """Submit a generation; called by its ``async with``."""
        request = generation.request
        grammar = self.compiler.submit(request.grammar) if request.grammar is not None else None
        if grammar is not None:
            grammar.add_done_callback(lambda _: self._command(lambda: None))

        def submit() -> None:
            try:
                sequence = self._scheduler.submit(generation.rid, request.ids, request.namespace, request.targets)
            except AgentError as error:
                generation.push(error)
                return
            room = self.sizes.context - len(request.ids)
            self._live[generation.rid] = Live(generation, sequence, self.vocab, grammar, room)

        self._command(submit)

    def bell(self, loop: object) -> Bell:
        """What wakes the readers on an event loop; called on that loop."""
        with self._wake:
            return self._bells.setdefault(loop, Bell(loop))

    def abort(self, rid: int) -> None:
        """End a request and release its pages; one that is unknown or has ended is ignored."""
        with contextlib.suppress(EngineError):  # a closed engine has released everything
            self._command(lambda: self._drop(rid))

    def fork(self, generation: Generation, *, seed: int | None = None) -> Generation:
        """A second continuation of a running generation from where it stands, sharing every full page.

        Args:
            generation: the parent; it must have been started.
            seed: of the child, the parent's by default.

        Returns:
            A generation that runs already; enter it to read it. The parent's ids of this moment are its prompt.
        """
        sampling = generation.request.sampling
        if seed is not None:
            sampling = replace(sampling, seed=seed)

        def split() -> Generation:
            parent = self._live.get(generation.rid)
            if parent is None:
                raise EngineError("the generation has ended: continue it with a new request")
            child = parent.fork(self, next(self._rids), sampling)
            child.sequence = self._scheduler.fork(generation.rid, child.generation.rid)
            self._live[child.generation.rid] = child
            child.generation.started = True
            return child.generation

        return self._ask(split)

    def hasten(self, generation: Generation) -> None:
        """Bring a generation to its end: constrained output by its shortest completion, text where it stands."""

        def run() -> None:
            live = self._live.get(generation.rid)
            if live is not None:
                live.hastened = True

        with contextlib.suppress(EngineError):  # a closed engine has ended it already
            self._command(run)

    def preempt(self, rid: int) -> None:
        """Take a running request's pages back; it continues later and loses nothing it has emitted."""
        self._command(lambda: self._scheduler.preempt(rid) if rid in self._live else None)

    def pin(self, ids: Sequence[int], *, namespace: str = "") -> Pin:
        """Evict what is now cached of ``ids``, their partly filled last page included, only when nothing else is left.

        A hint, not a reservation: nobody ever waits or fails because of a pin. Pins count by reference, so pages that
        several of them hold are pinned until the last is closed.

        Args:
            ids: of a conversation, such as one that waits for its tools.
            namespace: as of a `Request`.

        Returns:
            To be closed, as by ``with engine.pin(ids): ...``.
        """
        return Pin(self._tree, self._command, ids, namespace)

    def cached(self, ids: Sequence[int], *, namespace: str = "") -> int:
        """How many of ``ids``, from the first one on, are cached now."""
        return self._ask(lambda: self._tree.look(namespace, ids).reach)

    def exporter(self, ids: Sequence[int], *, namespace: str = "") -> Export:
        """Read the KV that is cached of ``ids``; for a model that has `Runner.memory`."""
        return Export(self._ask, self._tree, self._kv(), ids, namespace)

    def importer(self, ids: Sequence[int], *, namespace: str = "") -> Import:
        """Give the engine KV of ``ids``; for a model that has `Runner.memory`."""
        return Import(self._ask, self._tree, self._kv(), ids, namespace)

    def _kv(self) -> PagedKV:
        if self.runner.memory is None:
            raise EngineError(f"{self.name} has no KV to read or write")
        return self.runner.memory

    def stats(self) -> Stats:
        """Read by the engine's thread between two steps."""
        return self._ask(self._stats)

    def check(self) -> None:
        """Assert every invariant of pages, tree and plan (design §3.6); for tests."""
        self._ask(self._scheduler.check)

    def close(self) -> None:
        """Abort everything and stop the threads."""
        atexit.unregister(self.close)
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._masks.shutdown()
        self.compiler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: Callable[[], T]) -> T:
        """Run something on the engine's thread and wait for its result."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)

        self._command(run)
        return answer.result()

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._closed or not self._thread.is_alive():
                raise EngineError(f"the engine of {self.name} is closed: make a new one")
            self._commands.append(command)
            self._wake.notify()

    # The engine's thread.

    @torch.inference_mode()
    def _loop(self) -> None:
        try:
            while self._wait():
                while self._commands:
                    self._commands.popleft()()
                self._step()
            self._end(EngineError(f"the engine of {self.name} was closed while this ran"))
        except BaseException as cause:
            self._end(EngineError(f"the engine of {self.name} has died, make a new one: {cause!r}"), cause)
            raise

    def _end(self, error: EngineError, cause: BaseException | None = None) -> None:
        """Tell every caller that nothing more will come."""
        error.__cause__ = cause
        with self._wake:
            self._closed = True
        while self._commands:  # submitted too late to run: their callers must hear of it as well
            self._commands.popleft()()
        for live in list(self._live.values()):
            live.generation.push(error)

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the engine closes."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._commands or any(x.runnable for x in self._live.values()))
            return not self._closed

    def _step(self) -> None:
        """Plan, run, sample. An error here ends the requests that were in the step, not the engine."""
        self._emit_parked()
        if not any(live.parked is None for live in self._live.values()):
            return
        plan = self._scheduler.plan(self._drafts())
        for rid, error in plan.failed:
            self._live.pop(rid).generation.push(error)
        if not plan.entries:
            self._scheduler.complete(plan)
            return
        taking: list[Live] = []
        for entry in plan.entries:
            if entry.sample:
                taking.append(self._live[entry.seq.rid])
                taking[-1].verify(entry.draft)
        try:
            masks = self._masks.submit(self._fill, taking)
            output = self.runner.step(plan)
            mask = masks.result()
            scores = cast("list[float]", output.scores.tolist())  # pyright: ignore[reportUnknownMemberType]
        except Exception as error:
            self._fail(plan, error)
            return
        self._steps += 1
        self._computed += sum(entry.rows for entry in plan.entries)
        for at, entry in enumerate(plan.entries):
            if entry.draft:  # cut where its masks could not be filled: what stands there then is not verified
                plan.entries[at] = replace(entry, draft=self._live[entry.seq.rid].draft)
        outcomes = self._answer(plan, scores) + self._take(taking, output.logits, mask)
        self._scheduler.complete(plan)  # it counts the drafted ids that the sequences have gone on with
        self._hand_out(outcomes)

    def _drafts(self) -> dict[int, list[int]]:
        """What may follow the sequences that decode, by rid."""
        if not self.sizes.drafts:
            return {}
        decoding = [
            live
            for live in self._live.values()
            if live.parked is None
            and live.sequence.state is State.RUNNING
            and live.sequence.decodes
            and live.sequence.targets is None
        ]
        if len(decoding) > _FEW:
            return {}
        return {live.generation.rid: live.propose(self.sizes.drafts) for live in decoding}

    def _fill(self, taking: list[Live]) -> Tensor:
        """Mask rows of the sequences that will sample, filled while the forward pass runs."""
        mask = self._static.repeat(sum(live.rows for live in taking), 1)
        for live, rows in zip(taking, _split(mask, taking), strict=True):
            try:
                live.fill(rows)
            except AgentError as error:  # one request's grammar must not end the step of the others
                live.refused = error
        return mask

    def _take(self, taking: list[Live], logits: Tensor, mask: Tensor) -> list[Outcome]:
        """Go on with the sequences of a step; the logits of those whose grammar is being compiled are kept."""
        lives: list[Live] = []
        chosen: list[int] = []
        at = 0
        for live in taking:
            if not live.ready or live.unmasked:  # compiled by now perhaps, but not when its mask was filled
                live.parked = logits[at].clone()
            else:
                lives.append(live)
                chosen.extend(range(at, at + live.rows))
            at += live.rows
        if len(lives) < len(taking):
            logits, mask = logits[chosen], mask[chosen]
        return self._emit(lives, logits, mask) if lives else []

    def _answer(self, plan: Plan, scores: list[float]) -> list[Outcome]:
        """Keep the log-probabilities of a step; the requests that have got all of theirs, or cannot."""
        outcomes: list[Outcome] = []
        for entry in plan.entries:
            if not entry.scored:
                continue
            live = self._live[entry.seq.rid]
            count = sum(map(len, entry.targets))
            found, scores = scores[:count], scores[count:]
            live.logprobs += found
            if any(map(math.isnan, found)):
                outcomes.append((live, [], EngineError("scoring failed: the logits are not numbers")))
            elif entry.start + entry.n == len(entry.seq.ids):
                live.ended = "stop"
                outcomes.append((live, [], None))
        return outcomes

    def _emit_parked(self) -> None:
        """Go on with the sequences whose grammar has been compiled meanwhile."""
        parked = [(live, live.parked) for live in self._live.values() if live.parked is not None and live.ready]
        if parked:
            lives = [live for live, _ in parked]
            self._hand_out(self._emit(lives, torch.stack([logits for _, logits in parked]), self._fill(lives)))

    def _emit(self, lives: list[Live], logits: Tensor, mask: Tensor) -> list[Outcome]:
        """Turn logits into ids and append them to the sequences."""
        counts = [live.rows for live in lives]
        raw = [live.penalize(rows) for live, rows in zip(lives, _split(logits, lives), strict=True)]
        samplings = [live.generation.request.sampling for live in lives for _ in range(live.rows)]
        places = [len(live.sequence.ids) + i for live in lives for i in range(live.rows)]
        rows = Rows.of([s.filter for s in samplings], [s.seed for s in samplings], places, logits.device)
        sampled = sample(logits, mask.to(logits.device), rows)
        tokens = iter(cast("list[int]", sampled.ids.tolist()))  # pyright: ignore[reportUnknownMemberType]
        return [
            self._advance(live, list(islice(tokens, count)), rows)
            for live, count, rows in zip(lives, counts, raw, strict=True)
        ]

    def _advance(self, live: Live, tokens: list[int], raw: Tensor) -> Outcome:
        live.parked = None
        chunks: list[Chunk] = []
        error: AgentError | None = live.refused
        if error is None:
            try:
                for chunk in live.advance(tokens, raw):
                    self._scheduler.append(live.generation.rid, chunk.ids)
                    chunks.append(chunk)
            except AgentError as refusal:
                error = refusal
            except Exception as failure:
                error = EngineError(f"sampling failed: {failure!r}")
        return live, chunks, error

    def _hand_out(self, outcomes: list[Outcome]) -> None:
        """Tell the callers, and end the requests whose outputs say so."""
        for live, chunks, error in outcomes:
            rid = live.generation.rid
            for chunk in chunks:
                if chunk.ids:  # none where the budget ends with an output that is complete as it stands
                    live.generation.push(chunk)
            if error is not None:
                live.generation.push(error)
                self._drop(rid)
            elif live.ended is not None:
                self._live.pop(rid)
                self._scheduler.finish(rid)
                live.generation.push(Finish(live.ended, live.usage(), tuple(live.logprobs)))

    def _fail(self, plan: Plan, cause: Exception) -> None:
        """The step did not run: nothing of it may be published, and its requests end with the cause."""
        for entry in plan.entries:
            live = self._live.pop(entry.seq.rid, None)
            if live is not None:
                error = EngineError(f"the model failed on this step: {cause!r}. Other requests go on.")
                error.__cause__ = cause
                live.generation.push(error)
        self._scheduler.cancel(plan)

    def _drop(self, rid: int) -> None:
        if self._live.pop(rid, None) is not None:
            self._scheduler.abort(rid)

    def _stats(self) -> Stats:
        s = self._scheduler.stats()
        pool = self._pool
        return Stats(s.running, s.waiting, pool.free, pool.tree, pool.private, s.host, self._steps, self._computed)


def _split(rows: Tensor, lives: Sequence[Live]) -> Sequence[Tensor]:
    """The rows of each request."""
    return cast("Sequence[Tensor]", rows.split([live.rows for live in lives]))  # pyright: ignore[reportUnknownMemberType]
