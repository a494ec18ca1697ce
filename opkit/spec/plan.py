"""What a shape line means for one schema: checks on the inputs, and the outputs' metadata.

A `Plan` is made once per op. `Plan.infer` is generated Python (a few comparisons per tensor, so that
it may run in every call and under tracing); where it finds a mismatch, `Plan.explain` walks the same
entries slowly and raises with names. The C++ twin of the generated code is written by `opkit.cpp._glue`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch

from opkit.errors import ShapeError
from opkit.spec import _infer, shapes
from opkit.spec.mismatch import Mismatch
from opkit.spec.schema import Param, Schema
from opkit.spec.shapes import Dim, Entry, ShapeLine

DTYPES: dict[str, torch.dtype] = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


@dataclass(frozen=True)
class DtypeRule:
    """A resolved suffix: a fixed dtype, that of a Tensor argument, or the value of a dtype argument."""

    kind: str
    name: str

    @property
    def fixed(self) -> torch.dtype:
        """The dtype of a rule of kind `fixed`."""
        return DTYPES[self.name]


@dataclass(frozen=True)
class Tensors:
    """One tensor of the signature with its entry; `dtype` is None where nothing is said of it."""

    name: str
    entry: Entry
    dtype: DtypeRule | None
    optional: bool = False


class OpenSize(NamedTuple):
    """A size that depends on data: `?name`, at most `bound`. It stands in a shape in the place of a number."""

    name: str
    bound: int | None

    def __repr__(self) -> str:
        return f"?{self.name}" + ("" if self.bound is None else f"<={self.bound}")


class OutputMeta(NamedTuple):
    """What one output must be: contiguous without a stride, on the call's device without a device."""

    shape: tuple[Any, ...]  # int, torch.SymInt or OpenSize
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None
    device: torch.device | None = None


@dataclass(frozen=True)
class Plan:
    """A shape line bound to a schema."""

    schema: Schema
    line: ShapeLine
    inputs: tuple[Tensors, ...]
    outputs: tuple[Tensors, ...]

    @functools.cached_property
    def int_names(self) -> tuple[str, ...]:
        """Names of int arguments that the line uses as sizes."""
        used = {n for t in (*self.inputs, *self.outputs) for d in t.entry.dims for n in d.names()}
        return tuple(p.name for p in self.schema.params if p.name in used and _is_int(p))

    @functools.cached_property
    def device_params(self) -> tuple[Param, ...]:
        """Arguments that decide the outputs' device: the first of them that is not None."""
        tensors = tuple(p for p in self.schema.params if p.type.is_tensor)
        return tensors or tuple(p for p in self.schema.params if str(p.type) == "Device")

    @functools.cached_property
    def binders(self) -> dict[str, tuple[str, ...]]:
        """Return for each dimension name the inputs that may bind it: the first sure one ends the list."""
        binders: dict[str, list[str]] = {}
        sure: set[str] = set(self.int_names)
        for tensors in self.inputs:
            for dim in tensors.entry.dims:
                if (dim.is_name or (dim.star and dim.text != "...")) and dim.text not in sure:
                    binders.setdefault(dim.text, []).append(tensors.name)
                    if not tensors.optional:
                        sure.add(dim.text)
        return {name: tuple(dict.fromkeys(who)) for name, who in binders.items()}

    @functools.cached_property
    def infer(self) -> Callable[..., tuple[tuple[OutputMeta, ...], torch.device]]:
        """Check all arguments, in schema order, and return the outputs' metadata and device."""
        text = _infer.source(self)
        namespace: dict[str, Any] = {
            "_Meta": OutputMeta,
            "_Open": OpenSize,
            "_explain": self.explain,
            "_torch": torch,
        }
        exec(compile(text, f"<plan of {self.schema.name}>", "exec"), namespace)
        infer: Callable[..., Any] = namespace["infer"]
        return infer

    def explain(self, *values: Any) -> NoReturn:
        """Raise the error that names the first argument which does not fit the line.

        Raises:
            ShapeError: a number of dimensions or a size does not fit.
            DtypeError: a dtype does not fit.
        """
        Mismatch(self, values).run()
        raise AssertionError(f"{self.schema.name}: the generated plan and its explanation disagree")


