"""The one family of errors a user meets. Every message says what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentkit.runtime.request import Usage


class AgentError(Exception):
    """Base of every error agentkit raises on purpose."""


class ModelError(AgentError):
    """A model cannot be found, read or trusted: unknown name, damaged weights, incomplete configuration."""


class SchemaError(AgentError):
    """A schema, regular expression or grammar cannot be compiled.

    Attributes:
        pointer: JSON pointer of the part at fault (``""`` for the whole), where known.
    """

    def __init__(self, message: str, pointer: str = "") -> None:
        super().__init__(message)
        self.pointer = pointer


class DocumentError(AgentError):
    """A finished document or call does not satisfy its schema, and what was tried in its place does not either.

    Attributes:
        pointer: JSON pointer of the failing value in the document.
        whole: whether the document is the whole output, and not the arguments of a call in it.
        ids: of the last attempt, as far as they were held back.
        usage: of the request.
    """

    def __init__(self, message: str, pointer: str, whole: bool, ids: tuple[int, ...], usage: Usage) -> None:
        super().__init__(message)
        self.pointer, self.whole, self.ids, self.usage = pointer, whole, ids, usage


class CapacityError(AgentError):
    """A request can never fit: the context, the page pool or the token budget is too small for it."""


class EngineError(AgentError):
    """The engine is closed, or a step of it has failed; the message carries the cause."""


class StoreError(AgentError):
    """A saved session cannot be written, or what is in a file cannot be used here: damaged, or of another model."""
