"""What a shape line means for one schema: checks on the inputs, and the outputs' metadata.

A `Plan` is made once per op. `Plan.infer` is generated Python (a few comparisons per tensor, so that
it may run in every call and under tracing); where it finds a mismatch, `Plan.explain` walks the same
entries slowly and raises with names. The C++ twin of the generated code is written by `opkit.cpp._glue`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn, cast

import torch

from opkit.errors import ShapeError
from opkit.spec import _infer, arrays, shapes, sizes
from opkit.spec.mismatch import Mismatch
from opkit.spec.schema import Param, Result, Schema
from opkit.spec.shapes import Dim, Entry, ShapeLine

DTYPES: dict[str, torch.dtype] = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


@dataclass(frozen=True)
class DtypeRule:
    """A resolved suffix: a dtype that is `fixed`, the `value` of a dtype argument, that of a `tensor` argument, of the
    `first` tensor, or of `each` tensor in a list argument, element by element."""

    kind: str
    name: str

    @property
    def fixed(self) -> torch.dtype:
        """The dtype of a rule of kind `fixed`."""
        return DTYPES[self.name]


@dataclass(frozen=True)
class Tensors:
    """A tensor of the signature, or a list of them, with its entry; `dtype` is None where nothing is said of it.

    `length_of` is the list argument that an output list is as long as.
    """

    name: str
    entry: Entry
    dtype: DtypeRule | None
    optional: bool = False
    optional_elements: bool = False
    length_of: str | None = None

    def each(self, plan: Plan) -> str | None:
        """Return the name that stands for other dimensions in each element of a list, or None."""
        return next((d.text for d in self.entry.dims if d.star and d.text in plan.each), None)


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
    each: frozenset[str] = frozenset()
    """Names as in `[*s]`, which stand for other dimensions in each element of a list."""
    missing: str | None = None
    """What the line cannot say of the results, so that `register_fake` is needed."""

    @property
    def meaning(self) -> str:
        """The line, and the dtypes that annotations allow beside it: with the schema, all that the plan says."""
        allowed = [
            f"{t.name} in {', '.join(t.entry.dtypes)}"
            for t in (*self.inputs, *self.outputs)
            if t.entry.dtypes
        ]
        return f"{self.line} ({'; '.join(allowed)})" if allowed else str(self.line)

    @functools.cached_property
    def optional_ints(self) -> tuple[str, ...]:
        """Names of int arguments that the line uses as sizes, and that may be None."""
        used = {n for t in (*self.inputs, *self.outputs) for d in t.entry.dims for n in d.names()}
        return tuple(p.name for p in self.schema.params if p.name in used and str(p.type) == "SymInt?")

    def param(self, name: str) -> Param:
        """Return the argument of a name."""
        return next(p for p in self.schema.params if p.name == name)

    @functools.cached_property
    def unsure(self) -> frozenset[str]:
        """Dimension names that a call may leave unbound: where arguments are None, or lists empty."""
        unsure = {t.name for t in self.inputs if t.optional or t.entry.is_list}
        names = (name for name, who in self.binders.items() if unsure & set(who))
        return frozenset(self.optional_ints).union(names)

    @functools.cached_property
    def int_names(self) -> tuple[str, ...]:
        """Names of int arguments that the line uses as sizes."""
        used = {n for t in (*self.inputs, *self.outputs) for d in t.entry.dims for n in d.names()}
        return tuple(p.name for p in self.schema.params if p.name in used and _is_int(p))

    @functools.cached_property
    def device_params(self) -> tuple[Param, ...]:
        """Arguments that decide the outputs' device: the first of them that is not None."""
        tensors = tuple(p for p in self.schema.params if p.type.base == "Tensor")
        devices = (p for p in self.schema.params if p.type.base == "Device" and not p.type.is_list)
        return tensors or tuple(devices)

    @functools.cached_property
    def binders(self) -> dict[str, tuple[str, ...]]:
        """Return for each dimension name the inputs that may bind it: the first sure one ends the list."""
        binders: dict[str, list[str]] = {}
        sure: set[str] = set(self.int_names)
        for tensors in self.inputs:
            for dim in tensors.entry.dims:
                if not (dim.is_name or (dim.star and dim.text != "...")) or dim.text in self.each:
                    continue
                if dim.text not in sure:
                    binders.setdefault(dim.text, []).append(tensors.name)
                    if not (tensors.optional or tensors.entry.is_list):
                        sure.add(dim.text)
        return {name: tuple(dict.fromkeys(who)) for name, who in binders.items()}

    @functools.cached_property
    def infer(self) -> Callable[..., tuple[tuple[Any, ...], Any]]:
        """Check all arguments, in schema order, and return the outputs' metadata and device.

        The metadata of a list is a list; that of a result which the line does not describe is None.
        """
        return self._compiled(_infer.source(self))

    @functools.cached_property
    def infer_symbols(self) -> Callable[..., tuple[tuple[Any, ...], Any]]:
        """Do what `infer` does for a tracer: comparisons that only a call can make become assertions in its graph."""
        return self._compiled(_infer.source(self, symbols=True))

    def _compiled(self, text: str) -> Callable[..., Any]:
        namespace: dict[str, Any] = {
            "_Meta": OutputMeta,
            "_Open": OpenSize,
            "_explain": self.explain,
            "_torch": torch,
            "_first": _first_tensor,
            "_fits": sizes.can_be_a_size,
            "_differ": sizes.differ,
        }
        for side, group in (("in", self.inputs), ("out", self.outputs)):
            for index, tensors in enumerate(group):
                namespace[f"_{side}_{index}"] = frozenset(DTYPES[d] for d in tensors.entry.dtypes)
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


