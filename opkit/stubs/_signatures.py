"""An op as a function in a stub: its signature by its schema, in Python's types."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import torch

from opkit.errors import SchemaError
from opkit.spec import text
from opkit.spec.schema import REQUIRED, Param, Schema
from opkit.spec.types import ValueType
from opkit.stubs._names import Names

_PLAIN = {"SymInt": "int", "int": "int", "float": "float", "bool": "bool", "str": "str", "complex": "complex"}
_LITERALS = (bool, int, float, str, complex)
_TORCHS = {
    "Tensor": "Tensor", "ScalarType": "dtype", "Device": "device", "Layout": "layout",
    "MemoryFormat": "memory_format", "Generator": "Generator",
}  # fmt: skip


def op(name: str, found: Any, names: Names) -> str:
    """Return an Op under a name, as the decorator would make it of a function."""
    lines = _container(found.schema, names)
    opkit = names.use("opkit")
    return f'{lines}@{opkit}.op("{found.name}")\ndef {name}{signature(found.schema, names)}: ...'


def overloads(name: str, found: Any, names: Names, *, method: bool = False) -> str:
    """Return what `torch.ops` has, an overload or all of an operator, as a function."""
    every = [getattr(found, one) for one in found.overloads()] if hasattr(found, "overloads") else [found]
    lines = []
    for one in every:
        lines += [f"@{names.use('typing', 'overload')}"] if len(every) > 1 else []
        lines += ["@staticmethod"] if method else []
        lines += [f"def {name}{_of_torchs(one, names)}: ..."]
    return "\n".join(lines)


def namespace(name: str, operators: dict[str, Any], names: Names) -> str:
    """Return a namespace of `torch.ops` as a class with its operators as functions."""
    body = "\n".join(overloads(one, found, names, method=True) for one, found in sorted(operators.items()))
    return f"class _{name}:\n{indented(body or '...')}\n\n{name}: _{name}"


def signature(schema: Schema, names: Names) -> str:
    """Return the parameters and the result of an op: `(x: Tensor, eps: float = 1e-06) -> Tensor`."""
    parts = []
    for place, param in enumerate(schema.positional):
        parts.append(_parameter(param, names))
        if param.name == "self":  # which torch's own ops call their first argument, and Python something else
            parts[place:] = [parts[place].replace("self", "input", 1), "/"]
    if schema.keyword_only:
        parts += ["*", *(_parameter(param, names) for param in schema.keyword_only)]
    return f"({', '.join(parts)}) -> {_result(schema, names)}"


def indented(body: str) -> str:
    return "\n".join(f"    {line}" if line else line for line in body.splitlines())


def _of_torchs(overload: Any, names: Names) -> str:
    try:
        return signature(text.of_parsed(overload._schema, "reading"), names)
    except SchemaError:  # a result that is a view, or what else only torch's own ops have
        any_ = names.use("typing", "Any")
        return f"(*args: {any_}, **kwargs: {any_}) -> {any_}"


def _parameter(param: Param, names: Names) -> str:
    written = f"{param.name}: {_type(param.type, names)}"
    return written if param.default is REQUIRED else f"{written} = {_default(param, names)}"


def _type(value: ValueType, names: Names) -> str:
    if value.is_list:
        element = dataclasses.replace(
            value, is_list=False, optional=value.optional_elements, length=None, is_tuple=False
        )
        inner = _type(element, names)
        written = (
            f"tuple[{', '.join([inner] * (value.length or 0))}]"
            if value.is_tuple
            else f"{names.use('collections.abc', 'Sequence')}[{inner}]"
        )
    else:
        written = _one(value, names)
    return f"{written} | None" if value.optional else written


def _one(value: ValueType, names: Names) -> str:
    if value.choices is not None:
        kind = value.choices.kind
        if kind is not None and _is_importable(kind):
            return names.use(kind.__module__, kind.__qualname__)
        members = [m for m in value.choices._members.values() if not isinstance(m, enum.Enum)]
        if members:
            return f"{names.use('typing', 'Literal')}[{', '.join(map(repr, members))}]"
        return names.use("typing", "Any")  # an Enum that is a local of a function
    if value.base.endswith("[]"):
        sequence = names.use("collections.abc", "Sequence")
        return f"{sequence}[{_one(ValueType(value.base[:-2]), names)}]"
    if value.base == "Scalar":
        return "complex"  # for which type checkers take an int and a float too
    if value.base in _PLAIN:
        return _PLAIN[value.base]
    if value.base in _TORCHS:
        return names.use("torch", _TORCHS[value.base])
    return names.use("typing", "Any")


def _result(schema: Schema, names: Names) -> str:
    if not schema.results:
        return "None"
    container = schema.container
    if isinstance(container, type) and container is not tuple:
        return (
            names.use(container.__module__, container.__qualname__)
            if _is_importable(container)
            else f"_{container.__name__}"
        )
    types = [_returned(result.type, names) for result in schema.results]
    return f"tuple[{', '.join(types)}]" if container is tuple or len(types) > 1 else types[0]


def _returned(value: ValueType, names: Names) -> str:
    if value.base == "Tensor" and value.is_list:
        element = f"{names.use('torch', 'Tensor')}{' | None' if value.optional_elements else ''}"
        return f"list[{element}]"
    return _type(value, names)


def _container(schema: Schema, names: Names) -> str:
    """Return the class of the results where it is a local of a function, or nothing."""
    container = schema.container
    if not isinstance(container, type) or container is tuple or _is_importable(container):
        return ""
    if not names.define(container.__name__):
        return ""
    fields = "\n".join(f"    {r.name}: {_returned(r.type, names)}" for r in schema.results)
    if dataclasses.is_dataclass(container):
        return f"@{names.use('dataclasses', 'dataclass')}\nclass _{container.__name__}:\n{fields}\n\n"
    return f"class _{container.__name__}({names.use('typing', 'NamedTuple')}):\n{fields}\n\n"


def _is_importable(kind: type) -> bool:
    return kind.__module__ != "__main__" and kind.__qualname__.isidentifier()


def _default(param: Param, names: Names) -> str:
    value, choices = param.default, param.type.choices
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return f"{names.use('torch')}.{str(value).removeprefix('torch.')}"
    if (choices is not None and choices.kind is not None) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        return "None" if value is None else "..."
    if isinstance(value, list):
        value = tuple(value)
        return repr(value) if all(type(one) in _LITERALS for one in value) else "..."
    return repr(value) if value is None or type(value) in _LITERALS else "..."
