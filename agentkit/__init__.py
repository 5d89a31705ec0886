"""Agents whose model runs in the same process: grammar-valid tool calls over a kept KV cache.

from agentkit import Agent, tool

@tool
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b

print(Agent(tools=[add]).run_sync("What is 2 + 40?").output)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Not lazy like the others: once its module has been imported, `agentkit.tool` would be the module.
from agentkit.tool import RunContext as RunContext
from agentkit.tool import Tool as Tool
from agentkit.tool import ToolError as ToolError
from agentkit.tool import tool as tool

if TYPE_CHECKING:
    from agentkit.agent import Agent as Agent
    from agentkit.agent import Run as Run
    from agentkit.decision import Decision as Decision
    from agentkit.extraction import Failed as Failed
    from agentkit.extraction import extract as extract
    from agentkit.extractor import Extracted as Extracted
    from agentkit.fields import FieldDelta as FieldDelta
    from agentkit.fields import FieldReady as FieldReady
    from agentkit.fields import FieldStarted as FieldStarted
    from agentkit.limits import Limits as Limits
    from agentkit.loading import load as load
    from agentkit.loop import Finished as Finished
    from agentkit.loop import PrefillProgress as PrefillProgress
    from agentkit.loop import ToolFinished as ToolFinished
    from agentkit.loop import TurnFinished as TurnFinished
    from agentkit.output import OutputError as OutputError
    from agentkit.result import CallRecord as CallRecord
    from agentkit.result import Restored as Restored
    from agentkit.result import RunResult as RunResult
    from agentkit.result import Session as Session
    from agentkit.runtime.errors import AgentError as AgentError
    from agentkit.runtime.errors import CapacityError as CapacityError
    from agentkit.runtime.errors import EngineError as EngineError
    from agentkit.runtime.errors import ModelError as ModelError
    from agentkit.runtime.errors import SchemaError as SchemaError
    from agentkit.runtime.errors import StoreError as StoreError
    from agentkit.runtime.load import Options as Options
    from agentkit.runtime.request import Sampling as Sampling
    from agentkit.runtime.request import Usage as Usage
    from agentkit.script import call as call
    from agentkit.script import final as final
    from agentkit.script import reply as reply
    from agentkit.script import scripted as scripted
    from agentkit.turn import ArgumentDelta as ArgumentDelta
    from agentkit.turn import CallReady as CallReady
    from agentkit.turn import CallStarted as CallStarted
    from agentkit.turn import OutputDelta as OutputDelta
    from agentkit.turn import TextDelta as TextDelta

# Where each public name lives. They are imported when first used: torch alone takes longer to import than most
# programs that only define an agent take to run.
_HOMES = {
    "agent": ["Agent", "Run"],
    "decision": ["Decision"],
    "extraction": ["Failed", "extract"],
    "extractor": ["Extracted"],
    "fields": ["FieldDelta", "FieldReady", "FieldStarted"],
    "limits": ["Limits"],
    "loading": ["load"],
    "loop": ["Finished", "PrefillProgress", "ToolFinished", "TurnFinished"],
    "output": ["OutputError"],
    "result": ["CallRecord", "Restored", "RunResult", "Session"],
    "runtime.errors": ["AgentError", "CapacityError", "EngineError", "ModelError", "SchemaError", "StoreError"],
    "runtime.load": ["Options"],
    "runtime.request": ["Sampling", "Usage"],
    "script": ["call", "final", "reply", "scripted"],
    "turn": ["ArgumentDelta", "CallReady", "CallStarted", "OutputDelta", "TextDelta"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "RunContext", "Tool", "ToolError", "tool"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'agentkit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"agentkit.{_HOME[name]}"), name)
    return value
