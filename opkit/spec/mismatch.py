"""The error for a call that does not fit its shape line, with every name that helps.

The slow twin of `_infer`: it runs only where the generated check has found that something differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch

from opkit.errors import DeviceError, DtypeError, ShapeError
from opkit.spec._infer import python_expression
from opkit.spec.shapes import Dim
from opkit.spec.sizes import can_be_a_size, differ

if TYPE_CHECKING:
    from opkit.spec.plan import DtypeRule, Plan, Tensors


class _One(NamedTuple):
    """One tensor that was passed: an argument, or with its place an element of a list."""

    name: str
    tensors: Tensors
    value: torch.Tensor
    place: int | None = None


class Mismatch:
    """Walks the entries of a plan in order, remembers where each name was bound, raises where one differs."""

    def __init__(self, plan: Plan, values: Sequence[Any]) -> None:
        self.plan = plan
        self.values = {p.name: v for p, v in zip(plan.schema.params, values, strict=True)}
        # Of a name, or of a name and the place in a list where it differs from element to element.
        self.sizes: dict[Any, Any] = {}
        self.where: dict[Any, str] = {}

    def run(self) -> None:
        """Raise ShapeError, DtypeError or DeviceError; return where everything fits."""
        for name in (*self.plan.int_names, *self.plan.optional_ints):
            if self.values[name] is None:
                continue
            self.sizes[name], self.where[name] = self.values[name], f"the argument {name}"
        self._lengths()
        present = [one for tensors in self.plan.inputs for one in self._given_tensors(tensors)]
        for one in present:
            self._rank(one)
            for dim, axis, size in self._axes(one):
                if not dim.is_any and (dim.star or dim.is_name):
                    self._name(one, dim, axis, size)
        for one in present:
            for dim, axis, size in self._axes(one):
                if not (dim.is_any or dim.star or dim.is_name):
                    self._expression(one, dim, axis, size)
            self._dtype(one)
        self._devices(present)
        for tensors in self.plan.outputs:
            self._output(tensors, present)

    def _given_tensors(self, tensors: Tensors) -> list[_One]:
        value = self.values[tensors.name]
        if value is None:
            return []
        if not tensors.entry.is_list:
            return [_One(tensors.name, tensors, value)]
        return [_One(f"{tensors.name}[{i}]", tensors, v, i) for i, v in enumerate(value) if v is not None]

    def _lengths(self) -> None:
        """Compare the lengths of lists that are alike element by element."""
        first: dict[str, str] = {}
        for tensors in self.plan.inputs:
            value, star = self.values[tensors.name], tensors.each(self.plan)
            if value is None:
                continue
            if star is not None:
                self._length(tensors.name, first.setdefault(star, tensors.name), f"*{star} stands in both")
            if tensors.dtype is not None and tensors.dtype.kind == "each":
                other = tensors.dtype.name
                if self.values[other] is not None:
                    self._length(tensors.name, other, f"its dtypes are those of {other}")

    def _length(self, name: str, other: str, why: str) -> None:
        found, wanted = len(self.values[name]), len(self.values[other])
        if found != wanted:
            self._raise(
                f"{name} has {found} tensors, {other} has {wanted}; {why}", "Pass lists of one length."
            )

    def _devices(self, present: Sequence[_One]) -> None:
        for one in present[1:]:
            first, own = present[0].value.device, one.value.device
            if own != first:
                raise DeviceError(
                    f"calling {self.plan.schema.name}: argument {one.name} is on {own} and {present[0].name} on "
                    f"{first}; expected all tensors on one device. Move one: {one.name}.to({str(first)!r}).",
                    op=self.plan.schema.name,
                )

    def _rank(self, one: _One) -> None:
        shape, entry = one.value.shape, one.tensors.entry
        least = len(entry.dims) - (entry.star is not None)
        if len(shape) < least or (entry.star is None and len(shape) != least):
            at_least = "at least " if entry.star is not None else ""
            self._raise(
                f"argument {one.name} has {len(shape)} dimensions, its entry '{entry}' has {at_least}{least}",
                "Reshape the argument.",
            )

    def _axes(self, one: _One) -> list[tuple[Dim, int, Any]]:
        shape, star = tuple(one.value.shape), one.tensors.entry.star
        dims, found = one.tensors.entry.dims, []
        extra = len(shape) - len(dims) + 1
        axis = 0
        for position, dim in enumerate(dims):
            width = extra if position == star else 1
            found.append((dim, axis, shape[axis : axis + width] if position == star else shape[axis]))
            axis += width
        return found

    def _name(self, one: _One, dim: Dim, axis: int, size: Any) -> None:
        place = f"the dimensions of {one.name}" if dim.star else f"dimension {axis} of {one.name}"
        key = (dim.text, one.place) if dim.star and dim.text in self.plan.each else dim.text
        if key not in self.sizes:
            self.sizes[key], self.where[key] = size, place
        elif differ(self.sizes[key], size):
            differs = f"{place} that {dim} stands for are" if dim.star else f"{place} ({dim}) is"
            self._raise(
                f"{differs} {size}, but {self.where[key]} bound {dim} to {self.sizes[key]}",
                "Make the two equal; nothing broadcasts.",
            )

    def _expression(self, one: _One, dim: Dim, axis: int, size: Any) -> None:
        if any(name not in self.sizes for name in dim.names()):
            return
        want = self._value(dim)
        if differ(want, size):
            given = self._given(dim)
            reason = f" ({dim}{': ' + given if given else ''})" if not dim.text.isdigit() else ""
            self._raise(
                f"dimension {axis} of {one.name} is {size}, expected {want}{reason}",
                "Pass a tensor of that size.",
            )

    def _value(self, dim: Dim) -> Any:
        names = {f"_d_{name}": self.sizes[name] for name in dim.names()}
        try:
            return eval(python_expression(dim), {"__builtins__": {}}, names)
        except ZeroDivisionError:
            self._raise(f"the size {dim} divides by zero ({self._given(dim)})", "Pass another size.")

    def _given(self, dim: Dim) -> str:
        return ", ".join(f"{n} = {self.sizes[n]} by {self.where[n]}" for n in dim.names())

    # ---------------------------------------------------------------- outputs

    def _output(self, tensors: Tensors, present: Sequence[_One]) -> None:
        length = tensors.length_of
        if (tensors.entry.is_list and length is None) or any(d.is_any for d in tensors.entry.dims):
            return
        if length is not None:
            self._elements(tensors, length)
            if not self.values[length]:
                return
        names = {n for d in tensors.entry.dims for n in d.names()} - self.plan.each
        for name in sorted(names - set(self.sizes)):
            absent = "None or empty" if any(p.type.is_list for p in self.plan.device_params) else "None"
            self._raise(
                f"the size {name} of output {tensors.name} is bound only by arguments that are {absent}",
                "Pass one of them.",
            )
        if not present and any(p.type.base == "Tensor" for p in self.plan.device_params):
            self._nothing()
        for dim in tensors.entry.dims:
            size = dim.bound if dim.is_open else dim
            if size is not None and not size.star:
                self._size(tensors.name, size)
        self._allowed(tensors)

    def _elements(self, tensors: Tensors, length: str) -> None:
        """Raise where an element of an output list has nothing to be like."""
        if self.values[length] is None:
            self._raise(f"output {tensors.name} is as long as {length}, which is None", "Pass a list.")
        star = tensors.each(self.plan)
        like_each = tensors.dtype is not None and tensors.dtype.kind == "each"
        for index, value in enumerate(self.values[length]):
            if value is None and (like_each or (star is not None and (star, index) not in self.sizes)):
                self._raise(
                    f"element {index} of output {tensors.name} is like {length}[{index}], which is None",
                    "Pass a tensor there.",
                )

    def _size(self, output: str, dim: Dim) -> None:
        """Raise where a size of an output is none that a tensor can have."""
        value = self._value(dim)
        if not can_be_a_size(value):
            found = (
                f"would be {value}"
                if not isinstance(value, int) or value < 0
                else f"would be {value}, beyond 64 bits"
            )
            given = (
                ""
                if dim.text in (*self.plan.int_names, *self.plan.optional_ints)
                else f" ({self._given(dim)})"
            )
            self._raise(f"the size {dim} of output {output} {found}{given}", "Pass another size.")

    def _allowed(self, tensors: Tensors) -> None:
        """Raise where the dtype of an output is none that its annotation allows."""
        if not tensors.entry.dtypes:
            return
        assert tensors.dtype is not None
        each = tensors.dtype.kind == "each"
        values = self.values[tensors.dtype.name] if each else [None]
        for index, value in enumerate(values):
            dtype, why = (
                (value.dtype, f"{tensors.dtype.name}[{index}]") if each else self._wanted(tensors.dtype)
            )
            if str(dtype).removeprefix("torch.") not in tensors.entry.dtypes:
                raise DtypeError(
                    f"calling {self.plan.schema.name}: output {tensors.name} would have dtype {dtype}, "
                    f"{why if not each else 'the dtype of ' + why}; its annotation allows "
                    f"{', '.join(tensors.entry.dtypes)}. Convert the argument, or give the output a dtype in shapes=.",
                    op=self.plan.schema.name,
                )

    def _nothing(self) -> NoReturn:
        params = self.plan.device_params
        absent = "None or empty" if any(p.type.is_list for p in params) else "None"
        self._raise(
            f"all of {', '.join(p.name for p in params)} are {absent}, so nothing says where its outputs live",
            "Pass one of them.",
        )

    # ---------------------------------------------------------------- dtypes

    def _wanted(self, rule: DtypeRule) -> tuple[torch.dtype, str]:
        """Return the dtype that a rule means, of whatever kind but `each`, and why."""
        if rule.kind == "fixed":
            return rule.fixed, "as the shape line says"
        if rule.kind == "value" and self.values[rule.name] is not None:
            return self.values[rule.name], f"the value of {rule.name}"
        named = [rule.name] if rule.kind == "tensor" else []
        for name in named + [p.name for p in self.plan.device_params]:
            value = self.values[name]
            if isinstance(value, (list, tuple)):
                found = next(((i, v) for i, v in enumerate(value) if v is not None), None)
                if found is not None:
                    return found[1].dtype, f"the dtype of {name}[{found[0]}]"
            elif value is not None:
                return value.dtype, f"the dtype of {name}"
        raise AssertionError(f"{self.plan.schema.name}: no tensor has a dtype")

    def _dtype(self, one: _One) -> None:
        found, rule, entry = one.value.dtype, one.tensors.dtype, one.tensors.entry
        if rule is not None:
            if rule.kind == "each":
                other = self.values[rule.name]
                other = None if other is None else other[one.place]
                want, reason = (
                    (found, "") if other is None else (other.dtype, f"the dtype of {rule.name}[{one.place}]")
                )
            elif rule.kind == "value" and self.values[rule.name] is None:
                want, reason = found, ""
            else:
                want, reason = self._wanted(rule)
            if found != want:
                raise DtypeError(
                    f"calling {self.plan.schema.name}: argument {one.name} has dtype {found}, "
                    f"expected {want}, {reason}. Convert it: {one.name}.to({want}).",
                    op=self.plan.schema.name,
                )
        if entry.dtypes and str(found).removeprefix("torch.") not in entry.dtypes:
            raise DtypeError(
                f"calling {self.plan.schema.name}: argument {one.name} has dtype {found}, its annotation allows "
                f"{', '.join(entry.dtypes)}. Convert it: {one.name}.to(torch.{entry.usual_dtype}).",
                op=self.plan.schema.name,
            )

    def _raise(self, found: str, advice: str) -> NoReturn:
        got = ", ".join(f"{t.name} {_shape(self.values[t.name])}" for t in self.plan.inputs)
        given = f", got {got}" if got else ""
        raise ShapeError(
            f"calling {self.plan.schema.name}: {found}. Expected '{self.plan.line}'{given}. {advice}",
            op=self.plan.schema.name,
        )


def _shape(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shape, value))}]"
    return "(" + ", ".join(map(str, value.shape)) + ")"
