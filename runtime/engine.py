"""The engine: one thread that plans, runs and samples steps, behind an asynchronous face of token ids."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from agentkit.runtime.errors import AgentError, CapacityError, EngineError
from agentkit.runtime.generation import Bell, Generation
from agentkit.runtime.grammar import GrammarCompiler
from agentkit.runtime.host import HostPool
from agentkit.runtime.kv import PagedKV
from agentkit.runtime.live import Live
from agentkit.runtime.pages import Corruption, PagePool
from agentkit.runtime.pins import Pin
from agentkit.runtime.plan import Scheduler
from agentkit.runtime.radix import PrefixTree
from agentkit.runtime.request import Chunk, Finish, Request, Usage
from agentkit.runtime.runner import Runner
from agentkit.runtime.sampler import Sampler
from agentkit.runtime.score import Continuations, Options, Scored, finishes
from agentkit.runtime.sequence import DENSE, SPARSE, Plan, State
from agentkit.runtime.stats import Stats, Watchdog
from agentkit.runtime.transfer import Export, Import
from agentkit.runtime.vocab import Vocabulary

T = TypeVar("T")

#: Up to this many decoding sequences have drafts: with more, a step has many rows as it is, and each costs.
_FEW = 4

#: What a step has brought a request: chunks its caller may see, None where it has read a part of the prompt; and the
#: error that ends it, if one does.
Outcome = tuple[Live, list[Chunk] | None, AgentError | None]


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
        sparse: prefill is sparse for requests that do not ask for dense attention.
        host_pages: pages in the host's memory for those that are evicted from the pool; 0 forgets them.
    """

    context: int
    pages: int
    page_size: int = 16
    step_tokens: int = 512
    running: int = 64
    drafts: int = 0
    sparse: bool = False
    host_pages: int = 0


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
        self._tree = PrefixTree(PagePool(sizes.pages), sizes.page_size, HostPool(sizes.host_pages))
        self._scheduler = self._scheduling()
        self._sampler = Sampler(vocab, runner.vocab_size)
        self._live: dict[int, Live] = {}
        self._untold: deque[Outcome] = deque()  # what the callers have not heard yet
        self._rids = itertools.count(1)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._bells: WeakValueDictionary[object, Bell] = WeakValueDictionary()
        self._closed = False
        self._stalled = False  # nothing can be planned until something happens outside
        self._steps = self._computed = self._ended = 0
        self._seconds = 0.0
        self._usage = Usage()  # of the requests that have ended
        # What the whole pool holds is computed again in so many steps; four times that is no longer a coincidence.
        self._patience = 4 * (sizes.pages * sizes.page_size // sizes.step_tokens + sizes.running + 8)
        self._watchdog = Watchdog(self._patience)
        self._thread = threading.Thread(target=self._loop, name="agentkit-engine", daemon=True)
        self._thread.start()
        # Python ends threads that come back from native code after it has begun to exit, which C++ answers by
        # aborting the process. So the thread ends first, whoever has forgotten to close the engine.
        atexit.register(self.close)

    def _scheduling(self) -> Scheduler:
        """A scheduler with nothing to do."""
        s = self.sizes
        return Scheduler(self._tree.pool, self._tree, s.page_size, s.step_tokens, s.running, s.context)

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
        if request.attention == "sparse" and not self.sizes.sparse:
            raise ValueError(f"{self.name} has no sparse attention: load it with Options(attention='sparse')")
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
        namespace = self._space(request.namespace, request.attention)
        grammar = self.compiler.submit(request.grammar) if request.grammar is not None else None
        if grammar is not None:
            grammar.add_done_callback(lambda _: self._command(lambda: None))

        def submit() -> None:
            try:
                sequence = self._scheduler.submit(generation.rid, request.ids, namespace, request.targets)
                room = self.sizes.context - len(request.ids)
                self._live[generation.rid] = Live(generation, sequence, self.vocab, grammar, room)
            except Exception as error:
                generation.push(error)

        self._command(submit)

    def _space(self, namespace: str, attention: Literal["dense", "sparse"] | None = None) -> str:
        """The namespace in the prefix tree, where KV of sparse attention has one of its own."""
        return (SPARSE if self.sizes.sparse and attention != "dense" else DENSE) + namespace

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
            A generation that runs already; enter it to read it. The parent's ids of this moment are its prompt, but for
            those of a document that is held back until it is valid: they are the child's output as well.
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
        return Pin(self._tree, self._command, ids, self._space(namespace))

    def cached(self, ids: Sequence[int], *, namespace: str = "") -> int:
        """How many of ``ids``, from the first one on, are cached now."""
        return self._ask(lambda: self._tree.look(self._space(namespace), ids).reach)

    def exporter(self, ids: Sequence[int], *, namespace: str = "") -> Export:
        """Read the KV that is cached of ``ids``; for a model that has `Runner.memory`."""
        return Export(self._ask, self._tree, self._kv(), ids, self._space(namespace))

    def importer(self, ids: Sequence[int], *, namespace: str = "") -> Import:
        """Give the engine KV of ``ids``; for a model that has `Runner.memory`."""
        return Import(self._ask, self._tree, self._kv(), ids, self._space(namespace))

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
        self._sampler.close()
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
            if self._closed:
                raise EngineError(f"the engine of {self.name} is closed: make a new one")
            self._commands.append(command)
            self._wake.notify()

    # The engine's thread.

    @torch.inference_mode()
    def _loop(self) -> None:
        while True:
            try:
                while self._wait():
                    self._obey()
                    self._step()
                break
            except BaseException as cause:  # a bug; whatever state it has left is given up
                self._begin_anew(cause)
        self._obey()  # what was submitted too late to run: its callers must hear of it as well
        self._tell(EngineError(f"the engine of {self.name} was closed while this ran"))

    def _obey(self) -> None:
        """Run what the callers have commanded, each command once they know all that came before it."""
        while self._commands:
            self._deliver()
            self._commands.popleft()()
            self._stalled = False

    def _begin_anew(self, cause: BaseException) -> None:
        """Go on with nothing running and nothing cached."""
        error = EngineError(f"the engine of {self.name} has failed and lost what ran. Send it again. {cause!r}")
        error.__cause__ = cause
        self._tree.clear()
        self._scheduler, self._watchdog, self._stalled = self._scheduling(), Watchdog(self._patience), False
        self._tell(error)

    def _tell(self, error: EngineError) -> None:
        """Tell every caller that nothing more will come."""
        self._deliver()
        for rid in list(self._live):
            live = self._forget(rid)
            if live is not None:
                live.generation.push(error)

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the engine closes."""
        if not self._may_step:  # no step follows that it could be told beside
            self._deliver()
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._commands or self._may_step)
            return not self._closed

    @property
    def _may_step(self) -> bool:
        return not self._stalled and any(live.runnable for live in self._live.values())

    def _step(self) -> None:
        """Plan, run, sample. An error here ends the requests that were in the step, not the engine."""
        self._emit_parked()
        if not any(live.parked is None for live in self._live.values()):
            return
        begin = time.perf_counter()
        plan = self._scheduler.plan(self._drafts())
        for rid, error in plan.failed:
            if (live := self._forget(rid)) is not None:
                self._news([(live, [], error)])
        if not plan.entries:
            self._scheduler.complete(plan)
            self._stalled = not plan.failed
            if self._stalled and all(live.parked is None for live in self._live.values()):
                raise Corruption(f"there is work, and none of it can be done: {self._scheduler.dump()}")
            return
        taking: list[Live] = []
        for entry in plan.entries:
            if entry.sample:
                live = self._live[entry.seq.rid]
                taking.append(live)
                if entry.draft:
                    live.verify(entry.draft)
        try:
            filling = self._sampler.begin(taking)
            output = self.runner.step(plan)
            self._deliver()  # what the last step has brought, while a device computes this one
            masks = filling.result() if filling is not None else None
            scores = cast("list[float]", output.scores.tolist())  # pyright: ignore[reportUnknownMemberType]
        except Exception as error:
            self._fail(plan, error)
            return
        self._computed += sum(entry.seq.in_flight for entry in plan.entries)
        new = any(entry.start + entry.n > entry.seq.reached for entry in plan.entries)
        for at, entry in enumerate(plan.entries):
            if entry.draft:  # cut where its masks could not be filled: what stands there then is not verified
                plan.entries[at] = entry._replace(draft=self._live[entry.seq.rid].draft)
        others = len(taking) < len(plan.entries)  # those that are only asked about, or read a long prompt
        outcomes = self._take(taking, output.logits, masks)
        if others:
            outcomes += self._answer(plan, scores)
        self._scheduler.complete(plan)  # it counts the drafted ids that the sequences have gone on with
        self._hand_out(outcomes)
        if others:
            self._news(self._readers(plan))
        self._steps += 1
        self._seconds += time.perf_counter() - begin
        self._watchdog.step(new, self._scheduler.dump)

    def _readers(self, plan: Plan) -> list[Outcome]:
        """The requests whose prompts this step has not brought to their end."""
        rids = [entry.seq.rid for entry in plan.entries if not entry.sample]
        return [(live, None, None) for rid in rids if (live := self._live.get(rid)) is not None]

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

    def _take(self, taking: list[Live], logits: Tensor, masks: Tensor | None) -> list[Outcome]:
        """Go on with the sequences of a step; the logits of those whose grammar is being compiled are kept."""
        if masks is None:
            return self._emit(taking, logits, None) if taking else []
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
            logits, masks = logits[chosen], masks[chosen]
        return self._emit(lives, logits, masks) if lives else []

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
            self._hand_out(self._emit(lives, torch.stack([logits for _, logits in parked]), self._sampler.fill(lives)))

    def _emit(self, lives: list[Live], logits: Tensor, masks: Tensor | None) -> list[Outcome]:
        """Turn logits into ids and append them to the sequences."""
        ends = list(itertools.accumulate(live.rows for live in lives))
        raw = [
            live.penalize(logits[end - live.rows : end]) if live.looks else None
            for live, end in zip(lives, ends, strict=True)
        ]
        tokens = self._sampler.choose(lives, logits, masks)
        return [
            self._advance(live, tokens[end - live.rows : end], rows)
            for live, end, rows in zip(lives, ends, raw, strict=True)
        ]

    def _advance(self, live: Live, tokens: list[int], raw: Tensor | None) -> Outcome:
        live.parked = None
        chunks: list[Chunk] = []
        error: AgentError | None = live.refused
        if error is None:
            try:
                live.advance(tokens, raw, chunks)
            except AgentError as refusal:
                error = refusal
            except Exception as failure:
                error = EngineError(f"sampling failed: {failure!r}")
        for chunk in chunks:
            self._scheduler.append(live.generation.rid, chunk.ids)
        return live, live.release(chunks), error

    def _hand_out(self, outcomes: list[Outcome]) -> None:
        """End the requests whose outputs say so, take back what is to be decoded again, and have the callers told."""
        for live, _, error in outcomes:
            rid = live.generation.rid
            if error is not None:
                self._drop(rid)
            elif live.ended is not None:
                self._forget(rid)
                self._scheduler.finish(rid)
            elif live.rewound is not None:
                self._scheduler.rewind(rid, live.rewound)
                live.rewound = None
        self._news(outcomes)

    def _news(self, outcomes: list[Outcome]) -> None:
        """Tell the callers: now, or where a device computes by itself, once it has the next step to do so."""
        self._untold += outcomes
        if not self.runner.asynchronous:
            self._deliver()

    def _deliver(self) -> None:
        """Tell the callers what they have not heard yet."""
        while self._untold:
            live, chunks, error = self._untold.popleft()
            for chunk in chunks or ():
                if chunk.ids:  # none where the budget ends with an output that is complete as it stands
                    live.generation.push(chunk)
            if error is not None:
                live.generation.push(error)
            elif live.ended is not None:
                live.generation.push(Finish(live.ended, live.usage(), tuple(live.logprobs)))
            elif chunks is None:
                live.report()

    def _fail(self, plan: Plan, cause: Exception) -> None:
        """The step did not run: nothing of it may be published, and its requests end with the cause."""
        self._deliver()
        for entry in plan.entries:
            live = self._forget(entry.seq.rid)
            if live is not None:
                error = EngineError(f"the model failed on this step: {cause!r}. Other requests go on.")
                error.__cause__ = cause
                live.generation.push(error)
        self._scheduler.cancel(plan)

    def _drop(self, rid: int) -> None:
        if self._forget(rid) is not None:
            self._scheduler.abort(rid)

    def _forget(self, rid: int) -> Live | None:
        """A request is over: nothing more comes to it."""
        live = self._live.pop(rid, None)
        if live is not None:
            self._ended += 1
            self._usage += live.usage()
        return live

    def _stats(self) -> Stats:
        s = self._scheduler.stats()
        return Stats(
            running=s.running,
            waiting=s.waiting,
            pages_free=s.free,
            pages_cached=s.tree,
            pages_private=s.private,
            pages_host=s.host,
            steps=self._steps,
            seconds=self._seconds,
            computed=self._computed,
            requests=self._ended,
            usage=sum((live.usage() for live in self._live.values()), self._usage),
        )
