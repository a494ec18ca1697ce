"""From annotations to the types of the schema language, and from Python values to the ones torch carries.

Responsible for one type at a time. A `ValueType` is a value: it knows no op and registers nothing.
"""

from __future__ import annotations

import collections.abc
import contextlib
import enum
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from opkit import _torch_library
from opkit.spec import arrays
from opkit.spec.arrays import Array

ACCEPTED = (
    "Tensor, int, float, bool, str, complex, int | float, torch.dtype, torch.device, torch.layout, "
    "torch.memory_format, torch.Generator, an Enum, Literal[...] of str or int, Optional[...] of these, list[...] "
    "of these, and tuple[...] of one of these with a fixed length"
)

_BASES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.nn.Parameter: "Tensor",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    complex: "complex",
    torch.dtype: "ScalarType",
    torch.device: "Device",
    torch.layout: "Layout",
    torch.memory_format: "MemoryFormat",
    torch.Generator: "Generator",
}
_LISTS = (list, collections.abc.Sequence)
_NESTED = ("SymInt", "float")  # in lists of lists
_NO_LISTS = ("Generator", "Layout", "MemoryFormat")  # the schema language has no lists of these
_NUMBERS = {int, float, bool, complex}
_INT64 = range(-(2**63), 2**63)


class Choices:
    """A value that is one of a few: a Literal, or a member of an Enum. torch carries a str or an int.

    Attributes:
        base: `str` or `int`.
        shown: the legal values as error texts list them.
    """

    def __init__(self, base: str, carried: Mapping[Any, Any], kind: type[enum.Enum] | None = None) -> None:
        self.base = base
        self.kind = kind
        self._members = dict(carried)  # by what torch carries
        self._carried = {member: value for value, member in carried.items()}
        self.shown = ", ".join(_shown_value(m) for m in self._members.values())

    def carry(self, value: Any) -> Any:
        """Return what torch carries for a legal value; raise ValueError for another."""
        if self.kind is None:
            # True is 1 to a dict, and "a" to a StrEnum; what is given must be what the Literal says.
            if type(value) in (str, int) and value in self._members:
                return value
        elif isinstance(value, self.kind):
            if value in self._carried:
                return self._carried[value]
            return value.value  # a Flag that combines some
        elif type(value) in (str, int) and value in self._members:
            return value
        raise ValueError(value)

    def restore(self, value: Any) -> Any:
        """Return the legal value that torch carried as `value`; raise ValueError for another."""
        if self.kind is not None and isinstance(value, self.kind):
            return value
        if value in self._members:
            return self._members[value]
        if self.kind is not None and issubclass(self.kind, enum.Flag):
            return self.kind(value)
        raise ValueError(value)

    def __repr__(self) -> str:
        return f"<one of {self.shown}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choices) and (self.kind, self._members) == (other.kind, other._members)

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self._members)))


