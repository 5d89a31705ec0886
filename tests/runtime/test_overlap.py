"""What callers are told while a device computes the next step: in what order, and that nothing of it is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from agentkit.runtime.engine import Engine, Sizes
from agentkit.runtime.generation import Generation
from agentkit.runtime.request import Chunk, Finish, Progress, Request
from agentkit.runtime.runner import Output
from agentkit.runtime.sequence import Plan
from agentkit.script import byte_vocabulary


class Device:
    """A model that always says the same; the log has its launches and, beside them, what callers hear.

    Attributes:
        log: what has happened on the engine's thread, in order.
        then: what the launch of a step brings about besides, by its number.
    """

    weight_bytes, memory, digest = 0, None, "device"
    vocab_size = byte_vocabulary().size

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self.log: list[str] = []
        self.then: dict[int, Callable[[], object]] = {}

    def step(self, plan: Plan) -> Output:
        self.log.append("launch")
        self.then.pop(self.log.count("launch"), lambda: None)()
        return Output(torch.zeros(sum(entry.sample for entry in plan.entries), self.vocab_size), torch.empty(0))


@contextmanager
def running(device: Device) -> Iterator[Engine]:
    with Engine(device, byte_vocabulary(), Sizes(context=256, pages=32, step_tokens=16, running=4)) as engine:
        yield engine


def start(engine: Engine, device: Device, prompt: int = 5, tokens: int = 3) -> threading.Event:
    """Run a request whose caller only keeps the log; the event is set when it has ended."""
    ended = threading.Event()
    generation = engine.generate(Request([97] * prompt, max_tokens=tokens, ignore_end=True))

    def push(item: Chunk | Finish | BaseException) -> None:
        device.log.append({Chunk: "chunk", Finish: "finish"}.get(type(item), "error"))
        if not isinstance(item, Chunk):
            ended.set()

    def report(progress: Progress) -> None:
        Generation.report(generation, progress)
        device.log.append(f"{progress.done} read")

    generation.push, generation.report = push, report
    engine.start(generation)
    return ended


def said(device: Device, prompt: int = 5) -> str:
    """The log of one request."""
    with running(device) as engine:
        assert start(engine, device, prompt).wait(10)
        engine.check()
    return " ".join(device.log)


def test_callers_hear_of_a_step_while_the_next_one_runs_and_of_the_last_one_at_once() -> None:
    assert said(Device(True)) == "launch launch chunk launch chunk chunk finish"
    assert said(Device(False)) == "launch chunk launch chunk launch chunk finish"


def test_how_far_a_prompt_has_come_is_told_likewise() -> None:
    assert said(Device(True), 40) == "launch launch 16 read launch 32 read launch chunk launch chunk chunk finish"
    assert said(Device(False), 40) == "launch 16 read launch 32 read launch chunk launch chunk launch chunk finish"


def fail() -> None:
    raise RuntimeError("out of memory")


def die() -> None:
    raise SystemExit("a bug")


@pytest.mark.parametrize("failure", [fail, die])
def test_a_step_that_fails_does_not_lose_what_the_one_before_it_has_brought(failure: Callable[[], None]) -> None:
    device = Device(True)
    device.then[2] = failure
    with running(device) as engine:
        assert start(engine, device).wait(10)
        assert device.log == ["launch", "launch", "chunk", "error"]
        assert engine.stats().pages_private == 0
        device.log.clear()
        assert start(engine, device).wait(10)
        assert device.log[-1] == "finish"
        engine.check()


def test_a_command_comes_after_what_callers_were_to_hear_before_it() -> None:
    device = Device(True)
    with running(device) as engine:
        preempt = engine._scheduler.preempt
        engine._scheduler.preempt = lambda rid: device.log.append("preempt") or preempt(rid)
        device.then[2] = partial(engine.preempt, 1)
        assert start(engine, device).wait(10)
        engine.check()
    assert " ".join(device.log) == "launch launch chunk chunk preempt launch chunk finish"


def test_a_fork_begins_with_what_its_parent_has_heard() -> None:
    device = Device(True)
    with running(device) as engine:
        generation = engine.generate(Request([97] * 5, max_tokens=3, ignore_end=True))
        heard: list[Chunk | Finish | BaseException] = []
        generation.push = heard.append
        forks: list[tuple[Generation, int]] = []
        asking = threading.Thread(target=lambda: forks.append((engine.fork(generation), len(heard))))

        def ask() -> None:
            asking.start()
            until(lambda: bool(engine._commands))

        device.then[2] = ask
        engine.start(generation)
        until(lambda: bool(forks))
        until(lambda: engine.stats().running == 0)
        engine.check()
    child, before = forks[0]
    assert len(child.request.ids) == 5 + 2
    assert before >= 2


def test_an_engine_that_closes_says_so_last() -> None:
    device = Device(True)
    with running(device) as engine:
        closing = threading.Thread(target=engine.close)

        def close() -> None:
            closing.start()
            until(lambda: engine._closed)

        device.then[2] = close
        assert start(engine, device).wait(10)
        closing.join()
    assert device.log == ["launch", "launch", "chunk", "chunk", "error"]


def test_a_request_that_ends_gives_its_pages_to_the_next_plan_before_its_caller_knows() -> None:
    """One of two must wait until the other's pages are free."""
    device = Device(True)
    sizes = Sizes(context=64, pages=3, step_tokens=64, running=4)
    with Engine(device, byte_vocabulary(), sizes) as engine:
        ends = [start(engine, device, 30), start(engine, device, 31)]
        assert all(end.wait(10) for end in ends)
        engine.check()
    assert device.log.count("finish") == 2
    first = device.log.index("finish")
    assert device.log[first - 2 : first] == ["launch", "chunk"]  # the second one's prompt runs already


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)
