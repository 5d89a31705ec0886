"""``agentkit extract``: one record out of each file, all files as one batch, as JSON lines in their order."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentkit.cli import run, source
from agentkit.cli.terminal import json_line
from agentkit.runtime.errors import AgentError, SchemaError

if TYPE_CHECKING:
    from agentkit.runtime.engine import Engine

_DESCRIPTION = """Read one record out of each file. Prints one line for each file, in order:
{"file": ..., "data": ...} or {"file": ..., "error": ...}. The exit code is 1 if any file failed."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``agentkit extract``."""
    parser.description = _DESCRIPTION
    parser.add_argument("schema", metavar="SCHEMA", help="a .json file with a JSON schema, or a type: MODULE:NAME")
    parser.add_argument("files", metavar="FILE", nargs="+", help="a text file in UTF-8; - for standard input")
    run.model_option(parser)
    parser.add_argument(
        "--instructions", metavar="TEXT", default="Extract the data from the text.", help="what to look for"
    )
    parser.add_argument("--max-tokens", metavar="N", type=run.count, default=1024, help="of one record (1024)")
    parser.set_defaults(command=command)


def command(args: argparse.Namespace) -> int:
    """Extract from every file; 1 if any failed."""
    output = source.output_type(args.schema)
    import anyio

    from agentkit.loading import load

    with load(args.model) as engine:
        batch = _Batch(args.files, output, engine, args.instructions, args.max_tokens)
        anyio.run(batch.run)
    return 1 if any("error" in line for line in batch.lines.values()) else 0


@dataclass(slots=True)
class _Batch:
    """Files on one engine, which decodes them together.

    Each is an extraction of its own, so that one that does not fit the context takes no other down.
    """

    files: list[str]
    output: type[object]
    engine: Engine
    instructions: str
    max_tokens: int
    lines: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    printed: int = 0
    failures: list[Exception] = field(default_factory=list[Exception])

    async def run(self) -> None:
        """Print a line for every file.

        Raises:
            SchemaError: the schema is at fault, so that no file can succeed.
        """
        import anyio

        async with anyio.create_task_group() as group:

            async def one(index: int) -> None:
                try:
                    self.lines[index] = await self._line(self.files[index])
                    self._print()
                except Exception as error:  # raised below: from in here it would come out as a group
                    self.failures.append(error)
                    group.cancel_scope.cancel()

            for index in range(len(self.files)):
                group.start_soon(one, index)
        if self.failures:
            raise self.failures[0]

    async def _line(self, file: str) -> dict[str, Any]:
        from pydantic_core import to_jsonable_python

        from agentkit.extraction import extract

        try:
            record = await extract(
                source.read_text(file),
                self.output,
                instructions=self.instructions,
                model=self.engine,
                max_tokens=self.max_tokens,
            )
        except SchemaError:
            raise
        except AgentError as error:
            return {"file": file, "error": str(error)}
        return {"file": file, "data": to_jsonable_python(record.output)}

    def _print(self) -> None:
        """Print what is ready, in the order of the files."""
        while (line := self.lines.get(self.printed)) is not None:
            json_line(line)
            self.printed += 1