@dataclass(frozen=True)
class ValueType:
    """The type of one argument or result, in the terms of the schema language."""

    base: str
    is_list: bool = False
    optional: bool = False
    optional_elements: bool = False
    length: int | None = None
    """How many elements the schema says that a list has; torch fills it up from a lone one."""
    is_tuple: bool = False
    """Whether Python code sees a tuple of just that length."""
    choices: Choices | None = None
    array: Array | None = None
    """The shape that the annotation of a tensor says, as jaxtyping's do."""

    def __str__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        elements = "?" if self.optional_elements else ""
        brackets = f"[{self.length or ''}]" if self.is_list else ""
        return f"{self.base}{elements}{brackets}{'?' if self.optional else ''}"

    @property
    def is_tensor(self) -> bool:
        """Whether it is one Tensor, possibly None."""
        return self.base == "Tensor" and not self.is_list

    @property
    def is_carried(self) -> bool:
        """Whether torch carries its values in another form than Python code sees them."""
        return self.choices is not None or self.is_tuple or (self.is_list and self.base == "ScalarType")

    def carry(self, value: Any) -> Any:
        """Return what torch carries for a value.

        Raises:
            ValueError: it is no value of the type; the text says what is expected.
        """
        if value is None and self.optional:
            return None
        if self.is_list:
            self._check_length(value)
            return [self._carry_one(v) for v in value] if self.choices else value
        return self._carry_one(value)

    def restore(self, value: Any) -> Any:
        """Return what Python code sees where torch carried `value`.

        Raises:
            ValueError: it is no value of the type; the text says what is expected.
        """
        if value is None and self.optional:
            return None
        if self.is_list:
            self._check_length(value)
            if self.choices:
                value = [self._restore_one(v) for v in value]
            elif (
                self.base == "ScalarType"
            ):  # up to torch 2.12 a list of them arrives as numbers (pytorch#178645)
                value = [_torch_library.dtype_of(v) if isinstance(v, int) else v for v in value]
            return tuple(value) if self.is_tuple else value
        return self._restore_one(value)

    def _check_length(self, value: Any) -> None:
        if self.is_tuple and not (isinstance(value, (list, tuple)) and len(value) == self.length):
            raise ValueError(f"a tuple of {self.length} values")

    def _carry_one(self, value: Any) -> Any:
        assert self.choices is not None
        try:
            return self.choices.carry(value)
        except ValueError:
            raise ValueError(f"one of {self.choices.shown}") from None

    def _restore_one(self, value: Any) -> Any:
        assert self.choices is not None
        try:
            return self.choices.restore(value)
        except ValueError:
            raise ValueError(f"one of {self.choices.shown}") from None


_known: dict[Any, ValueType | None] = {}


def of_annotation(annotation: Any, names: Callable[[str], Any] | None = None) -> ValueType | None:
    """Return the type an annotation stands for, or None where it stands for none.

    Args:
        annotation: as `inspect.get_annotations` gives it.
        names: evaluates a string inside of it, as in `Optional["Tensor"]`.
    """
    try:
        return _known[annotation]
    except (KeyError, TypeError):  # not hashable: metadata of Annotated
        pass
    asked = False

    def ask(text: str) -> Any:
        nonlocal asked
        asked = True
        return names(text) if names is not None else None

    found = _of(annotation, ask)
    # A string means something else elsewhere, and a class of the user's is not held here.
    if (
        not asked
        and (found is None or found.choices is None)
        and isinstance(annotation, collections.abc.Hashable)
    ):
        with contextlib.suppress(TypeError):
            _known[annotation] = found
    return found


def _of(annotation: Any, names: Callable[[str], Any]) -> ValueType | None:
    if isinstance(annotation, (str, typing.ForwardRef)):
        text = annotation if isinstance(annotation, str) else annotation.__forward_arg__
        return of_annotation(names(text), names)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and origin is None:  # list[int] is a type to Python 3.10
        if annotation in _BASES:
            return ValueType(_BASES[annotation])
        if issubclass(annotation, enum.Enum):
            choices = _of_enum(annotation)
            return ValueType(choices.base, choices=choices) if choices is not None else None
    if annotation is torch.Size:
        return ValueType("SymInt", True)
    array = arrays.of_annotation(annotation)
    if array is not None:
        return ValueType("Tensor", array=array)
    inside = getattr(annotation, "__supertype__", None) or getattr(annotation, "__value__", None)
    if inside is not None and not isinstance(annotation, type):  # NewType, and the statement `type X = …`
        return of_annotation(inside, names)
    if origin is typing.Annotated:
        return of_annotation(args[0], names)
    if origin is typing.Literal:
        return _of_literal(args)
    if origin in (typing.Union, types.UnionType):
        return _of_union(args, names)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        origin, args = list, args[:1]
    if origin in _LISTS and len(args) == 1:
        return _list_of(args[0], names)
    if origin is tuple and args and all(a == args[0] for a in args):
        found = _list_of(args[0], names)
        return found and replace(found, length=len(args), is_tuple=True)
    return None


