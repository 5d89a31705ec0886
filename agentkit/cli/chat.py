"""``agentkit chat``: a conversation that keeps its session, and with it the KV pages of all that was said."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
from typing import TYPE_CHECKING, Any, TextIO

from agentkit.cli import run
from agentkit.cli.terminal import RED
from agentkit.runtime.errors import AgentError

if TYPE_CHECKING:
    from agentkit.agent import Agent
    from agentkit.result import Session
    from agentkit.runtime.request import Usage

_HELP = "/new starts over, /usage counts tokens, Ctrl-C stops an answer, Ctrl-D leaves"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``agentkit chat``."""
    parser.description = f"Talk to a model, one message a line. {_HELP}."
    run.agent_options(parser)
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    """Read messages from standard input until it ends."""
    from agentkit.loading import load
    from agentkit.runtime.request import Usage

    agent = run.make_agent(args)
    stream: TextIO = sys.stdin
    if stream.isatty():
        with contextlib.suppress(ImportError):  # Windows has none; lines can then not be edited
            import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
    elif isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    with load(args.model) as engine:
        if stream.isatty():
            print(f"{engine.name}: {_HELP}", file=sys.stderr)
        Chat(dataclasses.replace(agent, model=engine), Usage()).talk()
    return 0


@dataclasses.dataclass(slots=True)
class Chat:
    """A conversation.

    Attributes:
        agent: who answers.
        usage: tokens of all answers since the conversation began.
        session: where the next message goes on; None before the first answer.
    """

    agent: Agent[Any]
    usage: Usage
    session: Session | None = None

    def talk(self) -> None:
        """Take messages until the input ends."""
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                return
            except KeyboardInterrupt:  # drops the line that was being written
                print(file=sys.stderr)
                continue
            self._take(line)

    def _take(self, line: str) -> None:
        from agentkit.cli.show import tokens
        from agentkit.runtime.request import Usage

        if line == "/new":
            self.session, self.usage = None, Usage()
        elif line == "/usage":
            print(tokens(self.usage), file=sys.stderr)
        elif line:
            self._answer(line)

    def _answer(self, message: str) -> None:
        """Answer a message. One that fails or is cancelled leaves the session as it was."""
        import anyio

        from agentkit.cli.show import Printer

        printer = Printer()
        try:
            result = anyio.run(run.watch, self.agent, message, self.session, printer)
        except KeyboardInterrupt:
            printer.note("cancelled", RED)
        except AgentError as error:
            printer.note(f"error: {error}", RED)
        else:
            self.session, self.usage = result.session, self.usage + result.usage
