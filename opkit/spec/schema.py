"""From a function's annotations to a torch schema, and from flat results to named ones.

Responsible for what an op is called, what it takes and what it returns. It must not know
kernels, and it registers nothing: a `Schema` is a value.
"""

from __future__ import annotations

import collections.abc
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opkit.errors import RegistrationError, SchemaError

REQUIRED: Any = inspect.Parameter.empty

_BASES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    torch.device: "Device",
}
_RESERVED = ("opkit_backend", "keyset", "self")  # the last two are taken for keyword-only ones
_TORCHS_OWN = ("aten", "prim", "prims", "quantized", "inductor", "higher_order", "c10d", "_opkit_native")
_LISTS = (list, collections.abc.Sequence)
_ACCEPTED = (
    "Tensor, int, float, bool, str, torch.dtype, torch.device, Optional[...] of these, and list[...] of these"
)
_RESULTS = "Tensor, list[Tensor], a tuple or NamedTuple of these, or None"


@dataclass(frozen=True)
class ValueType:
    """The type of one argument or result, in the terms of the schema language."""

    base: str
    is_list: bool = False
    optional: bool = False
    optional_elements: bool = False

    def __str__(self) -> str:
        elements = "?" if self.optional_elements else ""
        return f"{self.base}{elements}{'[]' if self.is_list else ''}{'?' if self.optional else ''}"

    @property
    def is_tensor(self) -> bool:
        """Whether it is one Tensor, possibly None."""
        return self.base == "Tensor" and not self.is_list


@dataclass(frozen=True)
class Param:
    """One argument of an op."""

    name: str
    type: ValueType
    default: Any = REQUIRED
    keyword_only: bool = False
    mutated: bool = False

    def declaration(self, alias: str) -> str:
        """Return how the schema language writes it: `Tensor(a!) x`, `float eps=1e-06`."""
        text = str(self.type)
        if self.mutated:
            text = text.replace("Tensor", f"Tensor({alias}!)", 1)
        return f"{text} {self.name}" + ("" if self.default is REQUIRED else f"={_literal(self.default)}")


@dataclass(frozen=True)
class Result:
    """One result of an op; `name` is the NamedTuple's field, or out, or out0, out1, …"""

    name: str
    type: ValueType


@dataclass(frozen=True)
class Schema:
    """The contract of an op that torch knows: its name, arguments and results."""

    name: str
    params: tuple[Param, ...]
    results: tuple[Result, ...]
    container: Callable[..., Any] | None = None
    """What the caller gets results in: a NamedTuple class, `tuple`, or None for a bare value."""
    positional: tuple[Param, ...] = field(init=False)
    keyword_only: tuple[Param, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "positional", tuple(p for p in self.params if not p.keyword_only))
        object.__setattr__(self, "keyword_only", tuple(p for p in self.params if p.keyword_only))

    @property
    def namespace(self) -> str:
        """The part of the name before `::`."""
        return self.name.split("::")[0]

    @property
    def opname(self) -> str:
        """The part of the name after `::`."""
        return self.name.split("::")[1]

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
            raise TypeError(
                f"calling {self.name}: unexpected argument {next(iter(given))!r}; it takes {self}"
            )
        return tuple(values)

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
        if self.container is None:
            return (value,)
        if isinstance(value, torch.Tensor) and len(self.results) == 1:
            return (value,)  # torch unwraps a tuple of one
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)

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
        return tuple(values) if self.container is tuple else self.container(*values)


def from_function(
    name: str, function: Callable[..., Any], *, mutates: Sequence[str] = (), scope: Mapping[str, Any] = {}
) -> Schema:
    """Return the schema of `function` under `name`; `scope` holds the caller's local names.

    Raises:
        SchemaError: the name has no namespace, or an annotation or default cannot be carried.
    """
    check_name(name)
    where = f"declaring {name} from {describe(function)}"
    signature = inspect.signature(function)
    try:
        hints = inspect.get_annotations(function, eval_str=True, locals=dict(scope))
    except NameError as err:
        raise SchemaError(
            f"{where}: an annotation uses {err.name!r}, which is not defined there. Define it before the op, "
            "at module level or in the function that declares the op.",
            op=name,
        ) from None
    except (SyntaxError, AttributeError, TypeError) as err:
        raise SchemaError(
            f"{where}: an annotation cannot be read, {type(err).__name__}: {err}; expected {_ACCEPTED}. "
            "Correct the annotation.",
            op=name,
        ) from err
    params = tuple(_param(p, hints, mutates, where, name) for p in signature.parameters.values())
    names = [p.name for p in params]
    for mutated in mutates:
        if mutated not in names:
            raise SchemaError(
                f"{where}: mutates_args names {mutated!r}, the arguments are {', '.join(names) or 'none'}. "
                "Name arguments of the function.",
                op=name,
            )
    results, container = _results(hints.get("return", REQUIRED), scope, where, name)
    return Schema(name, params, results, container)


def check_name(name: str, doing: str = "declaring an op") -> None:
    """Raise SchemaError unless `name` is `namespace::name`."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*::[A-Za-z_]\w*", name):
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


def check_signature(schema: Schema, function: Callable[..., Any], what: str) -> None:
    """Raise RegistrationError unless `function` can be called with the op's arguments, in their order."""
    names = [p.name for p in schema.params]
    if not callable(function):
        raise RegistrationError(
            f"registering {what} of {schema.name}: found {function!r}; expected a function of "
            f"({', '.join(names)}). Pass one.",
            op=schema.name,
        )
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


