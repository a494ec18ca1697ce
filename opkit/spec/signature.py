"""From a Python function's signature to a schema: annotations, defaults and the return annotation.

Whatever cannot become part of a torch schema is refused here, with the parameter's name, what was found and
what is accepted.
"""

from __future__ import annotations

import builtins
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, NamedTuple

import torch

from opkit.errors import SchemaError
from opkit.spec import results as forms
from opkit.spec import types
from opkit.spec.results import Result
from opkit.spec.schema import REQUIRED, Param, Schema, check_name, describe
from opkit.spec.types import ValueType

_KIND = inspect.Parameter
_RESERVED = ("opkit_backend", "keyset", "self")  # the last two are taken for keyword-only ones


def from_function(
    name: str, function: Callable[..., Any], *, mutates: Sequence[str] = (), scope: Mapping[str, Any] = {}
) -> Schema:
    """Return the schema of `function` under `name`; `scope` holds the caller's local names.

    Raises:
        SchemaError: the name has no namespace, or an annotation or default cannot be carried.
    """
    check_name(name)
    reading = Reading(name, function, scope)
    params = fill_in([reading.param(p, p.name in mutates) for p in reading.parameters])
    for mutated in mutates:
        if mutated not in [p.name for p in params]:
            raise reading.error(
                f"mutates_args names {mutated!r}, the arguments are {', '.join(p.name for p in params) or 'none'}",
                "Name arguments of the function.",
            )
    refuse_mode(params, f"declaring {name} from {describe(function)}", name)
    return Schema(name, params, *reading.results())


def refuse_mode(params: Sequence[Param], doing: str, op: str) -> None:
    """Raise SchemaError where torch.compile would fail at a name (torch/_ops.py, redirect_to_mode, up to 2.15)."""
    if any(p.mutated for p in params) and any(p.name == "mode" for p in params):
        raise SchemaError(
            f"{doing}: an op that mutates has the argument 'mode'; expected another name, since torch.compile passes "
            "the arguments of such an op to a function that has a 'mode' of its own. Rename it.",
            op=op,
        )


class Reading:
    """A function's signature as an op's declaration reads it."""

    def __init__(self, op: str, function: Callable[..., Any], scope: Mapping[str, Any]) -> None:
        self.op = op
        self.function = function
        self.scope = scope
        self.parameters = _parameters(function)
        self._globals = getattr(inspect.unwrap(function), "__globals__", {})
        try:
            found = inspect.get_annotations(function)
            self.hints = {n: self.evaluate(a) if isinstance(a, str) else a for n, a in found.items()}
        except Exception as err:
            raise self._unreadable(err) from err

    def error(self, found: str, advice: str) -> SchemaError:
        """Return the error for a declaration from this function."""
        return SchemaError(
            f"declaring {self.op} from {describe(self.function)}: {found}. {advice}", op=self.op
        )

    def param(self, parameter: inspect.Parameter | Plain, mutated: bool) -> Param:
        """Return one argument of the op."""
        self.check_name(parameter)
        name = parameter.name
        if name not in self.hints:
            raise self.error(
                f"parameter {name!r} has no annotation; expected {types.ACCEPTED}", f"Write {name}: Tensor."
            )
        annotation = self.hints[name]
        value_type = self._read(types.of_annotation, annotation)
        if value_type is None:
            raise self.error(
                f"parameter {name!r} is annotated {types.shown(annotation)}; expected {types.ACCEPTED}",
                types.advice(annotation),
            )
        if mutated and (value_type.base != "Tensor" or value_type.optional or value_type.optional_elements):
            raise self.error(
                f"mutates_args names {name!r}, which is {types.shown(annotation)}; only a Tensor or list[Tensor] that "
                "is always given can be mutated",
                "Declare two ops, one with and one without it.",
            )
        default = self.default(parameter, value_type, annotation)
        return Param(name, value_type, default, parameter.kind is _KIND.KEYWORD_ONLY, mutated)

    def check_name(self, parameter: inspect.Parameter | Plain) -> None:
        """Raise SchemaError where torch could not call an argument so."""
        name = parameter.name
        if parameter.kind in (_KIND.VAR_POSITIONAL, _KIND.VAR_KEYWORD):
            raise self.error(
                f"parameter {parameter} takes any number of values, an op has a fixed signature",
                f"Name the arguments, or use {name}: list[Tensor].",
            )
        reserved = _RESERVED if parameter.kind is _KIND.KEYWORD_ONLY else _RESERVED[:1]
        if name.startswith("_") or name in reserved:
            raise self.error(
                f"parameter {name!r} has a name that opkit or torch needs; expected one that does not start "
                f"with an underscore and is not {' or '.join(reserved)}",
                "Rename it.",
            )

    def default(self, parameter: inspect.Parameter | Plain, value_type: ValueType, annotation: Any) -> Any:
        """Return a parameter's default as torch carries it, or REQUIRED."""
        given = parameter.default
        if given is REQUIRED:
            return REQUIRED
        found = list(given) if isinstance(given, (tuple, list)) and value_type.is_list else given
        if value_type.is_carried:
            try:
                found = value_type.carry(found)
            except (ValueError, TypeError) as err:
                expected = str(err) if isinstance(err, ValueError) else types.shown(annotation)
                raise self._misfit(parameter.name, given, expected) from None
        if not types.is_value(found, value_type):
            raise self._misfit(parameter.name, given, types.shown(annotation))
        return found

    def results(self) -> tuple[tuple[Result, ...], Callable[..., Any] | None]:
        """Return what the function returns, and the container in which callers get it."""
        if "return" not in self.hints:
            raise self._refused("there is no return annotation")
        try:
            return forms.from_annotation(self.hints["return"], self.evaluate, self.scope)
        except forms.RefusedError as err:
            raise self._refused(str(err)) from None
        except Exception as err:  # a string inside of it
            raise self._unreadable(err) from err

    def evaluate(self, text: str) -> Any:
        """Return what an annotation in quotes stands for."""
        if text.isidentifier():  # most are, and looking one up is cheaper than compiling it
            for names in (self.scope, self._globals, vars(builtins)):
                if text in names:
                    return names[text]
        return eval(text, self._globals, self.scope)

    def _read(self, read: Callable[..., ValueType | None], annotation: Any) -> ValueType | None:
        try:
            return read(annotation, self.evaluate)
        except Exception as err:
            raise self._unreadable(err) from err

    def _refused(self, found: str) -> SchemaError:
        return self.error(f"{found}; expected {forms.ACCEPTED}", "Change the return annotation.")

    def _misfit(self, name: str, default: Any, expected: str) -> SchemaError:
        return self.error(
            f"parameter {name!r} has the default {default!r}; expected {expected}",
            "Use None and fill it in the function, or another default.",
        )

    def _unreadable(self, err: Exception) -> SchemaError:
        if isinstance(err, NameError):
            return self.error(
                f"an annotation uses {err.name!r}, which is not defined there",
                "Define it before the op, at module level or in the function that declares the op.",
            )
        return self.error(
            f"an annotation cannot be read, {type(err).__name__}: {err}; expected {types.ACCEPTED}",
            "Correct the annotation.",
        )


