"""The command line. Nothing heavy is imported before a command needs it: ``agentkit --help`` stays quick."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence

from agentkit.cli import chat, doctor, extract, models, run
from agentkit.cli.terminal import printable
from agentkit.runtime.errors import AgentError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name; None takes them from the command line.

    Returns:
        The exit code: 0 done, 1 an error that is told on standard error, 2 bad usage, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parser().parse_args(argv)
        code = args.command(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # how argparse ends after --help (0) and bad usage (2)
        return int(stop.code or 0)
    except AgentError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in `agentkit run … | head`; Python would flush, and fail, once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``command``, a function of the parsed arguments."""
    top = argparse.ArgumentParser("agentkit", description="Agents whose model runs in this process.")
    top.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    run.configure(commands.add_parser("run", help="run one task and show what happens"))
    chat.configure(commands.add_parser("chat", help="talk to a model, with or without tools"))
    extract.configure(commands.add_parser("extract", help="read records out of files, as JSON lines"))
    models.configure(commands.add_parser("models", help="get, list and check models"))
    doctor.configure(commands.add_parser("doctor", help="check this installation and say what to do"))
    return top


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"agentkit {importlib.metadata.version('agentkit-local')}")
        parser.exit()
