"""The official JSON-Schema-Test-Suite, in part: no case wrong, and nothing refused that was not before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.backends import Ours
from bench.instances import examine
from bench.suite import cases

FOLDER = Path(__file__).resolve().parents[2] / "data" / "json-schema-test-suite"
FILES = sorted(FOLDER.glob("*/*.json"))
# Schemas of a file that are refused, nearly all because nothing satisfies them.
REFUSED = {"allOf": 2, "anyOf": 1, "boolean_schema": 1, "not": 2, "oneOf": 3, "pattern": 1, "patternProperties": 1}


@pytest.fixture(scope="module")
def ours() -> Ours:
    return Ours()


@pytest.mark.parametrize("file", FILES, ids=[f"{file.parent.name}-{file.stem}" for file in FILES])
def test_no_case_of_the_official_suite_is_wrong(ours: Ours, file: Path):
    statuses: Counter[str] = Counter()
    for group, line in cases(file.parent.name, file.stem, json.loads(file.read_text(encoding="utf-8"))):
        outcome = examine(ours, group, line)
        statuses[outcome.status] += 1
        for index, trial in enumerate(outcome.trials):
            assert not trial.wrong, f"{outcome.id}, case {index}: invalid, and accepted"
            assert not trial.masked, f"{outcome.id}, case {index}: the mask excludes what is legal"
            assert trial.accepted or not trial.valid or trial.reason in ("order", "bound", "text"), (
                f"{outcome.id}, case {index}: valid, and rejected at …{trial.where}"
            )
    assert statuses["refused"] <= REFUSED.get(file.stem, 0)
