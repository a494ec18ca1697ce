"""An op as the core takes it: plain values that `core/module.cpp` reads by their names.

Not every op has such a description: one with an argument that torch carries in another form than Python code sees,
or of a type that the core does not know, stays with Python.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from opkit.spec.plan import DTYPES, Plan, Tensors
from opkit.spec.schema import REQUIRED, Schema
from opkit.spec.shapes import Dim

KINDS = {"Tensor": 0, "SymInt": 1, "int": 1, "float": 2, "bool": 3, "str": 4, "ScalarType": 5, "Device": 6}
_NO_LISTS = ("ScalarType", "Device")
_NAME, _NUMBER, _STAR, _ANY, _EXPRESSION = range(5)
_PUSH, _LOAD, _ADD, _SUB, _MUL, _FLOORDIV, _MOD, _NEGATE = range(8)
_OPERATORS: dict[type[ast.AST], int] = {
    ast.Add: _ADD,
    ast.Sub: _SUB,
    ast.Mult: _MUL,
    ast.FloorDiv: _FLOORDIV,
    ast.Mod: _MOD,
}
_NO_RULE, _FIXED, _OF_TENSOR, _FIRST = range(4)


class ParamValue(NamedTuple):
    """An argument."""

    name: str
    required: bool
    default: Any
    kind: int
    list: bool
    optional: bool
    mutated: bool
    length: int
    """Of the tuple that Python code sees where a list of just so many is declared; or 0."""


class ResultValue(NamedTuple):
    """A result."""

    kind: int
    list: bool
    optional: bool


class DimValue(NamedTuple):
    """A dimension; `value` is a number or the place of its name, `code` an expression in postfix order."""

    kind: int
    value: int = 0
    code: tuple[int, ...] = ()


class EntryValue(NamedTuple):
    """What the shape line says of one tensor."""

    place: int
    dims: tuple[DimValue, ...]
    dtype_kind: int
    dtype_value: Any
    allowed: tuple[torch.dtype, ...]


class PlanValue(NamedTuple):
    """A shape line."""

    inputs: tuple[EntryValue, ...]
    outputs: tuple[EntryValue, ...]
    ints: tuple[tuple[int, int], ...]
    names: int
    stars: int


class RuleValue(NamedTuple):
    """A formula that is an object of opkit's: `save(ctx, values, outputs)`, and `gradients(ctx, grads)`."""

    constant: tuple[bool, ...]
    """For each result, whether it has no gradient by declaration."""
    save: Callable[..., Any]
    gradients: Callable[..., Any]
    form: int = 2
    settled: bool = False
    """Whether all that the op writes into is said to have no gradient; here and below."""


class FunctionValue(NamedTuple):
    """A formula in torch's form."""

    constant: tuple[bool, ...]
    setup: Callable[..., Any] | None
    backward: Callable[..., Any]
    counted: Callable[..., Any]
    """Gets what `backward` returned where that is not a gradient for each argument."""
    form: int = 1
    settled: bool = False


class OpValue(NamedTuple):
    """A formula that is another op."""

    constant: tuple[bool, ...]
    op: str
    saves: tuple[tuple[bool, int], ...]
    """(whether it is an output, its place)"""
    outputs: tuple[int, ...]
    """Whose gradients it takes."""
    arguments: tuple[int, ...]
    """Whose gradients it returns."""
    lost: tuple[int, ...]
    """Outputs that it saves although they have no gradient, and so no history."""
    rule: RuleValue
    object: Any
    form: int = 0
    settled: bool = False


class Derivation(NamedTuple):
    """What Python has to say where an op is differentiated; see `transforms.gradient`, which makes it."""

    node_name: str
    twin: Callable[..., Any]
    """The op's autograd kernel in Python, called with the raw dispatch keys and all arguments."""
    formula: Callable[[], OpValue | FunctionValue | RuleValue]
    """Gives the formula now registered."""
    lost: Callable[..., Any]
    """Tells which of the tensors that a formula saved have lost their history."""
    tracked: Callable[..., Any]
    """Gives a context as the formula must see it where its result is differentiated once more."""
    again: Callable[..., Any]
    """Applies a formula that is another op as Python does."""
    alone: Callable[..., Any]
    """Calls a function whose own derivatives are not compiled autograd's business."""
    check: Callable[..., Any]
    """Raises for a gradient that cannot be that of its argument."""
    flatten: Callable[..., Any]
    """Lays gradients flat, or raises for one that is none."""


class RecordValue(NamedTuple):
    """An op, and what the core asks Python about it."""

    name: str
    torch_name: str
    formula: OpValue | FunctionValue | RuleValue
    positional: int
    params: tuple[ParamValue, ...]
    results: tuple[ResultValue, ...]
    plan: PlanValue | None
    keywords: tuple[str, ...] | None
    container: Any
    is_tuple: bool
    contiguous: bool
    """Whether kernels get contiguous tensors, which `run` makes of others."""
    choose: Callable[..., Any]
    run: Callable[..., Any]
    expect: Callable[..., Any]
    conform: Callable[..., Any]
    explain: Callable[..., Any]
    pack: Callable[..., Any]
    derivation: Derivation


