"""What a shape line means for one schema: checks on the inputs, and the outputs' metadata.

A `Plan` is made once per op. `Plan.infer` is generated Python (a few comparisons per tensor, so that
it may run in every call and under tracing); where it finds a mismatch, `Plan.explain` walks the same
entries slowly and raises with names. The C++ twin of the generated code is written by `opkit.cpp.light`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch

from opkit.errors import DtypeError, ShapeError
from opkit.spec import shapes
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


class OutputMeta(NamedTuple):
    """What one output must be; it is contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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
    def infer(self) -> Callable[..., tuple[tuple[OutputMeta, ...], torch.device]]:
        """Check all arguments, in schema order, and return the outputs' metadata and device."""
        source = _python(self)
        namespace: dict[str, Any] = {"_Meta": OutputMeta, "_explain": self.explain, "_torch": torch}
        exec(compile(source, f"<plan of {self.schema.name}>", "exec"), namespace)
        infer: Callable[..., Any] = namespace["infer"]
        return infer

    def explain(self, *values: Any) -> NoReturn:
        """Raise the error that names the first argument which does not fit the line.

        Raises:
            ShapeError: a number of dimensions or a size does not fit.
            DtypeError: a dtype does not fit.
        """
        _Explanation(self, values).run()
        raise AssertionError(f"{self.schema.name}: the generated plan and its explanation disagree")


