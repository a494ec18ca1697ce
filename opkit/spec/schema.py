"""An op's schema: what it is called, what it takes and what it returns.

It says how calls and results change between their flat form, torch's and the caller's. It must not know
kernels, and it registers nothing: a `Schema` is a value.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch

from opkit import _torch
from opkit.errors import ArgumentError, RegistrationError, SchemaError
from opkit.spec import results as result_forms
from opkit.spec.results import Result as Result
from opkit.spec.types import ValueType as ValueType

REQUIRED: Any = inspect.Parameter.empty

_TORCHS_OWN = ("aten", "prim", "prims", "quantized", "inductor", "higher_order", "c10d", "_opkit_native")
# Compiled here, as Dynamo cannot trace that (torch 2.11), and `inline` may stand in a compiled function.
_NAME = re.compile(r"[A-Za-z_]\w*::[A-Za-z_]\w*")
_NAME_OR_OVERLOAD = re.compile(_NAME.pattern + r"(\.\w+)?")  # an adopted op may be one of several


@dataclass(frozen=True)
class Param:
    """One argument of an op."""

    name: str
    type: ValueType
    default: Any = REQUIRED
    """As torch carries it: a str or an int where it is a member of an Enum."""
    keyword_only: bool = False
    mutated: bool = False
    filled: bool = False
    """Whether the Op fills in the default, which the schema language cannot hold."""

    def declaration(self, alias: str) -> str:
        """Return how the schema language writes it: `Tensor(a!) x`, `float eps=1e-06`."""
        text = str(self.type)
        if self.mutated:
            text = text.replace("Tensor", f"Tensor({alias}!)", 1)
        without = self.filled or self.default is REQUIRED
        return f"{text} {self.name}" + ("" if without else f"={_literal(self.default)}")


@dataclass(frozen=True)
class Schema:
    """The contract of an op that torch knows: its name, arguments and results."""

    name: str
    params: tuple[Param, ...]
    results: tuple[Result, ...]
    container: Callable[..., Any] | None = None
    """What the caller gets results in: a NamedTuple or dataclass, `tuple`, or None for a bare value."""
    home: str | None = None
    """What opkit defines in torch for it, where it is not the op's name: an adopted op."""
    positional: tuple[Param, ...] = field(init=False)
    keyword_only: tuple[Param, ...] = field(init=False)
    special: tuple[tuple[int, Param], ...] = field(init=False)
    """The arguments, with their places, that the Op changes before torch gets them: see `carry`."""

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("positional", tuple(p for p in self.params if not p.keyword_only))
        put("keyword_only", tuple(p for p in self.params if p.keyword_only))
        factory = not any(p.type.base == "Tensor" for p in self.params)
        put(
            "special",
            tuple(
                (i, p)
                for i, p in enumerate(self.params)
                if p.filled or p.type.is_carried or (factory and str(p.type) == "Device?")
            ),
        )

    @property
    def namespace(self) -> str:
        """The part before `::` of the name in torch."""
        return (self.home or self.name).split("::")[0]

    @property
    def opname(self) -> str:
        """The part after `::` of the name in torch."""
        return (self.home or self.name).split("::")[1]

    @property
    def symbol(self) -> str:
        """What a native kernel's function is called, where nothing else is said."""
        return self.name.split("::")[1].replace(".", "_")

    def declaration(self, name: str | None = None, extra: str = "") -> str:
        """Return the text for `Library.define`; `extra` is one more keyword-only argument."""
        parts = [p.declaration(f"a{i}") for i, p in enumerate(self.positional)]
        keywords = [p.declaration(f"k{i}") for i, p in enumerate(self.keyword_only)]
        keywords += [extra] if extra else []
        if keywords:
            parts += ["*", *keywords]
        results = ", ".join(str(r.type) for r in self.results)
        return f"{name or self.opname}({', '.join(parts)}) -> ({results})"

    def __str__(self) -> str:
        text = self.declaration(self.name)
        if self.container in (None, tuple):
            return text
        named = ", ".join(f"{r.type} {r.name}" for r in self.results)
        return f"{text[: text.rindex(' -> (')]} -> ({named})"

    def fill(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return all arguments in schema order; torch drops those that equal their default.

        Raises:
            TypeError: an argument is missing, unknown, or given twice.
        """
        if len(args) == len(self.params) and not kwargs:
            return tuple(args)
        if len(args) > len(self.positional):
            raise TypeError(
                f"calling {self.name}: {len(args)} positional arguments, it takes {len(self.positional)}"
            )
        given = dict(kwargs)
        values = list(args)
        for param in self.params[len(args) :]:
            value = given.pop(param.name, param.default)
            if value is REQUIRED:
                raise TypeError(f"calling {self.name}: argument {param.name!r} is missing; it takes {self}")
            values.append(value)
        if given:
            name = next(iter(given))
            found = (
                f"argument {name!r} is given twice"
                if any(p.name == name for p in self.params)
                else f"unexpected argument {name!r}"
            )
            raise TypeError(f"calling {self.name}: {found}; it takes {self}")
        return tuple(values)

    def carry(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of a call as torch carries them, for those that are `special`.

        Raises:
            ArgumentError: a value is none of those that its annotation names.
        """
        args, kwargs = list(args), dict(kwargs)
        for place, param in self.special:
            if place < len(args) and not param.keyword_only:
                args[place] = self._carried(param, args[place])
            elif param.name in kwargs:
                kwargs[param.name] = self._carried(param, kwargs[param.name])
            elif param.filled:
                kwargs[param.name] = param.default
            elif param.type.base == "Device":
                kwargs[param.name] = self._carried(param, param.default)
        return args, kwargs

    def _carried(self, param: Param, value: Any) -> Any:
        if param.type.is_carried:
            try:
                return param.type.carry(value)
            except ValueError as err:
                raise self._argument_error(param, value, err) from None
        if value is None and param.type.base == "Device":
            # Inside the dispatcher `with torch.device(...)` is no longer in force.
            return _default_device()
        return value

    def restore(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return values in schema order as Python code sees them: members of an Enum, tuples.

        Raises:
            ArgumentError: a value is none of those that its annotation names.
        """
        restored = list(values)
        for place, param in self.special:
            if param.type.is_carried:
                try:
                    restored[place] = param.type.restore(values[place])
                except ValueError as err:
                    raise self._argument_error(param, values[place], err) from None
        return tuple(restored)

    def adapt(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, which takes what Python code sees, as one that takes what torch carries."""
        if not any(p.type.is_carried for p in self.params):
            return function

        @functools.wraps(function)
        def adapted(*args: Any, **kwargs: Any) -> Any:
            given, named = self.split(self.restore(self.fill(args, kwargs)))
            return function(*given, **named)

        return adapted

    def unadapted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function that `adapt` returned `function` for."""
        return function.__wrapped__ if any(p.type.is_carried for p in self.params) else function  # type: ignore[attr-defined]

    def _argument_error(self, param: Param, value: Any, expected: Exception) -> ArgumentError:
        return ArgumentError(
            f"calling {self.name}: argument {param.name} is {value!r}; expected {expected}"
            f"{' or None' if param.type.optional else ''}. Pass one.",
            op=self.name,
        )

    def split(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return values in schema order as (args, kwargs) for a call."""
        count = len(self.positional)
        return tuple(values[:count]), {
            p.name: v for p, v in zip(self.keyword_only, values[count:], strict=True)
        }

    def flatten(self, value: Any) -> tuple[Any, ...]:
        """Return what a kernel or torch returned as one value per declared result."""
        if not self.results:
            return ()
        container = self.container
        if container is None:
            return (value,)
        if container is not tuple and isinstance(value, container):  # type: ignore[arg-type]
            return result_forms.fields(container, value)
        if isinstance(value, tuple) or (isinstance(value, list) and len(self.results) > 1):
            return tuple(value)
        return (value,)  # torch unwraps a tuple of one

    def raw(self, values: Sequence[Any]) -> Any:
        """Return flat results in the form torch's dispatcher expects from a kernel."""
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    def pack(self, value: Any) -> Any:
        """Return what torch returned in the form that the declaration promises to the caller."""
        if self.container is None or not self.results:
            return value
        values = (value,) if len(self.results) == 1 else value
        return result_forms.build(self.container, self.results, values)


@_torch.constant_while_tracing
def _default_device() -> torch.device:
    """Return the device of tensors without one; Dynamo guards on it, but does not trace the question."""
    return torch.get_default_device()


def tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tensors among arguments or results, those in lists too."""
    return [
        one
        for value in values
        for one in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(one, torch.Tensor)
    ]


def check_name(name: str, doing: str = "declaring an op") -> None:
    """Raise SchemaError unless `name` is `namespace::name`."""
    form = _NAME if doing.startswith("declaring") else _NAME_OR_OVERLOAD
    if not isinstance(name, str) or not form.fullmatch(name):
        hint = f"mylib::{name}" if isinstance(name, str) and name.isidentifier() else "mylib::my_op"
        lacks = "has no namespace" if isinstance(name, str) and "::" not in name else "is not an op's name"
        raise SchemaError(
            f"{doing}: the name {name!r} {lacks}; expected namespace::name, two identifiers. Write {hint!r}."
        )
    if doing.startswith("declaring") and name.split("::")[0] in _TORCHS_OWN:
        raise SchemaError(
            f"{doing}: the name {name!r} has a namespace of torch itself; expected one of your own. "
            f"Write 'mylib::{name.split('::')[1]}'."
        )


def describe(function: Callable[..., Any]) -> str:
    """Return `name (file:line)` of a function, for error texts."""
    code = getattr(function, "__code__", None)
    title = getattr(function, "__qualname__", repr(function))
    return f"{title} ({code.co_filename}:{code.co_firstlineno})" if code else title


def check_arity(
    schema: Schema, function: Callable[..., Any], registering: str, what: str, arguments: Sequence[str]
) -> None:
    """Raise RegistrationError unless `function`, a part of what is registered, can be called with `arguments`."""
    code = function.__code__ if isinstance(function, FunctionType) else None
    if code is not None and code.co_argcount == len(arguments) and not code.co_kwonlyargcount:
        return  # the common case, without what inspect costs
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        raise RegistrationError(
            f"registering {registering} of {schema.name}: found {what} {describe(function)} with the signature "
            f"{inspect.signature(function)}; expected {len(arguments)} arguments: {', '.join(arguments)}. "
            "Change its parameters.",
            op=schema.name,
        ) from None
    except ValueError:  # a builtin without a signature
        return


def check_signature(schema: Schema, function: Callable[..., Any], what: str) -> None:
    """Raise RegistrationError unless `function` can be called with the op's arguments, in their order."""
    names = [p.name for p in schema.params]
    if not callable(function):
        raise RegistrationError(
            f"registering {what} of {schema.name}: found {function!r}; expected a function of "
            f"({', '.join(names)}). Pass one.",
            op=schema.name,
        )
    if isinstance(function, FunctionType) and not vars(function):
        code, count = function.__code__, len(schema.positional)
        takes = code.co_argcount, code.co_kwonlyargcount, code.co_varnames[:count]
        if takes == (len(names), 0, tuple(names)):
            return  # the common case, without what inspect costs
    try:
        own = inspect.signature(function)
    except ValueError:  # a builtin without a signature: it is found out when it is called
        return
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    theirs = [p.name for p in own.parameters.values() if p.kind in by_place]
    fits = not set(theirs) <= set(names) or [n for n in names if n in theirs] == theirs
    try:
        own.bind(*schema.positional, **{p.name: p for p in schema.keyword_only})
    except TypeError:
        fits = False
    if not fits:
        raise RegistrationError(
            f"registering {what} of {schema.name}: found {describe(function)} with the signature {own}; expected "
            f"the op's arguments ({', '.join(names)}) in this order. Change its parameters.",
            op=schema.name,
        )


def _literal(default: Any) -> str:
    if isinstance(default, (torch.dtype, torch.layout, torch.memory_format)):
        return str(default).removeprefix("torch.")
    if isinstance(default, (str, torch.device)):
        return json.dumps(str(default))
    return str(default)
