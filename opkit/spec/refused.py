"""A call that torch refuses because of the type of an argument, in the words of the op's own declaration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from opkit.errors import ArgumentError, OpkitError
from opkit.spec.schema import Schema
from opkit.spec.types import ValueType

# torch names the argument (aten/src/ATen/core/function_schema.cpp, formatTypeMismatchMsg); the rest is opkit's.
_REFUSED = re.compile(r"(\S+)\(\) Expected a value of type '[^']*' for argument '(\w+)' but instead found")

_WORDS = {
    "Tensor": ("a Tensor", "Tensors"),
    "SymInt": ("an int", "ints"),
    "int": ("an int", "ints"),
    "float": ("a float", "floats"),
    "complex": ("a complex", "complex numbers"),
    "Scalar": ("an int or a float", "numbers"),
    "bool": ("a bool", "bools"),
    "str": ("a str", "strs"),
    "ScalarType": ("a torch.dtype", "torch.dtypes"),
    "Device": ("a torch.device", "torch.devices"),
    "Layout": ("a torch.layout", "torch.layouts"),
    "MemoryFormat": ("a torch.memory_format", "torch.memory_formats"),
    "Generator": ("a torch.Generator", "torch.Generators"),
}


def explain(schema: Schema, error: Exception, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise what is wrong with the arguments of a call, if that is why torch raised `error`.

    Raises:
        ArgumentError: one is of another type than declared.
        TypeError: one is missing, unknown, or given twice.
    """
    if isinstance(error, OpkitError):
        return
    refused = _REFUSED.match(str(error))
    if refused is None:
        count = len(schema.positional)
        if len(args) > count:  # `fill` takes keyword-only arguments by their place, too
            raise TypeError(
                f"calling {schema.name}: {len(args)} positional arguments, it takes {count}"
            ) from None
        schema.fill(args, kwargs)
        _refuse_none(schema, args, kwargs)
        return
    found = [(i, p) for i, p in enumerate(schema.params) if p.name == refused[2]]
    if refused[1] != f"{schema.namespace}::{schema.opname}" or not found:
        return  # of an op that a kernel calls
    place, param = found[0]
    value = args[place] if place < len(args) and not param.keyword_only else kwargs.get(param.name)
    advice = "Pass one."
    if inspect.isfunction(value):
        advice = "Pass one; to make an op of a function, decorate it with @opkit.op."
    raise ArgumentError(
        f"calling {schema.name}: argument {param.name} is {_shown(value)}; expected {_expected(param.type)}. {advice}",
        op=schema.name,
    ) from None


def _refuse_none(schema: Schema, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise for a None that torch took for a Tensor, which has let a kernel fail."""
    for place, param in enumerate(schema.params):
        value = args[place] if place < len(args) else kwargs.get(param.name, param.default)
        if value is None and param.type.is_tensor and not param.type.optional:
            raise ArgumentError(
                f"calling {schema.name}: argument {param.name} is None; expected a Tensor. Pass one.",
                op=schema.name,
            )


def _expected(kind: ValueType) -> str:
    one, many = _WORDS.get(kind.base, (kind.base, kind.base))
    count = f"{kind.length} " if kind.length else ""
    text = f"a list of {count}{many}{' and Nones' if kind.optional_elements else ''}" if kind.is_list else one
    return f"{text} or None" if kind.optional else text


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return "a Tensor"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of ({', '.join(map(_shown, value[:3]))}{', …' if len(value) > 3 else ''})"
    text = repr(value)
    return f"{text if len(text) < 60 else text[:56] + ' …'} ({type(value).__name__})"
