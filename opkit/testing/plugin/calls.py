"""Calls of an op that its kernels are checked with: derived from its shape line, in several layouts, kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import opkit
from opkit._op import Op
from opkit.errors import ArgumentError
from opkit.spec.plan import DTYPES
from opkit.spec.schema import REQUIRED
from opkit.testing import checker
from opkit.testing.arguments import cast, copied, mapped

if TYPE_CHECKING:
    from opkit.spec.plan import Tensors

Case = tuple[Sequence[Any], Mapping[str, Any]]

LARGE = (1 << 20) + 3  # about how many elements the largest argument has
SIZES = {"one": 1, "small": 5, "empty": 0, "large": LARGE}


class Call(NamedTuple):
    """Arguments in schema order, as torch carries them."""

    op: str
    backend: str
    values: tuple[Any, ...]
    slack: float = 0.0


def derived(op: Op[..., Any], n: int) -> Case:
    """Return the arguments of a call whose dimensions are of about size `n`.

    No two names have the same size, but where they are 0 or 1. Where `n` is 0 it is the batch that is empty, if there
    is one; where it is large, dimensions share it so that no argument has more elements.

    Raises:
        ArgumentError: the op has no shape line, or one that does not say enough.
    """
    plan = op._meta.plan
    if plan is None:
        raise _unknown(op, "it has no shape line")
    degree = max((len(t.entry.dims) for t in plan.inputs), default=1) or 1
    size = n if n < 100 else max(int(n ** (1 / degree)), 2)
    sizes = _Sizes(op, size, any(t.entry.star is not None for t in plan.inputs))
    tensors = {t.name: _tensor(op, t, sizes) for t in plan.inputs}
    values = []
    for param in op.schema.params:
        if param.name in tensors:
            values.append(tensors[param.name])
        elif param.name in sizes.names:
            values.append(sizes.names[param.name])
        elif param.default is not REQUIRED:
            values.append(param.default)
        elif str(param.type) in _USUAL:
            values.append(_USUAL[str(param.type)])
        else:
            raise _unknown(op, f"nothing says what its argument {param.name} may be")
    return op.schema.split(op.schema.restore(values))


_USUAL = {"float": 0.5, "bool": False}


class _Sizes:
    """How large dimensions are, by name."""

    def __init__(self, op: Op[..., Any], size: int, has_batch: bool) -> None:
        self.names: dict[str, int] = {}
        self._op = op
        self._batch = () if size == 1 else (2 if 1 < size < 100 else size,)
        self._size = 4 if size == 0 and has_batch else size

    def of(self, tensor: Tensors) -> list[int]:
        """Return the shape of a tensor."""
        shape: list[int] = []
        for dim in tensor.entry.dims:
            if dim.star:
                shape += self._batch
            elif dim.is_name:
                shape.append(self.name(dim.text))
            elif dim.text == "_":
                shape.append(self._size)
            else:
                for name in dim.names():
                    self.name(name)
                shape.append(int(eval(dim.text, {"__builtins__": {}}, self.names)))
        return shape

    def name(self, name: str) -> int:
        """Return the size of a name, the same each time."""
        step = len(self.names) if self._size > 1 else 0
        return self.names.setdefault(name, self._size + step)


def _tensor(op: Op[..., Any], tensor: Tensors, sizes: _Sizes) -> Any:
    generator = torch.Generator().manual_seed(len(tensor.name) + len(sizes.names))
    dtype = _dtype(tensor)
    if not (dtype.is_floating_point or dtype.is_complex):
        raise _unknown(
            op, f"its argument {tensor.name} is of {dtype}, and nothing says which values it may have"
        )

    def make() -> Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(sizes.of(tensor), dtype=wide, generator=generator).to(dtype)

    return [make(), make()] if tensor.entry.is_list else make()


def _dtype(tensor: Tensors) -> torch.dtype:
    if tensor.dtype is not None and tensor.dtype.kind == "fixed":
        return tensor.dtype.fixed
    return DTYPES[tensor.entry.usual_dtype] if tensor.entry.dtypes else torch.float32


def _unknown(op: Op[..., Any], found: str) -> ArgumentError:
    return ArgumentError(
        f"making arguments for {op.name}: {found}; expected a shape line over floating tensors. Return some from the "
        f"method `case(self, op, n)` of your suite, as (args, kwargs), for {op.name}.",
        op=op.name,
    )


def values(op: Op[..., Any], case: Case, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Return the arguments in schema order, in a dtype where they can be, on a device."""
    args, kwargs = case
    given = op.schema.fill(*op.schema.carry(args, kwargs))
    if not (dtype.is_floating_point or dtype.is_complex):  # of standard normal numbers most would be 0
        given = mapped(op, given, lambda _, t: t * 10 if t.is_floating_point() else t)
    return mapped(op, cast(op, given, dtype), lambda _, t: t.to(device))


def layouts(op: Op[..., Any], given: Sequence[Any]) -> Iterable[tuple[str, tuple[Any, ...]]]:
    """Yield the same arguments contiguous, transposed in memory, as every second element, and with strides of 0."""
    mutated = {p.name for p in op.schema.params if p.mutated}
    for name, lay in _LAYOUTS.items():
        kept = mutated if name == "expanded" else set()
        yield name, mapped(op, given, lambda n, t: t if n.split("[")[0] in kept else lay(t))  # noqa: B023


def _transposed(tensor: Tensor) -> Tensor:
    turned = tuple(reversed(range(tensor.dim())))
    return tensor.permute(turned).contiguous().permute(turned)


def _sliced(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    wide = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1))
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def _expanded(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand(tensor.shape) if tensor.dim() and tensor.numel() else tensor


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": _expanded,
}


def save(calls: Iterable[Call], path: Path) -> None:
    """Write calls into a file, for other processes."""
    torch.save([tuple(call) for call in calls], path)


def load(path: str) -> list[Call]:
    """Return the calls that a file has."""
    return [Call(*one) for one in torch.load(path, weights_only=True)]


def selected(call: Call) -> str:
    """Return the backend that a call is given to where its own is preferred."""
    op = opkit.get(call.op)
    args, kwargs = op.schema.split(op.schema.restore(call.values))
    with opkit.use_backend(call.backend):
        return op.explain(*args, **kwargs).selected or ""


def wrong(call: Call) -> list[str]:
    """Return how the results of a call, made where its backend is preferred, differ from the reference's."""
    op = opkit.get(call.op)
    with opkit.use_backend(call.backend), torch.no_grad():
        given = mapped(op, call.values, lambda _, t: copied(t))
        records = checker.kernels(op, given, only=selected(call), slack=call.slack)
    return [f"{call.op}: {record}" for record in records if record.status == "failed"]
