"""Python functions as tools: what the model is told of them, and how its calls reach them."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import types
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar, cast, get_origin, get_type_hints, overload

import anyio
import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import PydanticJsonSchemaWarning
from pydantic_core import PydanticSerializationError, to_jsonable_python

from agentkit.runtime.errors import AgentError
from agentkit.schema import Json, clean, parse_docstring

P = ParamSpec("P")
R = TypeVar("R")
Deps = TypeVar("Deps")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


class ToolError(AgentError):
    """A function cannot be a tool, arguments do not fit one, or its result cannot be shown to a model."""


@dataclass(frozen=True, slots=True)
class RunContext(Generic[Deps]):
    """What a tool may know of the run it is called in.

    A function whose first parameter is annotated ``RunContext`` or ``RunContext[Database]`` receives it
    there; the model never sees that parameter.

    Attributes:
        deps: what the caller of the run handed in for its tools: a database, a client, a user.
        tool_name: the name the model called.
        step: which turn of the model this call belongs to, from 0.
        call_index: which call of that turn this is, from 0.
    """

    deps: Deps
    tool_name: str
    step: int = 0
    call_index: int = 0


@dataclass(frozen=True, eq=False)
class Tool(Generic[P, R]):
    """A function the model may call. Made by `tool`; still callable as the function it was made from.

    Attributes:
        name: what the model writes to call it.
        description: what the model reads about it.
        schema: JSON schema of the arguments: properties in the order of the parameters, closed.
        function: the function itself.
        is_async: `function` is awaited; otherwise it runs in a worker thread.
        takes_context: `function` wants a `RunContext` before its other arguments.
        timeout: seconds one call may take, None for no limit.
    """

    name: str
    description: str
    schema: Json
    function: Callable[P, R] = field(repr=False)
    is_async: bool
    takes_context: bool
    timeout: float | None
    _model: type[BaseModel] = field(repr=False)
    _done: str = field(repr=False)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call, as JSON gives them, turned into what the function's annotations say.

        Parameters that were left out have their defaults.

        Raises:
            ToolError: an argument is missing, unknown or wrong. The message lists each, for the model to
            read.
        """
        try:
            model = self._model.model_validate(dict(arguments))
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)
            ]
            raise ToolError(
                f"The arguments of {self.name} are wrong: {'; '.join(faults)}. Call it again with corrected arguments."
            ) from error
        fields = type(model).model_fields
        return {str(info.alias): getattr(model, name) for name, info in fields.items()}

    async def call(self, arguments: Mapping[str, Any], context: RunContext[Any] | None = None) -> str:
        """Run the function and return its result as text for the model.

        A sync function runs in a worker thread. When its time is up, or the run is cancelled, the thread is
        left behind: Python cannot stop it, its result is dropped.

        Args:
            arguments: what `validate` returned.
            context: for a tool that takes one.

        Raises:
            TimeoutError: `timeout` seconds have passed.
            ToolError: the tool wants a context and got none, or its result cannot be shown to a model.
            Exception: whatever the function raises.
        """
        if self.takes_context and context is None:
            raise ToolError(f"{self.name} takes a RunContext: pass one as `context`.")
        bound = functools.partial(
            cast("Callable[..., Any]", self.function), *([context] if self.takes_context else []), **arguments
        )
        with anyio.move_on_after(math.inf if self.timeout is None else self.timeout):
            if self.is_async:
                result = await cast("Awaitable[object]", bound())
            else:
                result = await anyio.to_thread.run_sync(bound, abandon_on_cancel=True)
            return self._render(result)
        raise TimeoutError(f"{self.name} did not finish within {self.timeout:g} seconds.")

    def _render(self, result: object) -> str:
        """A string as it is; None as `done` where the function is declared to return it; the rest as JSON."""
        if isinstance(result, str):
            return result
        if result is None:
            return self._done
        try:
            return json.dumps(to_jsonable_python(result), ensure_ascii=False)
        except (PydanticSerializationError, UnicodeDecodeError) as error:
            raise ToolError(
                f"{self.name} returned a {type(result).__name__}, which has no JSON form. Return text, "
                "numbers, lists, dicts, dataclasses or pydantic models."
            ) from error


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...