def _param(
    parameter: inspect.Parameter, hints: Mapping[str, Any], mutates: Sequence[str], where: str, op: str
) -> Param:
    name = parameter.name
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise SchemaError(
            f"{where}: parameter {parameter} takes any number of values, an op has a fixed signature. "
            f"Name the arguments, or use {name}: list[Tensor].",
            op=op,
        )
    reserved = _RESERVED if parameter.kind is parameter.KEYWORD_ONLY else _RESERVED[:1]
    if name.startswith("_") or name in reserved:
        raise SchemaError(
            f"{where}: parameter {name!r} has a name that opkit or torch needs; expected one that does not start "
            f"with an underscore and is not {' or '.join(reserved)}. Rename it.",
            op=op,
        )
    if name not in hints:
        raise SchemaError(
            f"{where}: parameter {name!r} has no annotation; expected {_ACCEPTED}. Write {name}: Tensor.",
            op=op,
        )
    value_type = _value_type(hints[name])
    if value_type is None:
        raise SchemaError(
            f"{where}: parameter {name!r} is annotated {_shown(hints[name])}; expected {_ACCEPTED}. "
            "Change the annotation, or pass the value in parts that have these types.",
            op=op,
        )
    mutated = name in mutates
    if mutated and (value_type.base != "Tensor" or value_type.optional or value_type.optional_elements):
        raise SchemaError(
            f"{where}: mutates_args names {name!r}, which is {_shown(hints[name])}; only a Tensor or "
            "list[Tensor] that is always given can be mutated. Declare two ops, one with and one without it.",
            op=op,
        )
    default = parameter.default
    if isinstance(default, tuple) and value_type.is_list:
        default = list(default)
    if default is not REQUIRED and not _fits(default, value_type):
        raise SchemaError(
            f"{where}: parameter {name!r} has the default {default!r}, which does not fit "
            f"{_shown(hints[name])}, or which the schema language cannot hold. Use None and fill it in the "
            "function, or another default.",
            op=op,
        )
    return Param(name, value_type, default, parameter.kind is parameter.KEYWORD_ONLY, mutated)


def _value_type(annotation: Any) -> ValueType | None:
    """Return the type an annotation stands for, or None where it stands for none."""
    inner = _unwrap_optional(annotation)
    if inner is not None:
        found = _value_type(inner)
        if found is None or found.optional:
            return None
        return ValueType(found.base, found.is_list, True, found.optional_elements)
    if isinstance(annotation, collections.abc.Hashable) and annotation in _BASES:
        return ValueType(_BASES[annotation])
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        origin, args = list, args[:1]
    if origin in _LISTS and len(args) == 1:
        element = _value_type(args[0])
        if element is None or element.is_list:
            return None
        if element.optional and element.base != "Tensor":
            return None
        return ValueType(element.base, True, False, element.optional)
    return None


def _unwrap_optional(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        args = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(args) == 1 and len(typing.get_args(annotation)) == 2:
            return args[0]
    return None


def _results(
    annotation: Any, scope: Mapping[str, Any], where: str, op: str
) -> tuple[tuple[Result, ...], Callable[..., Any] | None]:
    def refuse(found: str) -> SchemaError:
        return SchemaError(f"{where}: {found}; expected {_RESULTS}. Change the return annotation.", op=op)

    def result(name: str, part: Any) -> Result:
        value_type = _value_type(part)
        if value_type is None or value_type.base != "Tensor" or value_type.optional:
            raise refuse(f"the return annotation holds {_shown(part)} (for {name})")
        return Result(name, value_type)

    if annotation is REQUIRED:
        raise refuse("there is no return annotation")
    if annotation is None or annotation is type(None):
        return (), None
    if isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields"):
        try:
            hints = typing.get_type_hints(annotation, localns=dict(scope))
        except NameError as err:
            raise refuse(f"a field of {annotation.__name__} uses {err.name!r}, not defined there") from None
        fields = annotation._fields
        return tuple(result(f, hints.get(f, REQUIRED)) for f in fields), annotation
    parts: Sequence[Any] | None = None
    if isinstance(annotation, tuple):  # the tutorials' spelling: -> (Tensor, Tensor)
        parts = annotation
    elif typing.get_origin(annotation) is tuple:
        parts = typing.get_args(annotation)
    if parts is not None:
        if not parts or Ellipsis in parts:
            raise refuse(f"the return annotation is {_shown(annotation)}, which has no fixed length")
        return tuple(result(f"out{i}", part) for i, part in enumerate(parts)), tuple
    return (result("out", annotation),), None


_PYTHON: dict[str, tuple[type, ...]] = {
    "Tensor": (),
    "SymInt": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Device": (torch.device,),
}


def _fits(default: Any, value_type: ValueType) -> bool:
    """Whether the schema language can hold the default of an argument."""
    if default is None:
        return value_type.optional
    if value_type.is_list:  # the parser knows list literals of integers only
        return (
            value_type.base == "SymInt"
            and isinstance(default, list)
            and all(type(i) is int and -(2**63) <= i < 2**63 for i in default)
        )
    if isinstance(default, bool):
        return value_type.base == "bool"
    if isinstance(default, float) and not math.isfinite(default):
        return False
    if isinstance(default, int) and not -(2**63) <= default < 2**63:
        return False
    if isinstance(default, str) and not default.isascii():
        return False
    return isinstance(default, _PYTHON[value_type.base])


def _literal(default: Any) -> str:
    if isinstance(default, torch.dtype):
        return str(default).removeprefix("torch.")
    if isinstance(default, (str, torch.device)):
        return json.dumps(str(default))
    return str(default)


def _shown(annotation: Any) -> str:
    if annotation is REQUIRED:
        return "nothing"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation)
