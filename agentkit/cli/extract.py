"""``agentkit extract``: one record out of each file, all files as one batch, as JSON lines."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentkit.cli import run, source
from agentkit.cli.ledger import Ledger, digest
from agentkit.cli.terminal import json_line, printable
from agentkit.runtime.errors import AgentError

if TYPE_CHECKING:
    from agentkit.extractor import Extracted, Extractor
    from agentkit.runtime.engine import Engine
    from agentkit.runtime.schema.report import SchemaReport

_DESCRIPTION = """Read one record out of each file. Prints one line for each file, in order:
{"file": ..., "data": ..., "evidence": ...} or {"file": ..., "error": ...}. The exit code is 1 if any file failed.
With -o the lines go to a file, from which a later call of the same command goes on: it skips files that have a record
there of the same text, schema, instructions and model."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``agentkit extract``."""
    parser.description = _DESCRIPTION
    parser.add_argument("schema", metavar="SCHEMA", help="a .json file with a JSON schema, or a type: MODULE:NAME")
    parser.add_argument("files", metavar="FILE", nargs="*", help="a text file in UTF-8; - for standard input")
    run.model_option(parser)
    parser.add_argument(
        "--instructions", metavar="TEXT", default="Extract the data from the text.", help="what to look for"
    )
    parser.add_argument("--max-tokens", metavar="N", type=run.count, default=1024, help="of one record (1024)")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, help="write the lines to this file, or go on with it")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say how each keyword of the schema is enforced and read nothing; 1 if it cannot be used",
    )
    parser.set_defaults(command=partial(command, parser))


def command(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Extract from every file; 1 if any failed."""
    if not args.files and not args.explain:
        parser.error("name a FILE to read, or ask for --explain")
    output = source.output_type(args.schema)
    if args.explain:
        return _explain(output)
    import anyio

    from agentkit.extractor import Extractor
    from agentkit.loading import load

    files = list(dict.fromkeys(args.files))
    extractor = Extractor(output, instructions=args.instructions, max_tokens=args.max_tokens)
    if args.out is None:
        with load(args.model) as engine:
            bar = sys.stderr.isatty() and not sys.stdout.isatty()  # where lines come, a bar would be torn
            batch = _Batch(files, extractor, engine, _in_order(files), bar=bar)
            anyio.run(batch.run)
    else:
        with Ledger(args.out, files) as ledger, load(args.model) as engine:
            # What else the records depend on; of a type its schema, as code has no digest.
            made = digest(extractor.spec, args.instructions, str(args.max_tokens), engine.runner.digest)
            key = partial(_key, ledger, made)
            batch = _Batch(files, extractor, engine, ledger.add, key, bar=sys.stderr.isatty())
            anyio.run(batch.run)
    if batch.skipped:
        print(f"{batch.skipped} of {len(files)} files had been read before", file=sys.stderr)
    return 1 if batch.failed else 0


def _explain(output: object) -> int:
    """Print the report on a type's schema; 1 if it is refused."""
    from agentkit.output import constraint
    from agentkit.runtime.grammar import JsonSpec
    from agentkit.runtime.schema.front import report_on

    spec = constraint(output).spec
    if not isinstance(spec, JsonSpec):
        print("exact: the type is no JSON schema, and its grammar allows just what it says")
        return 0
    report = report_on(spec.schema)
    _show(report)
    return 1 if report.status == "refused" else 0


def _show(report: SchemaReport) -> None:
    rows = [(f.status, f.pointer or "/", f.keyword or "-", f.reason) for f in report.findings]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print(printable("  ".join([*cells, row[3]])))
    ends = {
        "exact": "exact: the grammar enforces all of it" + (" but what is noted above" if rows else ""),
        "verified": "verified: the grammar allows more than the schema; each document is validated, and what fails "
        "is decoded again",
        "refused": "refused: nothing can be decoded with this schema",
    }
    print(ends[report.status])


def _key(ledger: Ledger, made: str, file: str, text: str) -> str | None:
    """The key of a file's line; None if the ledger has its record."""
    key = digest(made, text)
    return None if ledger.has(file, key) else key


def _in_order(files: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """A function that prints each line when those of all files before it have been printed."""
    lines: dict[str, dict[str, Any]] = {}
    left = deque(files)

    def add(line: dict[str, Any]) -> None:
        lines[line["file"]] = line
        while left and left[0] in lines:
            json_line(lines.pop(left.popleft()))

    return add


@dataclass(slots=True)
class _Batch:
    """Files on one engine, which reads them together.

    Attributes:
        files: each once.
        extractor: reads them.
        engine: with it.
        add: takes each line as it is made.
        key: of a file and its text what its line shall have as ``key``; None if the file shall be skipped.
        bar: show a progress bar on standard error.
    """

    files: list[str]
    extractor: Extractor[Any]
    engine: Engine
    add: Callable[[dict[str, Any]], None]
    key: Callable[[str, str], str | None] | None = None
    bar: bool = False
    failed: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)

    async def run(self) -> None:
        """Give a line for every file that is not skipped.

        Raises:
            AgentError: none can be read: the schema is at fault, or the instructions are too long.
        """
        from tqdm import tqdm

        from agentkit.gather import gather

        await self.extractor.load(self.engine)
        with tqdm(total=len(self.files), unit="file", disable=not self.bar) as bar:

            async def one(file: str) -> None:
                line = await self._line(file)
                if line is not None:
                    self.failed += "error" in line
                    self.add(line)
                bar.update()

            await gather(one, self.files, self.extractor.most)

    async def _line(self, file: str) -> dict[str, Any] | None:
        line: dict[str, Any] = {"file": file}
        try:
            text = source.read_text(file)
            if self.key is not None:
                key = self.key(file, text)
                if key is None:
                    self.skipped += 1
                    return None
                line["key"] = key
            return line | _record(await self.extractor.read(text))
        except AgentError as error:
            return line | {"error": str(error)}
        except Exception as error:  # a validator's own
            return line | {"error": f"{type(error).__name__}: {error}"}


def _record(record: Extracted[Any]) -> dict[str, Any]:
    from pydantic_core import to_jsonable_python

    line: dict[str, Any] = {
        "data": to_jsonable_python(record.output),
        "evidence": {pointer: asdict(evidence) for pointer, evidence in record.evidence.items()},
    }
    if len(record.parts) > 1:
        line["parts"] = [asdict(part) for part in record.parts]
    return line
