"""One call of an op, made from its declaration: shapes by the shape line, other values by annotations and defaults."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.errors import ArgumentError
from opkit.spec.plan import DTYPES, Plan, Tensors
from opkit.spec.schema import REQUIRED, Param

_NUMBERS = {"float": 0.5, "float?": 0.5, "bool": False, "Scalar": 2.0, "complex": 0.5 + 0.5j}


class Shapes:
    """The shapes of an op's tensors, for sizes that are given by name.

    `stars` are those of `*name`; one that stands for other dimensions in each element of a list has `(size,)` in the
    first element, one more dimension in the next. `unnamed` is the size of `_`, and of what `...` stands for.
    """

    def __init__(
        self, names: Mapping[str, int], stars: Mapping[str, tuple[int, ...]], unnamed: int = 3
    ) -> None:
        self.names = dict(names)
        self._stars = dict(stars)
        self._unnamed = unnamed

    def of(self, tensor: Tensors, each: Iterable[str], element: int = 0) -> tuple[int, ...]:
        """Return the shape of a tensor, or of an element of a list. It may have negative sizes: `n-1`."""
        shape: list[int] = []
        for dim in tensor.entry.dims:
            if dim.star and dim.text == "...":
                shape.append(self._unnamed)
            elif dim.star:
                own = self._stars[dim.text]
                shape += (*own, *[2] * element) if dim.text in each else own
            elif dim.text == "_":
                shape.append(self._unnamed)
            elif dim.is_name:
                shape.append(self.names[dim.text])
            else:
                shape.append(int(eval(dim.text, {"__builtins__": {}}, self.names)))
        return tuple(shape)


def dimensions(op: Op[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the names in the shape line that one chooses sizes for: of dimensions, of int arguments, of stars.

    Raises:
        ArgumentError: the op has no shape line.

    Example:
        >>> import opkit
        >>> opkit.testing.samples.dimensions(opkit.get("opkit::topk_softmax"))
        (('n',), ('k',), ('b',))
    """
    plan = plan_of(op)
    dims = [d for t in plan.inputs for d in t.entry.dims]
    bound = dict.fromkeys(d.text for d in dims if d.is_name)
    stars = dict.fromkeys(d.text for d in dims if d.star and d.text != "...")
    return tuple(bound), tuple(n for n in plan.int_names if n not in bound), tuple(stars)


def sized(
    op: Op[..., Any],
    size: int,
    batch: tuple[int, ...],
    given: Mapping[str, int | Sequence[int]],
    step: int = 1,
) -> Shapes:
    """Return shapes where no two names have the same size; int arguments that no tensor binds are small divisors."""
    names, ints, stars = dimensions(op)
    plan = plan_of(op)
    chosen = {name: size + step * i if size > 1 else size for i, name in enumerate(names)}
    for name in ints:
        default = plan.param(name).default
        chosen[name] = default if isinstance(default, int) else (2 if size and size % 2 == 0 else 1)
    many = dict.fromkeys(stars, batch)
    for name, value in given.items():
        if name in many:
            many[name] = (value,) if isinstance(value, int) else tuple(value)
        else:
            chosen[name] = int(value)  # type: ignore[arg-type]
    return Shapes(chosen, many, size or 3)


def arguments(
    op: Op[..., Any],
    shapes: Shapes,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    absent: Iterable[str] = (),
    elements: int = 2,
    scalars: Mapping[str, Any] | None = None,
    numbers: int = 0,
) -> tuple[Any, ...]:
    """Return the arguments of a call in schema order, as torch carries them.

    Args:
        op: whose call it is.
        shapes: of its tensors.
        dtype: of those whose dtype is open.
        device: of all.
        absent: optional tensors that are None.
        elements: how many a list of tensors has.
        scalars: values of other arguments, as torch carries them; they have their defaults where nothing is said.
        numbers: which random numbers tensors hold.

    Raises:
        ArgumentError: the declaration does not say enough.
    """
    plan = plan_of(op)
    tensors = {t.name: t for t in plan.inputs}
    chosen = dict(scalars or {})
    values: list[Any] = []
    for param in op.schema.params:
        if param.name in tensors:
            given = None if param.name in absent else tensors[param.name]
            values.append(given and _tensor(op, given, shapes, dtype, device, elements, numbers))
        elif param.name in chosen:
            values.append(chosen[param.name])
        elif param.name in shapes.names:
            values.append(shapes.names[param.name])
        else:
            values.append(_usual(op, param, device))
    return tuple(values)