def bind(line: ShapeLine, schema: Schema, text: str) -> Plan:
    """Fit a parsed shape line to a schema.

    Raises:
        ShapeError: the number of entries, a suffix, or a name does not fit the signature.
    """
    op = schema.name
    inputs = [p for p in schema.params if p.type.base == "Tensor"]
    lists = [p.name for p in inputs if p.type.is_list] + [r.name for r in schema.results if r.type.is_list]
    if lists:
        raise ShapeError(
            f"reading the shape line of {op}: {lists[0]} is a list of tensors; a shape line cannot describe "
            "lists yet. Leave shapes= out and write the meta function with register_fake.",
            op=op,
        )
    if len(line.inputs) != len(inputs):
        raise _arity(text, op, "inputs", len(line.inputs), [p.name for p in inputs], 0)
    if len(line.outputs) != len(schema.results):
        raise _arity(
            text, op, "outputs", len(line.outputs), [r.name for r in schema.results], text.index("->")
        )
    bound = {p.name for p in schema.params if _is_int(p)}
    stars: set[str] = set()
    for entry in line.inputs:
        for dim in entry.dims:
            if dim.star:
                stars.add(dim.text)
            elif dim.is_name:
                bound.add(dim.text)
    bounds: dict[str, Dim] = {}
    for index, entry in enumerate((*line.inputs, *line.outputs)):
        for dim in entry.dims:
            _check_names(dim, bound, stars, index >= len(line.inputs), text, op)
            if dim.bound and bounds.setdefault(dim.text, dim.bound) != dim.bound:
                found = f"{dim} after ?{dim.text}<={bounds[dim.text]}"
                raise shapes.error(text, dim.column, op, found, "one bound for a name")
    ins = tuple(
        Tensors(p.name, e, _rule(e, schema, text, output=False), p.type.optional)
        for p, e in zip(inputs, line.inputs, strict=True)
    )
    outs = tuple(
        Tensors(r.name, _bounded(e, bounds), _rule(e, schema, text, output=True))
        for r, e in zip(schema.results, line.outputs, strict=True)
    )
    plan = Plan(schema, line, ins, outs)
    if outs and not plan.device_params:
        raise ShapeError(
            f"reading the shape line of {op}: the op has no Tensor argument and no device argument, so nothing "
            "says where its outputs live. Add an argument device: torch.device, or write register_fake.",
            op=op,
        )
    if not inputs and any(o.dtype is None for o in outs):
        raise ShapeError(
            f"reading the shape line of {op}: the op has no Tensor argument whose dtype its outputs could take. "
            "Give each output a suffix, as in 'n:float32'.",
            op=op,
        )
    return plan


def _bounded(entry: Entry, bounds: Mapping[str, Dim]) -> Entry:
    """Return an entry whose open sizes have the bound that is said anywhere of their names."""
    dims = (replace(d, bound=bounds.get(d.text)) if d.is_open else d for d in entry.dims)
    return replace(entry, dims=tuple(dims))


def _is_int(param: Param) -> bool:
    return str(param.type) == "SymInt"


def _arity(text: str, op: str, side: str, found: int, names: Sequence[str], column: int) -> ShapeError:
    tensors = f"{len(names)} ({', '.join(names)})" if names else "none"
    entries = "entry" if found == 1 else "entries"
    return shapes.error(text, column, op, f"{found} {entries} for {side}", f"{tensors}, one per Tensor")


def _check_names(dim: Dim, bound: set[str], stars: set[str], output: bool, text: str, op: str) -> None:
    if output and dim.is_any:
        raise shapes.error(text, dim.column, op, f"{dim.text!r} in an output", "a size that the inputs bind")
    if dim.is_open:
        if not output:
            raise shapes.error(text, dim.column, op, f"{dim} in an input", "a name, since the size is known")
        if dim.text in bound | stars:
            raise shapes.error(text, dim.column, op, f"{dim} and {dim.text!r}", "one meaning for a name")
    if dim.star:
        if output and dim.text not in stars:
            raise shapes.error(text, dim.column, op, f"{dim} is bound by no input", _known(stars, "*"))
        if dim.text in bound:
            raise shapes.error(text, dim.column, op, f"{dim} and {dim.text!r}", "one meaning for a name")
        return
    for name in dim.names():
        if name in stars:
            raise shapes.error(text, dim.column, op, f"{name!r} and '*{name}'", "one meaning for a name")
        if name not in bound:
            raise shapes.error(text, dim.column, op, f"{name!r} is bound by no input", _known(bound, ""))


def _known(names: set[str], prefix: str) -> str:
    return "one of " + ", ".join(prefix + n for n in sorted(names)) if names else "a number"


def _rule(entry: Entry, schema: Schema, text: str, *, output: bool) -> DtypeRule | None:
    if entry.suffix is None:
        if not output:
            return None
        first = next((p for p in schema.params if p.type.is_tensor), None)
        return DtypeRule("first", "") if first else None
    param = next((p for p in schema.params if p.name == entry.suffix), None)
    if param is not None and param.type.is_tensor:
        return DtypeRule("tensor", param.name)
    if param is not None and str(param.type) == "ScalarType":
        return DtypeRule("value", param.name)
    if entry.suffix in DTYPES:
        return DtypeRule("fixed", entry.suffix)
    raise shapes.error(
        text,
        text.index(":" + entry.suffix) + 1 if ":" + entry.suffix in text else entry.column,
        schema.name,
        f"the suffix {entry.suffix!r}",
        "a dtype such as float32, or the name of a Tensor or dtype argument",
    )
