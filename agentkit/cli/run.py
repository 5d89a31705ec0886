"""``agentkit run``: one task, its events as they come. Also the options that every agent command has."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agentkit.cli import source
from agentkit.limits import Limits
from agentkit.runtime.errors import AgentError

if TYPE_CHECKING:
    from agentkit.agent import Agent, AgentEvent
    from agentkit.result import RunResult, Session

_DESCRIPTION = """Run one task. The model's text goes to standard output; tool calls, their results and a
line of token counts go to standard error."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``agentkit run``."""
    parser.description = _DESCRIPTION
    parser.add_argument("task", metavar="TASK", help="what to do; - reads it from standard input")
    agent_options(parser)
    parser.add_argument("--json", action="store_true", help="print each event as one JSON object, nothing else")
    parser.set_defaults(command=command)


def agent_options(parser: argparse.ArgumentParser) -> None:
    """Add the options from which `make_agent` makes an agent."""
    model_option(parser)
    parser.add_argument(
        "--tools",
        metavar="MODULE:NAME",
        type=_named,
        nargs="+",
        action="extend",
        default=[],
        help="functions, tools or lists of them, in modules or files (tools.py:search); after TASK",
    )
    parser.add_argument(
        "--output",
        metavar="TYPE",
        help="what the answer must be: MODULE:NAME of a type, or a .json file with a JSON schema",
    )
    parser.add_argument("--instructions", metavar="TEXT", default="", help="what the model is told first")
    parser.add_argument("--steps", metavar="N", type=count, default=10, help="most turns of the model (10)")
    parser.add_argument("--tokens", metavar="N", type=count, help="most tokens the model may put out")
    parser.add_argument("--seconds", metavar="S", type=_seconds, help="most time")
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=_temperature,
        default=0.0,
        help="of sampling; 0 (the default) is greedy",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of sampling (0)")


def model_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``."""
    parser.add_argument(
        "--model",
        metavar="M",
        help="a name, a folder or a .gguf file; default: AGENTKIT_MODEL, else smollm2-135m",
    )


def command(args: argparse.Namespace) -> int:
    """Run the task of the command line."""
    task: str = source.read_text("-") if args.task == "-" else args.task
    if not task.strip():
        raise AgentError("The task is empty: write what the model shall do.")
    import anyio

    from agentkit.cli.show import Printer, print_json
    from agentkit.loading import load

    agent = make_agent(args)  # first, as loading a model takes longer than finding a mistake in tools
    with load(args.model) as engine:
        agent = dataclasses.replace(agent, model=engine)
        anyio.run(watch, agent, task, None, print_json if args.json else Printer())
    return 0


def make_agent(args: argparse.Namespace) -> Agent[Any]:
    """The agent that `agent_options` describe; its model is set by the caller.

    Raises:
        AgentError: tools or output cannot be imported, or are none.
    """
    from agentkit.agent import Agent
    from agentkit.runtime.request import Sampling

    return Agent(
        tools=[tool for name in args.tools for tool in _tools(name)],
        output=str if args.output is None else source.output_type(args.output),
        instructions=args.instructions,
        limits=Limits(steps=args.steps, tokens=args.tokens, seconds=args.seconds),
        sampling=Sampling(temperature=args.temperature, seed=args.seed),
    )


async def watch(
    agent: Agent[Any], task: str, session: Session | None, show: Callable[[AgentEvent], None]
) -> RunResult[Any]:
    """Run a task and show every event."""
    async with agent.stream(task, session=session) as run:
        async for event in run:
            show(event)
    return run.result


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _tools(name: str) -> list[Any]:
    found = source.python_object(name)
    return list(found) if isinstance(found, list | tuple) else [found]  # pyright: ignore[reportUnknownArgumentType]


def _named(text: str) -> str:
    module, _, name = text.rpartition(":")
    if not module or not name or any(character.isspace() for character in name):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:NAME (a task goes before --tools)")
    return text


def _seconds(text: str) -> float:
    if not 0 < (number := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def _temperature(text: str) -> float:
    if not 0 <= (number := _number(text)) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature between 0 and 100")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