class Plain(NamedTuple):
    """A parameter of a plain function, without what `inspect.signature` spends on one."""

    name: str
    kind: Any
    default: Any


def _parameters(function: Callable[..., Any]) -> Sequence[inspect.Parameter | Plain]:
    """Return the parameters of a function."""
    odd = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    if not isinstance(function, FunctionType) or function.__code__.co_flags & odd or vars(function):
        return list(inspect.signature(function).parameters.values())
    code = function.__code__
    count, defaults = code.co_argcount, function.__defaults__ or ()
    names = code.co_varnames[: count + code.co_kwonlyargcount]
    values = (REQUIRED,) * (count - len(defaults)) + defaults
    found = [Plain(n, _KIND.POSITIONAL_OR_KEYWORD, v) for n, v in zip(names, values, strict=False)]
    own = function.__kwdefaults__ or {}
    return found + [Plain(n, _KIND.KEYWORD_ONLY, own.get(n, REQUIRED)) for n in names[count:]]


def fill_in(params: Sequence[Param]) -> tuple[Param, ...]:
    """Mark the defaults that the Op fills in: the schema language cannot hold them, or not at their place."""
    filled = []
    required_after = False
    for param in reversed(params):
        has = param.default is not REQUIRED
        fills = has and (
            not _is_literal(param.default, param.type) or (required_after and not param.keyword_only)
        )
        if not param.keyword_only and (fills or not has):
            required_after = True  # torch wants defaults last
        filled.append(replace(param, filled=True) if fills else param)
    return tuple(reversed(filled))


def _is_literal(default: Any, value_type: ValueType) -> bool:
    """Whether the schema language has a literal for a default."""
    if default is None:
        return True
    if value_type.is_list:
        numbers = value_type.base in ("SymInt", "int", "float", "bool") and not value_type.optional
        return numbers and all(_is_literal(v, replace(value_type, is_list=False)) for v in default)
    if isinstance(default, bool):
        return value_type.base == "bool"  # of a Scalar it would become a number
    if isinstance(default, (int, torch.dtype, torch.device)):
        return True
    if isinstance(default, (torch.layout, torch.memory_format)):
        return default in (torch.strided, torch.contiguous_format)  # the others the parser does not know
    if isinstance(default, float):
        return math.isfinite(default)
    if isinstance(default, str):
        return default.isascii()
    return False
