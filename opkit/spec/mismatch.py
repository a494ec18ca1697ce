"""The error for a call that does not fit its shape line, with every name that helps.

The slow twin of `_infer`: it runs only where the generated check has found that something differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from opkit.errors import DeviceError, DtypeError, ShapeError
from opkit.spec._infer import python_expression
from opkit.spec.shapes import Dim

if TYPE_CHECKING:
    from opkit.spec.plan import Plan, Tensors


class Mismatch:
    """Walks the entries of a plan in order, remembers where each name was bound, raises where one differs."""

    def __init__(self, plan: Plan, values: Sequence[Any]) -> None:
        self.plan = plan
        self.values = {p.name: v for p, v in zip(plan.schema.params, values, strict=True)}
        self.sizes: dict[str, Any] = {}
        self.where: dict[str, str] = {}

    def run(self) -> None:
        """Raise ShapeError or DtypeError; return where everything fits."""
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
        self._devices(present)
        for tensors in self.plan.outputs:
            for name in {n for d in tensors.entry.dims for n in d.names()} - set(self.sizes):
                self._raise(
                    f"the size {name} of output {tensors.name} is bound only by arguments that are None",
                    "Pass one of them.",
                )
            for dim in tensors.entry.dims:
                size = dim.bound if dim.is_open else dim
                if size is not None and not dim.star:
                    self._value(size)
        params = self.plan.device_params
        if self.plan.outputs and all(self.values[p.name] is None for p in params):
            self._raise(
                f"all of {', '.join(p.name for p in params)} are None, so nothing says where its outputs live",
                "Pass one of them.",
            )

    def _devices(self, present: Sequence[Tensors]) -> None:
        for tensors in present[1:]:
            first, own = self.values[present[0].name].device, self.values[tensors.name].device
            if own != first:
                raise DeviceError(
                    f"calling {self.plan.schema.name}: argument {tensors.name} is on {own} and {present[0].name} on "
                    f"{first}; expected all tensors on one device. Move one: {tensors.name}.to({str(first)!r}).",
                    op=self.plan.schema.name,
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
        want = self._value(dim)
        if want != size:
            given = self._given(dim)
            reason = f" ({dim}{': ' + given if given else ''})" if not dim.text.isdigit() else ""
            self._raise(
                f"dimension {axis} of {tensors.name} is {size}, expected {want}{reason}",
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

    def _dtype(self, tensors: Tensors) -> None:
        if tensors.dtype is None:
            return
        rule = tensors.dtype
        if rule.kind == "fixed":
            want, reason = rule.fixed, "as the shape line says"
        elif rule.kind == "value":
            want, reason = self.values[rule.name], f"the value of {rule.name}"
        else:
            names = [rule.name, *(p.name for p in self.plan.device_params)]
            name = next(n for n in names if self.values[n] is not None)
            want, reason = self.values[name].dtype, f"the dtype of {name}"
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