def _first_tensor(*values: Any) -> torch.Tensor | None:
    """Return the first tensor among arguments, or in lists among them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            value = next((v for v in value if v is not None), None)
        if value is not None:
            return cast("torch.Tensor", value)
    return None


def declared(schema: Schema, text: str | None) -> Plan | None:
    """Return the plan of a shape line, or of annotations that say shapes; None where there is neither.

    Raises:
        ShapeError: the line is wrong, does not fit the signature, or disagrees with the annotations.
    """
    said = arrays.read(schema)
    if text is not None:
        line = shapes.parse(text, op=schema.name)
        return bind(line if said is None else arrays.agreed(line, said, schema), schema, text)
    return bind(said, schema, str(said), annotated=True) if said is not None else None


def bind(line: ShapeLine, schema: Schema, text: str, *, annotated: bool = False) -> Plan:
    """Fit a parsed shape line to a schema. Where it comes from annotations, an output may have any shape.

    Raises:
        ShapeError: the number of entries, a suffix, or a name does not fit the signature.
    """
    op = schema.name
    inputs = [p for p in schema.params if p.type.base == "Tensor"]
    results = [r for r in schema.results if r.type.base == "Tensor"]
    if len(line.inputs) != len(inputs):
        raise _arity(text, op, "inputs", len(line.inputs), [p.name for p in inputs], 0)
    if len(line.outputs) != len(results):
        raise _arity(text, op, "outputs", len(line.outputs), [r.name for r in results], text.index("->"))
    for param, entry in zip(inputs, line.inputs, strict=True):
        _check_list(param, entry, text, op)
    for result, entry in zip(results, line.outputs, strict=True):
        _check_list(result, entry, text, op)
    bound = {p.name for p in schema.params if p.type.base == "SymInt" and not p.type.is_list}
    stars: set[str] = set()
    whole: set[str] = set()  # stars that are one list of sizes in the whole call
    for entry in line.inputs:
        for dim in entry.dims:
            if dim.star:
                stars.add(dim.text)
                whole |= set() if entry.is_list else {dim.text}
            elif dim.is_name:
                bound.add(dim.text)
    stars -= {"..."}
    each = frozenset(stars - whole)
    bounds: dict[str, Dim] = {}
    for index, entry in enumerate((*line.inputs, *line.outputs)):
        for dim in entry.dims:
            if annotated and [d.text for d in entry.dims] == ["..."]:
                continue
            _check_names(dim, bound, stars, index >= len(line.inputs), text, op)
            if dim.star and dim.text in each and not entry.is_list:
                found, expected = (
                    f"{dim}, which differs in the elements of a list",
                    f"a list such as [{entry}]",
                )
                raise shapes.error(text, dim.column, op, found, expected)
            if dim.bound and bounds.setdefault(dim.text, dim.bound) != dim.bound:
                found = f"{dim} after ?{dim.text}<={bounds[dim.text]}"
                raise shapes.error(text, dim.column, op, found, "one bound for a name")
    ins = tuple(
        Tensors(p.name, e, _rule(e, schema, text), p.type.optional, p.type.optional_elements)
        for p, e in zip(inputs, line.inputs, strict=True)
    )
    outs = tuple(
        _output(r, _bounded(e, bounds), ins, each, schema, text)
        for r, e in zip(results, line.outputs, strict=True)
    )
    plan = Plan(schema, line, ins, outs, each, _missing(schema, outs))
    if outs and plan.missing is None and not plan.device_params:
        raise ShapeError(
            f"reading the shape line of {op}: the op has no Tensor argument and no device argument, so nothing "
            "says where its outputs live. Add an argument device: torch.device, or write register_fake.",
            op=op,
        )
    for output in outs:
        _check_dtypes(output, plan)
    if not inputs and plan.missing is None and any(_is_open(o.dtype, plan) for o in outs):
        raise ShapeError(
            f"reading the shape line of {op}: the op has no Tensor argument whose dtype its outputs could take. "
            "Give each output a suffix, as in 'n:float32'.",
            op=op,
        )
    return plan


def _is_open(rule: DtypeRule | None, plan: Plan) -> bool:
    """Whether a rule leaves the dtype, or where an argument is None may leave it, to the first tensor."""
    return rule is None or (rule.kind == "value" and plan.param(rule.name).type.optional)


def _check_dtypes(output: Tensors, plan: Plan) -> None:
    """Raise where the dtype that an output would have is never one that its annotation allows."""
    if not output.entry.dtypes or output.dtype is None or output.dtype.kind in ("fixed", "value"):
        return
    name = output.dtype.name or plan.device_params[0].name
    like = next(t for t in plan.inputs if t.name == name)
    if like.optional or not like.entry.dtypes or set(like.entry.dtypes) & set(output.entry.dtypes):
        return
    raise ShapeError(
        f"reading the annotations of {plan.schema.name}: {output.name} is annotated with the dtypes "
        f"{', '.join(output.entry.dtypes)}, and would have that of {name}, which is annotated with "
        f"{', '.join(like.entry.dtypes)}; expected an annotation of one dtype, as Int64. Change it, or give the output "
        f"a dtype in shapes=, as in '{output.entry}:{output.entry.usual_dtype}'.",
        op=plan.schema.name,
    )


def _bounded(entry: Entry, bounds: Mapping[str, Dim]) -> Entry:
    """Return an entry whose open sizes have the bound that is said anywhere of their names."""
    if not bounds:
        return entry
    dims = (replace(d, bound=bounds.get(d.text)) if d.is_open else d for d in entry.dims)
    return replace(entry, dims=tuple(dims))


def _check_list(one: Param | Result, entry: Entry, text: str, op: str) -> None:
    """Raise unless brackets stand where the signature has a list."""
    if one.type.is_list and not entry.is_list:
        found = f"'{entry}' for {one.name}, a list of tensors,"
        raise shapes.error(
            text, entry.column, op, found, "the shape of its elements in brackets, as in [a b]"
        )
    if entry.is_list and not one.type.is_list:
        found = f"'{entry}' for {one.name}, a single tensor,"
        raise shapes.error(text, entry.column, op, found, "an entry without brackets")


def _output(
    result: Result, entry: Entry, inputs: Sequence[Tensors], each: frozenset[str], schema: Schema, text: str
) -> Tensors:
    """Return an output; a list without a suffix has, element by element, the dtypes of the list it is as long as."""
    rule = _rule(entry, schema, text)
    length = _length(entry, inputs, each, rule, schema.name, text) if entry.is_list else None
    if rule is None and length is not None:
        rule = DtypeRule("each", length)
    elif rule is None and any(p.type.base == "Tensor" for p in schema.params):
        rule = DtypeRule("first", "")
    return Tensors(result.name, entry, rule, result.type.optional, result.type.optional_elements, length)


def _length(
    entry: Entry, inputs: Sequence[Tensors], each: frozenset[str], rule: DtypeRule | None, op: str, text: str
) -> str | None:
    """Return the input list that an output list is as long as: that of its suffix, its *name, or its names."""
    lists = [t for t in inputs if t.entry.is_list]
    star = next((d.text for d in entry.dims if d.star and d.text in each), None)
    alike = [t.name for t in lists if any(d.star and d.text == star for d in t.entry.dims)]
    if rule is not None and rule.kind == "each":
        if star is not None and rule.name not in alike:
            found = f"'{entry}', which is as long as {rule.name}, with *{star}"
            raise shapes.error(
                text, entry.column, op, found, f"a name or one of {', '.join(alike)} in the suffix"
            )
        return rule.name
    if star is not None:
        always = [t.name for t in lists if t.name in alike and not t.optional]
        return (always or alike)[0]
    names = {n for d in entry.dims for n in ((d.text,) if d.star else d.names())}
    sharing = [t.name for t in lists if names & {d.text for d in t.entry.dims if d.star or d.is_name}]
    if len(sharing) > 1:
        found = f"'{entry}', which may be as long as {' or '.join(sharing)},"
        raise shapes.error(text, entry.column, op, found, f"one of these in its suffix, as in :{sharing[0]}")
    return sharing[0] if sharing else None


def _missing(schema: Schema, outputs: Sequence[Tensors]) -> str | None:
    """Return what a line with these outputs does not say of the results."""
    by_name = {t.name: t for t in outputs}
    for result in schema.results:
        if result.name not in by_name:
            return f"its result {result.name} is no tensor ({result.type})"
        if result.type.optional:
            return f"its result {result.name} may be None"
        if any(d.is_any for d in by_name[result.name].entry.dims):
            return f"its result {result.name} has no shape in its annotation"
        if result.type.is_list and by_name[result.name].length_of is None:
            return f"nothing says how long the list {result.name} is"
    return None


def _is_int(param: Param) -> bool:
    return str(param.type) in ("SymInt", "int") and param.type.choices is None


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


def _rule(entry: Entry, schema: Schema, text: str) -> DtypeRule | None:
    if entry.suffix is None:
        return None
    param = next((p for p in schema.params if p.name == entry.suffix), None)
    column = text.find(":" + entry.suffix, entry.column) + 1 or entry.column
    if param is not None and param.type.base == "Tensor" and param.type.is_list:
        if not entry.is_list:
            found, expected = (
                f"the suffix {entry.suffix!r}, a list,",
                "the name of a single tensor, or a dtype",
            )
            raise shapes.error(text, column, schema.name, found, expected)
        return DtypeRule("each", param.name)
    if param is not None and param.type.is_tensor:
        return DtypeRule("tensor", param.name)
    if param is not None and str(param.type) in ("ScalarType", "ScalarType?"):
        return DtypeRule("value", param.name)
    if entry.suffix in DTYPES:
        return DtypeRule("fixed", entry.suffix)
    raise shapes.error(
        text,
        column,
        schema.name,
        f"the suffix {entry.suffix!r}",
        "a dtype such as float32, or the name of a Tensor or dtype argument",
    )