def plan_of(op: Op[..., Any]) -> Plan:
    """Return what the shape line of an op says; raise ArgumentError where it has none."""
    if op._meta.plan is None:
        raise UnmadeError(op, "it has no shape line, which says what shapes its tensors have")
    return op._meta.plan


def _usual(op: Op[..., Any], param: Param, device: str | torch.device) -> Any:
    """Return the value that an argument has where nothing is special."""
    if param.default is not REQUIRED:
        return param.default
    if param.type.choices is not None and not param.type.is_list:
        return next(iter(choices(param)))
    kind = str(param.type)
    if kind in _NUMBERS:
        return _NUMBERS[kind]
    if kind in ("Device", "Device?"):
        return torch.device(device)
    if kind in ("ScalarType", "ScalarType?"):
        return torch.float32
    if param.type.optional:
        return None
    raise UnmadeError(op, f"nothing says which values its argument {param.name}, {_kind(param)}, may have")


def _kind(param: Param) -> str:
    """Return the type of an argument as its author knows it."""
    kind = str(param.type).replace("SymInt", "int")
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def choices(param: Param) -> tuple[Any, ...]:
    """Return the legal values of a Literal or an Enum, as torch carries them."""
    return () if param.type.choices is None else tuple(param.type.choices._members)


def _tensor(
    op: Op[..., Any],
    tensor: Tensors,
    shapes: Shapes,
    dtype: torch.dtype,
    device: str | torch.device,
    elements: int,
    numbers: int,
) -> Any:
    each = plan_of(op).each

    def make(element: int) -> Tensor:
        shape = shapes.of(tensor, each, element)
        if any(size < 0 for size in shape):
            raise UnmadeError(
                op, f"the sizes {shapes.names} give its argument {tensor.name} the shape {shape}"
            )
        name = f"{tensor.name}[{element}] {numbers}"
        return drawn(name, shape, _dtype(op, tensor, dtype)).to(device)

    return [make(i) for i in range(elements)] if tensor.entry.is_list else make(0)


def drawn(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return standard normal numbers, or random bools, that depend on the name and the shape only."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def _dtype(op: Op[..., Any], tensor: Tensors, wanted: torch.dtype) -> torch.dtype:
    """Return the dtype of an argument: what the shape line or its annotation says, or else what is wanted."""
    plan = plan_of(op)
    rule, seen = tensor.dtype, {tensor.name}
    while rule is not None and rule.kind in ("tensor", "each") and rule.name not in seen:
        seen.add(rule.name)
        tensor = next(t for t in plan.inputs if t.name == rule.name)
        rule = tensor.dtype
    if rule is not None and rule.kind == "fixed":
        found = rule.fixed
    elif rule is not None and rule.kind == "value":
        default = plan.param(rule.name).default
        found = default if isinstance(default, torch.dtype) else torch.float32
    elif tensor.entry.dtypes:
        allowed = [DTYPES[d] for d in tensor.entry.dtypes]
        found = wanted if wanted in allowed else DTYPES[tensor.entry.usual_dtype]
    else:
        found = wanted
    if found != torch.bool and not (found.is_floating_point or found.is_complex):
        raise UnmadeError(
            op, f"its argument {tensor.name} is of {found}, and nothing says which values it may have"
        )
    return found


class UnmadeError(ArgumentError):
    """You asked for a call that the op's declaration does not say enough for; `lack` is what it does not say."""

    def __init__(self, op: Op[..., Any], lack: str) -> None:
        names = ", ".join(p.name for p in op.schema.params) + "," * (len(op.schema.params) == 1)
        super().__init__(
            f"making a call of {op.name} from its declaration: {lack}; expected a shape line over floating tensors, "
            f"and defaults for the rest. Give calls: opkit.testing.check({op.schema.opname}, samples=[({names})]), or "
            f"once and for all a function that returns them: {op.schema.opname}.register_samples(function).",
            op=op.name,
        )
        self.lack = lack