def _list_of(element: Any, names: Callable[[str], Any]) -> ValueType | None:
    found = of_annotation(element, names)
    if found is None or found.base in _NO_LISTS:
        return None
    if found.is_list:
        plain = found == ValueType(found.base, True) and found.base in _NESTED
        return ValueType(f"{found.base}[]", True) if plain else None
    if found.optional and found.base != "Tensor":
        return None
    return replace(found, is_list=True, optional=False, optional_elements=found.optional)


def _of_union(args: tuple[Any, ...], names: Callable[[str], Any]) -> ValueType | None:
    rest = [a for a in args if a is not type(None)]
    optional = len(rest) < len(args)
    if len(rest) > 1 and set(rest) <= _NUMBERS and int in rest and {float, complex} & set(rest):
        return ValueType("Scalar", optional=optional)
    found = {of_annotation(a, names) for a in rest}
    if len(found) != 1:
        return None
    only = found.pop()
    if only is None or (only.optional and optional):
        return None
    return replace(only, optional=only.optional or optional)


def _of_literal(args: tuple[Any, ...]) -> ValueType | None:
    rest = [a for a in args if a is not None]
    kinds = {type(a) for a in rest}
    if kinds not in ({str}, {int}) or (kinds == {int} and not all(a in _INT64 for a in rest)):
        return None
    base = "str" if kinds == {str} else "int"
    return ValueType(base, optional=len(rest) < len(args), choices=Choices(base, {a: a for a in rest}))


def _of_enum(kind: type[enum.Enum]) -> Choices | None:
    members = list(kind)
    values = [m.value for m in members]
    if not members:
        return None
    if all(isinstance(v, str) for v in values):
        return Choices("str", {str.__str__(m.value): m for m in members}, kind)
    if all(isinstance(v, int) and not isinstance(v, bool) and v in _INT64 for v in values):
        return Choices("int", {int(m.value): m for m in members}, kind)
    return Choices("str", {m.name: m for m in members}, kind)


_PYTHON: dict[str, tuple[type, ...]] = {
    "Tensor": (),
    "SymInt": (int,),
    "int": (int,),
    "float": (float, int),
    "complex": (complex, float, int),
    "Scalar": (float, int, complex, bool),
    "bool": (bool,),
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Device": (torch.device,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
    "Generator": (torch.Generator,),
}


def is_value(value: Any, value_type: ValueType) -> bool:
    """Whether an argument of the type can have this default; choices are told as torch carries them."""
    if value is None:
        return value_type.optional
    if value_type.is_list:
        element = replace(
            value_type, is_list=False, length=None, is_tuple=False, optional=value_type.optional_elements
        )
        fits = value_type.length in (None, len(value)) if isinstance(value, list) else False
        return fits and all(is_value(v, element) for v in value)
    base = value_type.base
    if base not in _PYTHON:  # a list in a list, or what only schema= can name
        return True
    if isinstance(value, bool) and base not in ("bool", "Scalar"):
        return False
    if isinstance(value, int) and value not in _INT64:
        return False
    return isinstance(value, _PYTHON[base])


def shown(annotation: Any) -> str:
    """Return an annotation as error texts write it."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation)


def advice(annotation: Any) -> str:
    """Return what to do about an annotation that no argument can have."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is dict or origin is dict:
        return "Pass the keys and the values as two lists, or each value as an argument of its own."
    if origin in (typing.Union, types.UnionType) and torch.Tensor in args:
        return "Declare it as a Tensor and let callers pass torch.tensor(value), or declare two ops."
    if origin in (typing.Union, types.UnionType):
        return "Choose one of them, or declare two arguments of which one is None."
    if origin is typing.Literal:
        return "Use values of one type, str or int."
    if origin is tuple:
        return "Use one type for all, or an argument for each."
    if annotation in (list, tuple, collections.abc.Sequence):
        return f"Say what is in it: {shown(annotation)}[int]."
    if origin in _LISTS:
        return "Pass it laid flat, with its lengths in another list."
    return "Change the annotation, or pass the value in parts that have these types."


def _shown_value(value: Any) -> str:
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else repr(value)