def is_plain(schema: Schema) -> bool:
    """Whether the core can take an op's arguments and pass on its results as they are."""
    if any(p.filled or not p.type.is_tuple for _, p in schema.special):
        return False
    types = [*(param.type for param in schema.params), *(result.type for result in schema.results)]
    return all(
        type.base in KINDS
        and type.choices is None
        and not type.optional_elements
        and not (type.is_list and type.base in _NO_LISTS)
        # torch fills up a list of a fixed length from a lone value, where Python code does not see a tuple
        and (type.length is None or (type.is_tuple and type.base != "Tensor"))
        for type in types
    )


def params(schema: Schema) -> tuple[ParamValue, ...]:
    """Return the arguments of a plain op."""
    return tuple(
        ParamValue(
            param.name,
            param.default is REQUIRED,
            None if param.default is REQUIRED else param.default,
            KINDS[param.type.base],
            param.type.is_list,
            param.type.optional,
            param.mutated,
            param.type.length if param.type.is_tuple and param.type.length else 0,
        )
        for param in schema.params
    )


def results(schema: Schema) -> tuple[ResultValue, ...]:
    """Return the results of a plain op."""
    return tuple(
        ResultValue(KINDS[result.type.base], result.type.is_list, result.type.optional)
        for result in schema.results
    )


def plan(declared: Plan) -> PlanValue | None:
    """Return a shape line, or None where the core cannot check calls by it."""
    if declared.missing is not None or declared.each or declared.optional_ints:
        return None
    if any(t.entry.is_list for t in (*declared.inputs, *declared.outputs)):
        return None
    return _Names(declared).plan()


class _Names:
    """Puts numbers in the place of a line's names."""

    def __init__(self, declared: Plan) -> None:
        self.declared = declared
        self.places = {p.name: i for i, p in enumerate(declared.schema.params)}
        self.results = {r.name: i for i, r in enumerate(declared.schema.results)}
        self.names: dict[str, int] = {}
        self.stars: dict[str, int] = {}

    def plan(self) -> PlanValue | None:
        ints = tuple((self.places[name], self._name(name)) for name in self.declared.int_names)
        inputs = [self._entry(t, self.places[t.name]) for t in self.declared.inputs]
        outputs = [self._entry(t, self.results[t.name]) for t in self.declared.outputs]
        said = [e for e in inputs if e is not None], [e for e in outputs if e is not None]
        if len(said[0]) != len(inputs) or len(said[1]) != len(self.declared.schema.results):
            return None
        if any(dim.kind == _ANY or (dim.kind == _STAR and dim.value < 0) for e in said[1] for dim in e.dims):
            return None  # an output of any shape
        return PlanValue(tuple(said[0]), tuple(said[1]), ints, len(self.names), len(self.stars))

    def _name(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))

    def _entry(self, tensors: Tensors, place: int) -> EntryValue | None:
        dims = [self._dim(dim) for dim in tensors.entry.dims]
        known = tuple(dim for dim in dims if dim is not None)
        if len(known) != len(dims) or tensors.optional_elements:
            return None
        rule, kind = tensors.dtype, _NO_RULE
        dtype: Any = 0
        if rule is not None:
            if rule.kind == "fixed":
                kind, dtype = _FIXED, rule.fixed
            elif rule.kind == "tensor" and not self.declared.param(rule.name).type.is_list:
                kind, dtype = _OF_TENSOR, self.places[rule.name]
            elif rule.kind == "first":
                kind = _FIRST
            else:
                return None
        allowed = tuple(DTYPES[name] for name in tensors.entry.dtypes)
        return EntryValue(place, known, kind, dtype, allowed)

    def _dim(self, dim: Dim) -> DimValue | None:
        if dim.is_open:
            return None
        if dim.star:
            if dim.text == "...":
                return DimValue(_STAR, -1)
            return DimValue(_STAR, self.stars.setdefault(dim.text, len(self.stars)))
        if dim.text == "_":
            return DimValue(_ANY)
        if dim.is_name:
            return DimValue(_NAME, self._name(dim.text))
        if dim.text.isdigit() and int(dim.text) < 2**63:
            return DimValue(_NUMBER, int(dim.text))
        code: list[int] = []
        if not self._compile(ast.parse(dim.text, mode="eval").body, code):
            return None
        return DimValue(_EXPRESSION, 0, tuple(code))

    def _compile(self, node: ast.AST, code: list[int]) -> bool:
        """Append an expression in postfix order; False where the core cannot compute it."""
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) < 2**63:
            code += (_PUSH, node.value)
            return True
        if isinstance(node, ast.Name):
            code += (_LOAD, self._name(node.id))
            return True
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            if not self._compile(node.operand, code):
                return False
            code.append(_NEGATE)
            return True
        operator = _OPERATORS.get(type(node.op)) if isinstance(node, ast.BinOp) else None
        if operator is None or not isinstance(node, ast.BinOp):
            return False
        if not (self._compile(node.left, code) and self._compile(node.right, code)):
            return False
        code.append(operator)
        return True
