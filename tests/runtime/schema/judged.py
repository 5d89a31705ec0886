"""Leaf rewritings against jsonschema: what the grammar of a rewritten schema accepts, and what is valid."""

from __future__ import annotations

import json
from typing import Any

import llguidance
from jsonschema import Draft202012Validator

from agentkit.runtime.schema.backend import limits, refusal
from agentkit.runtime.schema.leaves import LEAVES
from agentkit.runtime.schema.report import Status

BYTES = llguidance.LLTokenizer("byte")
Notes = list[tuple[str, Status, str]]


def leaves(schema: Any, notes: Notes) -> Any:
    """A schema with the rewritings applied to each part, inner ones first."""
    if not isinstance(schema, dict):
        return schema
    part: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            part[key] = {name: leaves(member, notes) for name, member in value.items()}
        elif key in ("prefixItems", "anyOf", "allOf"):
            part[key] = [leaves(member, notes) for member in value]
        elif key in ("items", "additionalProperties", "contains", "propertyNames"):
            part[key] = leaves(value, notes)
        else:
            part[key] = value
    for rewriting in LEAVES:
        part = rewriting(part, lambda *finding: notes.append(finding))
    return part


class Judged:
    """A schema, its rewritten form and the notes on it.

    Attributes:
        status: the worst of the notes, without those that say only that a name may come twice, which no document
            of these tests does.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema
        self.notes: Notes = []
        self.part = leaves(schema, self.notes)
        found = {status for _, status, reason in self.notes if "twice" not in reason}
        self.status = "refused" if "refused" in found else "verified" if "verified" in found else "exact"
        self.validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        compiled = {**self.part, "x-guidance": {"whitespace_pattern": " "}}
        self.refusal = refusal(compiled)
        if not self.refusal:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(compiled))
            self.root = llguidance.LLMatcher(BYTES, grammar, log_level=0, limits=limits())

    def accepts(self, text: str) -> bool:
        """Whether the grammar accepts `text`; nothing where it can accept nothing."""
        if self.refusal:
            return False
        matcher, ids = self.root.deep_copy(), list(text.encode())
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def wrong(self, values: list[Any]) -> list[str]:
        """Values about which the grammar and jsonschema disagree more than the status admits."""
        return self.wrong_texts([json.dumps(value, ensure_ascii=False) for value in values])

    def wrong_texts(self, texts: list[str]) -> list[str]:
        """Documents about which they do."""
        found: list[str] = []
        for text in texts:
            accepted, valid = self.accepts(text), self.validator.is_valid(json.loads(text))
            if accepted != valid and not (accepted and self.status == "verified"):
                found.append(f"{text} is {'' if valid else 'not '}valid and {'' if accepted else 'not '}accepted")
        return found
