"""Every kernel compiles for every GPU it is meant for, within the registers, spills and shared memory it is allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kernels.compiled import Facts, cases, entry, excess, in_subprocess, minor_version, read_budget

FACTS = Facts(registers=40, stack=0, spills=0, shared=1024, counts={"HMMA": 4})


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> dict[str, Facts | str]:
    """The facts of the cases that were selected, compiled together."""
    wanted = [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and "case" in item.callspec.params
    ]
    return in_subprocess([case for case in dict.fromkeys(wanted) if case in set(cases())])


@pytest.mark.parametrize("case", cases())
def test_kernel_stays_within_its_budget(case: str, measured: dict[str, Facts | str]) -> None:
    facts = measured[case]
    assert isinstance(facts, Facts), facts
    budget = read_budget()
    assert case in budget, f"{case}: not in budget.json for Triton {minor_version()}; renew it (see compiled.py)"
    assert excess(facts, budget[case], case.rsplit("@", 1)[1]) == []


def test_budget_has_no_entry_without_a_kernel() -> None:
    assert set(read_budget()) <= set(cases())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"registers": 60}, "registers: 60, budget 48"),
        ({"stack": 8}, "stack: 8, budget 0"),
        ({"spills": 1}, "spills: 1, budget 0"),
        ({"shared": 2048}, "shared: 2048, budget 1024"),
        ({"counts": {}}, "no HMMA any more"),
    ],
)
def test_a_kernel_that_needs_more_is_told_of(more: dict[str, object], said: str) -> None:
    budget = entry(FACTS)
    assert excess(FACTS, budget, "sm_90") == []
    assert excess(replace(FACTS, **more), budget, "sm_90") == [said]  # pyright: ignore[reportArgumentType]


def test_shared_memory_that_the_gpu_has_not_is_told_of() -> None:
    large = replace(FACTS, shared=100 << 10)
    assert excess(large, entry(large), "sm_90") == []
    assert excess(large, entry(large), "sm_89") == ["shared: 102400, the GPU has 101376"]
