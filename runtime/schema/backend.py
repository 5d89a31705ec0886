"""llguidance's word on a schema: whether it takes it, and within which limits."""

from __future__ import annotations

import json
from typing import Any

import llguidance


def limits() -> llguidance.LLParserLimits:
    """A tenth of a second and some tens of megabytes for a grammar, at most."""
    return llguidance.LLParserLimits(max_grammar_size=200_000, max_lexer_states=100_000, verbose_errors=False)


def summary(message: str) -> str:
    """An error of llguidance on one line."""
    return " ".join(message.split())[:300].rstrip(".")


def refusal(schema: dict[str, Any]) -> str:
    """Why llguidance does not take a schema; empty if it does."""
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))  # text: its integers have no limit
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    return summary(messages[0]) if failed else ""


def takes(schema: dict[str, Any]) -> bool:
    """Whether llguidance has a grammar for a schema, or says that nothing satisfies it."""
    problem = refusal(schema)
    return not problem or "nsatisfiable" in problem
