"""What a call must move and compute by the declaration, and the copy that shows how fast the machine could be.

Bytes are those of the distinct tensors among arguments and results; an argument that the op overwrites is read and
written. FLOPs are what the op's `flops=` says. Nothing is known of a gradient that is a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opkit._op import Op
from opkit.spec.schema import tensors
from opkit.transforms.formula import OpFormula

_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product shows how fast the machine computes


class Work(NamedTuple):
    """Bytes that a call must read and write, and its floating-point operations; None where nothing says it."""

    bytes: int | None
    flops: float | None

    def __add__(self, other: Any) -> Work:
        return Work(*(None if a is None or b is None else a + b for a, b in zip(self, other, strict=True)))


def forward(op: Op[..., Any], values: Sequence[Any], results: Sequence[Any]) -> Work:
    """Return the work of a call, by its arguments in schema order and its results."""
    written = [v for p, v in zip(op.schema.params, values, strict=True) if p.mutated]
    return Work(_bytes(values) + _bytes(results) + _bytes(written), _flops(op, values, results))


def backward(op: Op[..., Any], values: Sequence[Any], results: Sequence[Any]) -> Work:
    """Return the work of the gradient after that, where another op is the formula."""
    rule = op._formula
    if not isinstance(rule, OpFormula):
        return Work(None, None)
    grads = [_like(results[i]) for i in rule.outputs]
    saved = [(values if where == "in" else results)[i] for where, i in rule.saves]
    names = [p.name for p in op.schema.params]
    wanted = [values[names.index(p.name)] for p in rule.arguments]
    own = rule.formula.schema.fill([*grads, *saved], {})
    return Work(_bytes(own) + _bytes([wanted]), _flops(rule.formula, own, wanted))


def copying(size: int, device: str) -> Callable[[], object]:
    """Return a copy that reads and writes so many bytes together."""
    source = torch.ones(max(size // 2, 1), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # written, so that the memory is there
    return lambda: target.copy_(source)


def multiplying(dtype: torch.dtype, device: str) -> tuple[Callable[[], object], float]:
    """Return a product of matrices, and how many floating-point operations that is."""
    side = _SIDE.get(device, 1024)
    left = torch.ones(side, side, dtype=dtype, device=device)
    right = torch.ones_like(left)
    return lambda: left @ right, 2.0 * side**3


def _like(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_like(one) for one in value]
    return torch.empty_like(value) if isinstance(value, Tensor) else value


def _bytes(values: Sequence[Any]) -> int:
    """Return the bytes of distinct tensors; what is repeated by a stride of 0 is there once."""
    found: dict[Any, int] = {}
    for tensor in _all(values):
        key = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
        count = torch.Size(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step).numel()
        found[key if tensor.data_ptr() else id(tensor)] = (
            count * tensor.element_size() if tensor.numel() else 0
        )
    return sum(found.values())


def _all(values: Sequence[Any]) -> list[Tensor]:
    return [t for v in values for t in (tensors(v) if isinstance(v, (list, tuple)) else tensors([v]))]


def _flops(op: Op[..., Any], values: Sequence[Any], results: Sequence[Any]) -> float | None:
    if op._count is None:
        return None
    args, kwargs = op.schema.split(values)
    return float(op._count(*args, out_val=op.schema.raw(list(results)), **kwargs))
