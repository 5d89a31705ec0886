"""The command line: what it refuses without a model, and what it prints with SmolLM2-135M."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentkit import loading, models
from agentkit.cli import doctor, main, source
from agentkit.cli.show import Printer, event_json, summary
from agentkit.cli.terminal import json_line, paint, printable
from agentkit.loop import Finished, PrefillProgress, ToolFinished, TurnFinished
from agentkit.result import CallRecord, RunResult
from agentkit.runtime.engine import Engine
from agentkit.runtime.errors import AgentError, SchemaError
from agentkit.runtime.load import Options, load_engine
from agentkit.runtime.request import Usage
from agentkit.turn import CallReady, TextDelta
from tests.smol import smol_path

TOKENS = re.compile(
    r"tokens: \d+ prefilled, \d+ cached, \d+ decoded, \d+ forced"
    r"( · \d+ tok/s)? · \d+\.\d s( · stopped by \w+)?"
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "paid": {"type": "boolean"}},
    "required": ["name", "paid"],
    "additionalProperties": False,
}
PYTHON = '''
from typing import Literal
from neighbour import NUMBER

def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b + NUMBER

both = [add]
Answer = Literal["yes", "no"]
'''


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def invoke(*argv: str, stdin: bytes = b"", encoding: str = "utf-8") -> Done:
    """Run a command in this process; `encoding` is that of its terminal."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    kept, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            code = main(argv)
    finally:
        sys.stdin = kept
    out, err = (stream.buffer.getvalue().decode("utf-8") for stream in streams)  # type: ignore[attr-defined]
    return Done(code, out, err)


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[str]:
    """A Python file that imports its neighbour."""
    file = tmp_path / "tools.py"
    file.write_text(PYTHON)
    (tmp_path / "neighbour.py").write_text("NUMBER = 0\n")
    kept = sys.path.copy()
    yield str(file)
    sys.path[:] = kept
    sys.modules.pop("neighbour", None)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with load_engine(smol_path(), Options(context=2048), "smollm2") as engine:
        yield engine