def bind(line: ShapeLine, schema: Schema, text: str) -> Plan:
    """Fit a parsed shape line to a schema.

    Raises:
        ShapeError: the number of entries, a suffix, or a name does not fit the signature.
    """
    op = schema.name
    params = [p for p in schema.params if p.type.base == "Tensor"]
    for p in (*params, *schema.results):
        if p.type.is_list:
            raise ShapeError(
                f"reading the shape line of {op}: {p.name} is a list of tensors; a shape line cannot describe "
                "lists yet. Leave shapes= out and write the meta function with register_fake.",
                op=op,
            )
    inputs = [p for p in params]
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
    for entry in (*line.inputs, *line.outputs):
        for dim in entry.dims:
            _check_names(dim, bound, stars, entry in line.outputs, text, op)
    ins = tuple(
        Tensors(p.name, e, _rule(e, schema, text, output=False), p.type.optional)
        for p, e in zip(inputs, line.inputs, strict=True)
    )
    outs = tuple(
        Tensors(r.name, e, _rule(e, schema, text, output=True))
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


def _is_int(param: Param) -> bool:
    return str(param.type) == "SymInt"


def _arity(text: str, op: str, side: str, found: int, names: Sequence[str], column: int) -> ShapeError:
    tensors = f"{len(names)} ({', '.join(names)})" if names else "none"
    entries = "entry" if found == 1 else "entries"
    return shapes.error(text, column, op, f"{found} {entries} for {side}", f"{tensors}, one per Tensor")


def _check_names(dim: Dim, bound: set[str], stars: set[str], output: bool, text: str, op: str) -> None:
    if output and dim.is_any:
        raise shapes.error(text, dim.column, op, f"{dim.text!r} in an output", "a size that the inputs bind")
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


# ---------------------------------------------------------------- the generated check


def python_expression(dim: Dim) -> str:
    """Return the size as Python over the generated names `_d_<name>`."""
    return re.sub(r"[A-Za-z_]\w*", r"_d_\g<0>", dim.text)


def first_bindings(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return for each dimension name the inputs that may bind it: the first sure one ends the list."""
    binders: dict[str, list[str]] = {}
    sure: set[str] = set(plan.int_names)
    for tensors in plan.inputs:
        for dim in tensors.entry.dims:
            if (dim.is_name or (dim.star and dim.text != "...")) and dim.text not in sure:
                binders.setdefault(dim.text, []).append(tensors.name)
                if not tensors.optional:
                    sure.add(dim.text)
    return {name: tuple(dict.fromkeys(who)) for name, who in binders.items()}


def _python(plan: Plan) -> str:
    lines = [f"def infer({', '.join(p.name for p in plan.schema.params)}):"]
    everything = ", ".join(p.name for p in plan.schema.params)
    emit = lines.append
    known = set(plan.int_names)
    for name in plan.int_names:
        emit(f"    _d_{name} = {name}")
    unsure = {n for n, who in first_bindings(plan).items() if any(_optional(plan, w) for w in who)}
    for name in sorted(unsure):
        emit(f"    _d_{name} = None")
    late: list[str] = []
    for index, tensors in enumerate(plan.inputs):
        pad, shape = "    ", f"_s_{index}"
        if tensors.optional:
            emit(f"    if {tensors.name} is not None:")
            pad = "        "
        emit(f"{pad}{shape} = {tensors.name}.shape")
        dims, star = tensors.entry.dims, tensors.entry.star
        count = len(dims) - (star is not None)
        emit(f"{pad}if len({shape}) {'<' if star is not None else '!='} {count}: _explain({everything})")
        for position, dim in enumerate(dims):
            after = star is not None and position > star
            place = f"{shape}[{position - len(dims) if after else position}]"
            if dim.star:
                stop = position + 1 - len(dims)
                place = f"{shape}[{position}:{stop if stop else ''}]"
            if dim.is_any:
                continue
            if dim.star or dim.is_name:
                variable = f"_d_{dim.text}"
                if dim.text not in known and dim.text not in unsure:
                    emit(f"{pad}{variable} = {place}")
                    known.add(dim.text)
                elif dim.text in unsure:
                    emit(f"{pad}if {variable} is None: {variable} = {place}")
                    emit(f"{pad}elif {place} != {variable}: _explain({everything})")
                else:
                    emit(f"{pad}if {place} != {variable}: _explain({everything})")
            else:
                guards = [f"{tensors.name} is not None"] if tensors.optional else []
                guards += [f"_d_{n} is not None" for n in dim.names() if n in unsure]
                test = " and ".join([*guards, f"{place} != {python_expression(dim)}"])
                late.append(f"    if {test}: _explain({everything})")
        if tensors.dtype is not None:
            want = _python_dtype(tensors.dtype, plan)
            emit(f"{pad}if {tensors.name}.dtype != {want}: _explain({everything})")
    lines += late
    for tensors in plan.outputs:
        for name in {n for d in tensors.entry.dims for n in d.names()} & unsure:
            emit(f"    if _d_{name} is None: _explain({everything})")
    outputs = []
    for tensors in plan.outputs:
        parts = [f"*_d_{d.text}" if d.star else python_expression(d) for d in tensors.entry.dims]
        shape = "(" + "".join(f"{part}, " for part in parts) + ")"
        outputs.append(f"_Meta({shape}, {_python_dtype(tensors.dtype, plan)})")
    device = _first(plan, "device")
    emit(f"    return ({''.join(o + ', ' for o in outputs)}), {device}")
    return "\n".join(lines) + "\n"


def _optional(plan: Plan, name: str) -> bool:
    return next(t.optional for t in plan.inputs if t.name == name)


def _python_dtype(rule: DtypeRule | None, plan: Plan) -> str:
    assert rule is not None
    if rule.kind == "fixed":
        return f"_torch.{rule.name}"
    if rule.kind == "tensor":
        param = next(p for p in plan.schema.params if p.name == rule.name)
        own = f"{rule.name}.dtype"
        return f"({own} if {rule.name} is not None else {_first(plan, 'dtype')})" if param.type.optional else own
    return rule.name if rule.kind == "value" else _first(plan, "dtype")


def _first(plan: Plan, attribute: str) -> str:
    """Return Python for an attribute of the first Tensor argument that is not None."""
    text = "None"
    for param in reversed(plan.device_params):
        if not param.type.is_tensor:
            text = f"_torch.device({param.name})"
        elif param.type.optional:
            text = f"({param.name}.{attribute} if {param.name} is not None else {text})"
        else:
            text = f"{param.name}.{attribute}"
    return text


# ---------------------------------------------------------------- the explanation


class _Explanation:
    """Walks the entries in order, remembers where each name was bound, raises at the first mismatch."""

    def __init__(self, plan: Plan, values: Sequence[Any]) -> None:
        self.plan = plan
        self.values = {p.name: v for p, v in zip(plan.schema.params, values, strict=True)}
        self.sizes: dict[str, Any] = {}
        self.where: dict[str, str] = {}

    def run(self) -> None:
        for name in self.plan.int_names:
            self.sizes[name], self.where[name] = self.values[name], f"the argument {name}"
        present = [t for t in self.plan.inputs if self.values[t.name] is not None]
        for tensors in present:
            self._rank(tensors)
            for dim, axis, size in self._axes(tensors):
                if not dim.is_any and (dim.star or dim.is_name):
                    self._name(tensors, dim, axis, size)
        for tensors in present:
            for dim, axis, size in self._axes(tensors):
                if not (dim.is_any or dim.star or dim.is_name):
                    self._expression(tensors, dim, axis, size)
            self._dtype(tensors)
        for tensors in self.plan.outputs:
            for name in {n for d in tensors.entry.dims for n in d.names()} - set(self.sizes):
                self._raise(
                    f"the size {name} of output {tensors.name} is bound only by arguments that are None",
                    "Pass one of them.",
                )

    def _rank(self, tensors: Tensors) -> None:
        shape, dims = self.values[tensors.name].shape, tensors.entry.dims
        least = len(dims) - (tensors.entry.star is not None)
        if len(shape) < least or (tensors.entry.star is None and len(shape) != least):
            at_least = "at least " if tensors.entry.star is not None else ""
            self._raise(
                f"argument {tensors.name} has {len(shape)} dimensions, its entry '{tensors.entry}' "
                f"has {at_least}{least}",
                "Reshape the argument.",
            )

    def _axes(self, tensors: Tensors) -> list[tuple[Dim, int, Any]]:
        shape, star = tuple(self.values[tensors.name].shape), tensors.entry.star
        dims, found = tensors.entry.dims, []
        extra = len(shape) - len(dims) + 1
        axis = 0
        for position, dim in enumerate(dims):
            width = extra if position == star else 1
            found.append((dim, axis, shape[axis : axis + width] if position == star else shape[axis]))
            axis += width
        return found

    def _name(self, tensors: Tensors, dim: Dim, axis: int, size: Any) -> None:
        place = f"the dimensions of {tensors.name}" if dim.star else f"dimension {axis} of {tensors.name}"
        if dim.text not in self.sizes:
            self.sizes[dim.text], self.where[dim.text] = size, place
        elif self.sizes[dim.text] != size:
            one = f"{place} that {dim} stands for are" if dim.star else f"{place} ({dim}) is"
            self._raise(
                f"{one} {size}, but {self.where[dim.text]} bound {dim} to {self.sizes[dim.text]}",
                "Make the two equal; nothing broadcasts.",
            )

    def _expression(self, tensors: Tensors, dim: Dim, axis: int, size: Any) -> None:
        if any(name not in self.sizes for name in dim.names()):
            return
        names = {f"_d_{name}": self.sizes[name] for name in dim.names()}
        want = eval(python_expression(dim), {"__builtins__": {}}, names)
        if want != size:
            given = ", ".join(f"{n} = {self.sizes[n]} by {self.where[n]}" for n in dim.names())
            reason = f" ({dim}{': ' + given if given else ''})" if not dim.text.isdigit() else ""
            self._raise(
                f"dimension {axis} of {tensors.name} is {size}, expected {want}{reason}",
                "Pass a tensor of that size.",
            )

    def _dtype(self, tensors: Tensors) -> None:
        if tensors.dtype is None:
            return
        rule = tensors.dtype
        if rule.kind == "fixed":
            want, reason = rule.fixed, "as the shape line says"
        elif rule.kind == "value":
            want, reason = self.values[rule.name], f"the value of {rule.name}"
        else:
            if self.values[rule.name] is None:
                return
            want, reason = self.values[rule.name].dtype, f"the dtype of {rule.name}"
        found = self.values[tensors.name].dtype
        if found != want:
            raise DtypeError(
                f"calling {self.plan.schema.name}: argument {tensors.name} has dtype {found}, "
                f"expected {want}, {reason}. Convert it: {tensors.name}.to({want}).",
                op=self.plan.schema.name,
            )

    def _raise(self, found: str, advice: str) -> NoReturn:
        got = ", ".join(f"{t.name} {_shape(self.values[t.name])}" for t in self.plan.inputs)
        raise ShapeError(
            f"calling {self.plan.schema.name}: {found}. Expected '{self.plan.line}', got {got}. {advice}",
            op=self.plan.schema.name,
        )


def _shape(value: Any) -> str:
    return "None" if value is None else "(" + ", ".join(map(str, value.shape)) + ")"
