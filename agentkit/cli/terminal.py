"""What the terminal is given: colors where it shows them, no control characters of others, JSON lines."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TextIO

DIM, RED, GREEN, CYAN = "2", "31", "32", "36"

# Text of models and tools could drive the terminal with these; tab and newline stay, a carriage return goes.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in (9, 10)} | {13: None}


def paint(text: str, color: str, stream: TextIO) -> str:
    """`text` in a color where `stream` is a terminal that shows it and NO_COLOR (no-color.org) is not set."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\033[{color}m{text}\033[0m"


def printable(text: str) -> str:
    """`text` without the control characters with which it could drive a terminal."""
    return text.translate(_CONTROLS)


def json_line(value: object) -> None:
    """Print a value as JSON on one line, in UTF-8 whatever the locale says (RFC 8259, section 8.1)."""
    stream: TextIO = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # UTF-8 cannot write lone surrogates; \udxxx, as Python replaces them, is JSON's own escape.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    print(json.dumps(value, ensure_ascii=False), flush=True)