@pytest.fixture
def loaded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the model loaded already, as loading takes longer than what they do with it."""
    monkeypatch.setattr(loading, "load", lambda model: contextlib.nullcontext(engine))


# usage


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from agentkit.cli import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'outlines', 'llguidance', 'huggingface_hub'}\n"
        "print(*heavy & set(sys.modules), end='', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    for command in ("run", "chat", "extract", "models", "doctor"):
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["serve-tea"],
        ["run"],
        ["run", "task", "--steps", "0"],
        ["run", "task", "--steps", "many"],
        ["run", "task", "--seconds", "nan"],
        ["run", "task", "--temperature", "-1"],
        ["run", "--tools", "tools:add", "the task"],
        ["extract", "schema.json"],
        ["models"],
        ["models", "pull"],
    ],
    ids=" ".join,
)
def test_bad_usage_exits_2(argv: Sequence[str]) -> None:
    done = invoke(*argv)
    assert done.code == 2
    assert done.out == ""
    assert "usage: agentkit" in done.err


def test_version() -> None:
    assert re.fullmatch(r"agentkit \d+\.\d+\.\d+\n", invoke("--version").out)


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "hello", "--model", "no-such-model"],
        ["chat", "--model", "no-such-model"],
        ["models", "check", "no-such-model"],
    ],
    ids=" ".join,
)
def test_an_unknown_model_is_told_with_its_remedy(argv: Sequence[str]) -> None:
    done = invoke(*argv)
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: There is no model 'no-such-model'.")
    assert "agentkit models pull" in done.err


def test_an_empty_task_is_refused() -> None:
    done = invoke("run", "-", stdin=b" \n")
    assert done.code == 1
    assert "task is empty" in done.err


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str, progress: bool) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "pull", interrupted)
    assert invoke("models", "pull", "smollm2-135m").code == 130


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    smol_path()
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from agentkit.cli import main; sys.exit(main())"]
    done = subprocess.run([*command, "models", "pull", "smollm2-135m"], stdout=writer, stderr=-1, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""


# what commands are pointed at


def test_python_objects_by_name(tools: str) -> None:
    add = source.python_object(f"{tools}:add")
    assert add(1, 2) == 3
    assert source.python_object(f"{tools}:both") == [add]  # the file was imported once
    assert source.python_object("pathlib:Path.home") == Path.home


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tools}:divide", "has no divide. It defines "),
        ("{tools}.py:add", "There is no file"),
        ("no.such.module:add", "There is no module no.such.module."),
        ("json.nothing:add", "There is no module json.nothing."),
        ("{broken}:add", "ZeroDivisionError: division by zero .*broken.py, line 2"),
        ("{leaving}:add", "SystemExit: 3"),
        ("{hungry}:add", "No module named 'no_such_module'"),
        ("add", "names no Python object"),
    ],
)
def test_objects_that_cannot_be_had(tools: str, tmp_path: Path, spec: str, message: str) -> None:
    sources = {"broken": "\n1 / 0", "leaving": "raise SystemExit(3)", "hungry": "import no_such_module"}
    files = {name: tmp_path / f"{name}.py" for name in sources}
    for name, text in sources.items():
        files[name].write_text(text)
    with pytest.raises(AgentError, match=message):
        source.python_object(spec.format(tools=tools, **files))


def test_schemas(tools: str, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert source.output_type(str(file)) == SCHEMA
    assert source.output_type(f"{tools}:Answer").__args__ == ("yes", "no")
    for text in ("{", "[1]"):
        file.write_text(text)
        with pytest.raises(SchemaError, match="is not"):
            source.output_type(str(file))


# what is shown


def finished(stop: Any = "answer") -> Finished[str]:
    usage = Usage(cached=300, prefilled=120, decoded=40, forced=12)
    return Finished(RunResult("Hi", stop, usage, (), 2.1, session=None))  # type: ignore[arg-type]


def test_a_run_as_a_person_sees_it(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer()
    long = "\n".join(f"line {i}" for i in range(8))
    events: list[Any] = [
        TextDelta("Let me \x1b[2Jsee."),
        CallReady(0, "add", {"a": 1}),
        CallReady(1, "fail", {}),
        TurnFinished(0, Usage()),
        ToolFinished(0, CallRecord("add", {"a": 1}, long, False, 0.12)),
        ToolFinished(1, CallRecord("fail", {}, "Error: no", True, 0.0)),
        TextDelta("Hi"),
        TurnFinished(1, Usage()),
        finished(),
    ]
    for event in events:
        printer(event)
    out, err = capsys.readouterr()
    assert out == "Let me \ufffd[2Jsee.\nHi\n"
    assert err.splitlines()[:9] == [
        '→ add({"a": 1})',
        "→ fail({})",
        "← add: line 0",
        "  line 1",
        "  line 2",
        "  line 3",
        "  line 4",
        "  … 3 more lines (0.1 s)",
        "← fail: Error: no (0.0 s)",
    ]
    assert TOKENS.fullmatch(err.splitlines()[9])


def test_reading_a_long_prompt_is_one_line_that_goes(capsys: pytest.CaptureFixture[str]) -> None:
    reading = [PrefillProgress(0, 512, 1400, 0), PrefillProgress(0, 1024, 1400, 96), TextDelta("Hi")]
    for event in reading:
        Printer()(event)
    assert capsys.readouterr().err == ""  # nothing but a terminal can write a line over
    printer = Printer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        patch.setenv("NO_COLOR", "1")
        for event in reading:
            printer(event)
    assert capsys.readouterr().err.split("\r\033[K") == [
        "reading the prompt: 512 of 1,400 tokens",
        "reading the prompt: 1,024 of 1,400 tokens, 96 a second time",
        "",
    ]


def test_the_summary() -> None:
    counts = "tokens: 120 prefilled, 300 cached, 40 decoded, 12 forced"
    assert summary(finished().result, 2.0) == f"{counts} · 26 tok/s · 2.1 s"
    assert summary(finished("steps").result, 0.0) == f"{counts} · 2.1 s · stopped by steps"


def test_events_as_json() -> None:
    record = CallRecord("add", {"a": 1}, "1", False, 0.5)
    assert event_json(ToolFinished(2, record)) == {
        "event": "tool_finished",
        "index": 2,
        "record": {"name": "add", "arguments": {"a": 1}, "result": "1", "failed": False, "seconds": 0.5},
    }
    assert event_json(finished()) == {
        "event": "finished",
        "output": "Hi",
        "stop": "answer",
        "usage": {
            "cached": 300,
            "prefilled": 120,
            "decoded": 40,
            "forced": 12,
            "recomputed": 0,
            "drafted": 0,
            "accepted": 0,
            "retried": 0,
        },
        "seconds": 2.1,
    }


@pytest.mark.parametrize("text", ["Zürich → 東京 🙂", "a lone surrogate: \udcff", "\x00\n\u2028"])
def test_json_lines_are_utf8_in_any_locale(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding="ascii"))
    json_line({"text": text})
    line = data.getvalue().decode("utf-8")
    assert json.loads(line) == {"text": text}
    assert line.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_color_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert paint("x", "31", Terminal()) == "\033[31mx\033[0m"
    assert paint("x", "31", io.StringIO()) == "x"
    monkeypatch.setenv("TERM", "dumb")
    assert paint("x", "31", Terminal()) == "x"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert paint("x", "31", Terminal()) == "x"


def test_text_cannot_drive_the_terminal() -> None:
    assert printable("a\tb\r\nc\x1b]0;title\x07\x9b2J") == "a\tb\nc\ufffd]0;title\ufffd\ufffd2J"


# with a model


@pytest.mark.usefixtures("loaded")
def test_run_prints_json_lines_alone(tools: str) -> None:
    done = invoke("run", "Say hello.", "--json", "--tokens", "24", "--tools", f"{tools}:both")
    assert done.code == 0
    assert done.err == ""
    assert {"text_delta", "turn_finished", "finished"} <= {line["event"] for line in done.lines}
    last = done.lines[-1]
    assert last["event"] == "finished"
    made = last["usage"]["decoded"] + last["usage"]["forced"]
    assert 0 < made <= 24


@pytest.mark.usefixtures("loaded")
def test_a_terminal_that_lacks_characters_ends_no_run() -> None:
    done = invoke("run", "Say hello.", "--tokens", "4", encoding="ascii")
    assert done.code == 0
    assert "\\xb7" in done.err


@pytest.mark.usefixtures("loaded")
def test_run_reads_the_task_and_answers_with_a_type(tools: str) -> None:
    done = invoke("run", "-", "--output", f"{tools}:Answer", stdin="Is ü a letter?".encode())
    assert done.code == 0
    assert done.out in ("yes\n", "no\n")
    assert TOKENS.fullmatch(done.err.strip())


def test_a_function_that_is_no_tool(tools: str) -> None:
    done = invoke("run", "hello", "--tools", f"{tools}:NUMBER")
    assert done.code == 1
    assert "is not a function" in done.err


@pytest.mark.usefixtures("loaded")
def test_chat_keeps_the_session_until_new() -> None:
    messages = b"Hello\n\nAnd you?\n/usage\n/new\n/usage\n"
    done = invoke("chat", "--tokens", "16", stdin=messages)
    assert done.code == 0
    lines = done.err.splitlines()
    assert len(lines) == 4
    counts = [[int(n) for n in re.findall(r"(\d+) [pcdf]", line)[:4]] for line in lines]
    first, second, both, fresh = counts
    assert second[1] > first[1]  # the second answer found the first in the cache
    assert both == [a + b for a, b in zip(first, second, strict=True)]
    assert fresh == [0, 0, 0, 0]


def test_an_interrupt_ends_the_answer_not_the_chat() -> None:
    # A shell that starts the tests in the background has them, and what they start, ignore the signal.
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heed}; from agentkit.cli import main; sys.exit(main())"]
    arguments = ["chat", "--model", str(smol_path())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *arguments], bufsize=0, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(b"Write a very long story about a dragon and a king.\n")
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(b"/usage\n", timeout=120)
    assert process.returncode == 0
    cancelled, usage = err.decode().splitlines()
    assert cancelled == "cancelled"
    assert usage == "tokens: 0 prefilled, 0 cached, 0 decoded, 0 forced"


@pytest.mark.usefixtures("loaded")
def test_extract_goes_on_past_bad_files(tmp_path: Path) -> None:
    contents = {
        "a.txt": b"Anna has paid.",
        "latin.txt": "Jürgen".encode("latin-1"),
        "long.txt": b"word " * 20_000,
        "b.txt": "Jürgen has not paid.".encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    names = ["a.txt", "missing.txt", "latin.txt", "long.txt", "b.txt"]
    files = [*(str(tmp_path / name) for name in names), "-"]
    done = invoke("extract", str(schema), *files, stdin=b"Bob has paid.")
    assert done.code == 1
    assert [line["file"] for line in done.lines] == files
    errors = {index: line["error"] for index, line in enumerate(done.lines) if "error" in line}
    assert errors.keys() == {1, 2, 3}
    assert "cannot be read" in errors[1]
    assert "not UTF-8" in errors[2]
    assert "tokens" in errors[3]
    for index in (0, 4, 5):
        data = done.lines[index]["data"]
        assert list(data) == ["name", "paid"]
        assert isinstance(data["paid"], bool)


@pytest.mark.usefixtures("loaded")
def test_a_schema_that_cannot_be_decoded_is_one_error(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "no-such-type"}')
    text = tmp_path / "a.txt"
    text.write_text("hello")
    done = invoke("extract", str(schema), str(text), str(text))
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: ")


def test_models_check_and_list() -> None:
    smol_path()
    done = invoke("models", "check", "smollm2-135m")
    assert done.code == 0
    assert "134,515,008 parameters" in done.out
    assert "SHA-256" in done.out
    assert f"smollm2-135m  {98:>5} MB  gguf         {smol_path()}" in invoke("models", "list").out


def test_doctor_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_MODEL", str(smol_path()))
    done = invoke("doctor")
    assert done.code == 0
    assert done.out.endswith("everything works\n")
    assert re.search(r"ok live check +loaded in [\d.]+ s, decoded 16 tokens at \d+ tok/s", done.out)
    for topic in (
        "python",
        "torch",
        "transformers",
        "outlines",
        "llguidance",
        "device",
        "dtype",
        "memory",
        "threads",
    ):
        assert f"ok {topic:<12} " in done.out


def test_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKIT_MODEL", "no-such-model")
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["torch<1", "no-such-package>=2"])
    done = invoke("doctor")
    assert done.code == 1
    assert "Run `pip install 'torch<1'`." in done.out
    assert "Run `pip install 'no-such-package>=2'`." in done.out
    assert "agentkit models pull" in done.out
    assert done.out.endswith("3 problems\n")
