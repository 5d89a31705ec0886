"""Worker processes under a time-out and a memory limit, so that no schema can hang or end the bench."""

from __future__ import annotations

import json
import multiprocessing
import resource
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar, cast

from bench.backends import BACKENDS
from bench.instances import Outcome, examine

MEMORY = 8 << 30  # bytes of address space of a worker
_START = 120.0  # seconds for a worker to load its vocabulary
Answer = TypeVar("Answer")
_CONTEXT = multiprocessing.get_context("spawn")


def run(
    backend: str, cases: list[tuple[str, str]], jobs: int, patience: float, budget: float | None = None
) -> list[Outcome]:
    """What `backend` makes of `cases`, (class, line), in their order.

    Args:
        backend: a name in `BACKENDS`.
        jobs: workers.
        patience: seconds for a case, after which its worker is killed and the case counts as timed out.
        budget: seconds for all of them, after which no further case is begun; those left over are left out.
    """
    left = deque(enumerate(cases))
    done: dict[int, Outcome] = {}
    threads = [threading.Thread(target=_drive, args=(backend, left, done, patience, budget)) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [done[i] for i in sorted(done)]


def _drive(
    backend: str,
    left: deque[tuple[int, tuple[str, str]]],
    done: dict[int, Outcome],
    patience: float,
    budget: float | None,
) -> None:
    worker = Worker(backend)
    begin = time.monotonic()
    while left and (budget is None or time.monotonic() - begin < budget):
        try:
            i, (group, line) = left.popleft()
        except IndexError:  # another thread was faster
            break
        try:
            done[i] = worker.ask(patience, examine, group, line)
        except Lost as lost:
            done[i] = Outcome(group, json.loads(line)["id"], "lost", str(lost))
            worker.kill()
            worker = Worker(backend)
    worker.kill()


class Lost(Exception):
    """A worker did not answer in time, or ended."""


class Worker:
    """One process with one backend. Raises `Lost` if it does not come up."""

    def __init__(self, backend: str) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(backend, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._receive(_START)

    def ask(self, patience: float, function: Callable[..., Answer], *args: Any) -> Answer:
        """What `function`, of a module, says over there about its backend and `args`.

        Raises:
            Lost: it said nothing for `patience` seconds, its process ended, or it raised.
        """
        self._connection.send((function, args))
        answer = self._receive(patience)
        if isinstance(answer, Lost):
            raise answer
        return cast("Answer", answer)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self, patience: float) -> object:
        if not self._connection.poll(patience):
            raise Lost(f"time-out after {patience:.0f} s")
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join(5)
            raise Lost(f"its process ended with {self._process.exitcode}") from None


def _serve(name: str, connection: Connection) -> None:
    backend = BACKENDS[name]()
    limit = min(MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1] % (1 << 63))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send("ready")
    while True:
        function, args = connection.recv()
        try:
            connection.send(function(backend, *args))
        except Exception as error:  # of a library, or of this bench
            connection.send(Lost(repr(error)))
