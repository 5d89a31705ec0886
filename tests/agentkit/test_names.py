"""The public face: names that programs import. One that goes, or changes its name, breaks them."""

from __future__ import annotations

import agentkit

NAMES = """
Agent Run RunResult CallRecord Session Restored
tool Tool RunContext ToolError
extract Extracted Failed Decision Limits load Options Sampling Usage OutputError
TextDelta OutputDelta FieldStarted FieldDelta FieldReady CallStarted ArgumentDelta CallReady
ToolFinished TurnFinished PrefillProgress Finished
AgentError CapacityError EngineError ModelError SchemaError StoreError
scripted call reply final
"""


def test_the_public_names_are_these() -> None:
    assert sorted(agentkit.__all__) == sorted(NAMES.split())
    assert all(hasattr(agentkit, name) for name in agentkit.__all__)