@overload
def tool(
    *, name: str | None = None, description: str | None = None, timeout: float | None = None
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...


def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout: float | None = None,
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Make a tool of a function, sync or async; as ``@tool`` or ``@tool(timeout=5)``.

    Each parameter needs a type annotation: anything pydantic can describe. One with a default may be left
    out by the model, which is shown the default. Description and parameters are documented by the docstring
    (Google style) or by ``Annotated[int, Field(description="…")]``.

    Args:
        function: a function or a bound method.
        name: instead of the function's own name.
        description: instead of the docstring's.
        timeout: seconds one call may take.

    Raises:
        ToolError: the function cannot be a tool; the message names the parameter and what to write instead.
    """
    if function is None:
        return lambda wrapped: _make(wrapped, name, description, timeout)
    return _make(function, name, description, timeout)


def toolset(tools: Iterable[Tool[..., Any] | Callable[..., Any]]) -> dict[str, Tool[..., Any]]:
    """The tools by name, in the order given; plain functions become tools.

    Raises:
        ToolError: two tools have one name, or a function cannot be a tool.
    """
    named: dict[str, Tool[..., Any]] = {}
    for item in tools:
        made = cast("Tool[..., Any]", item) if isinstance(item, Tool) else tool(item)
        if made.name in named:
            raise ToolError(f"Two tools are called {made.name}. Rename one: @tool(name=...).")
        named[made.name] = made
    return named


def _make(function: Callable[P, R], name: str | None, description: str | None, timeout: float | None) -> Tool[P, R]:
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise ToolError(f"{function!r} is not a function. Write a function with annotated parameters that calls it.")
    name = function.__name__ if name is None else name
    if not _NAME.fullmatch(name):
        raise ToolError(
            f"{name!r} cannot be the name of a tool: use a letter or _, then up to 63 letters, digits, _ . "
            "or -. Set one with @tool(name=...)."
        )
    if timeout is not None and timeout <= 0:
        raise ToolError(f"The timeout of {name} is {timeout:g} seconds; give a positive number, or None for no limit.")
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    annotations = {p.name: _annotation(name, function, p) for p in parameters}
    takes_context = bool(parameters) and _is_context(annotations[parameters[0].name])
    arguments = parameters[1:] if takes_context else parameters
    docstring = parse_docstring(function.__doc__)
    model = _model(name, arguments, annotations)
    return Tool(
        name=name,
        description=docstring.description if description is None else description,
        schema=_schema(model, docstring.parameters),
        function=function,
        is_async=inspect.iscoroutinefunction(function),
        takes_context=takes_context,
        timeout=timeout,
        _model=model,
        _done="done" if signature.return_annotation in (None, "None") else "null",
    )


def _annotation(tool_name: str, function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The parameter's type, with a string annotation evaluated where the function was defined."""
    name = parameter.name
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
        raise ToolError(f"{tool_name} has {stars}{name}: a model needs to know each argument. Write them out by name.")
    if parameter.kind is parameter.POSITIONAL_ONLY:
        raise ToolError(f"Parameter {name} of {tool_name} is positional-only: arguments come by name. Remove the /.")
    if parameter.annotation is parameter.empty:
        hint = f"Write for instance `{name}: str`."
        if name in ("self", "cls"):
            hint = "Make the tool from the bound method: tool(thing.method)."
        raise ToolError(f"Parameter {name} of {tool_name} has no type annotation. {hint}")
    holder = types.SimpleNamespace(__annotations__={name: parameter.annotation})
    namespace = cast("types.FunctionType", inspect.unwrap(function)).__globals__
    try:
        return get_type_hints(holder, globalns=namespace, include_extras=True)[name]
    except Exception as error:  # evaluating a string can raise anything
        raise ToolError(
            f"The annotation {parameter.annotation!r} of parameter {name} of {tool_name} cannot be evaluated "
            f"({error}). Define or import the type at the top level of the module."
        ) from error


def _is_context(annotation: object) -> bool:
    return annotation is RunContext or get_origin(annotation) is RunContext


def _model(name: str, parameters: list[inspect.Parameter], annotations: Mapping[str, Any]) -> type[BaseModel]:
    """A pydantic model of the arguments.

    Its fields are called a0, a1 … and carry the parameter's name as an alias, since a parameter may be called
    what a model's field may not (`schema`, `_path`, `model_config`).
    """
    fields: dict[str, Any] = {}
    for i, parameter in enumerate(parameters):
        annotation, default = annotations[parameter.name], parameter.default
        _check(name, parameter, annotation)
        required = default is parameter.empty
        fields[f"a{i}"] = (annotation, Field(... if required else default, alias=parameter.name))
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _check(name: str, parameter: inspect.Parameter, annotation: Any) -> None:
    """Refuse an argument that a model cannot give, or that would mean something else in a plain call."""
    place = f"Parameter {parameter.name} of {name}"
    if _is_context(annotation):
        raise ToolError(f"{place} is a RunContext: move it to the first place.")
    if isinstance(parameter.default, FieldInfo):
        raise ToolError(
            f"{place} has Field(...) as its default, which a plain call would pass on. "
            f"Write `{parameter.name}: Annotated[..., Field(...)] = default`."
        )
    try:
        TypeAdapter(annotation).json_schema()
    except PydanticUserError as error:
        reason = str(error).partition("\n")[0]
        raise ToolError(
            f"{place} has a type that JSON cannot express ({reason}). Use str, int, float, bool, Literal, "
            "Enum, list, dict, a dataclass, a TypedDict or a pydantic model."
        ) from error


def _schema(model: type[BaseModel], documented: Mapping[str, str]) -> Json:
    with warnings.catch_warnings():
        # A default that JSON cannot express is left out of the schema; the parameter stays optional.
        warnings.simplefilter("ignore", PydanticJsonSchemaWarning)
        schema = clean(model.model_json_schema())
    properties = cast("dict[str, Json]", schema.get("properties", {}))
    for parameter, text in documented.items():
        if text and parameter in properties:
            properties[parameter].setdefault("description", text)
    ordered = {key: schema[key] for key in ("type", "properties", "required") if key in schema}
    empty: Json = {"type": "object", "properties": {}}
    return empty | ordered | schema
