"""The arguments of a checked call: copies of them in other dtypes, and what a call with them gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.transforms.formula import NoFormula, differentiable_arguments

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def named(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Return values by name, those of a list one by one: `xs[1]`."""
    found: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if isinstance(value, list) or type(value) is tuple:  # not a record, such as OutputMeta
            found.update({f"{name}[{i}]": one for i, one in enumerate(value)})
        else:
            found[name] = value
    return found


def mapped(
    op: Op[..., Any], values: Sequence[Any], function: Callable[[str, Tensor], Any]
) -> tuple[Any, ...]:
    """Return arguments in schema order with `function` applied to each tensor, which gets its name too."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(f"{name}[{i}]", v) for i, v in enumerate(value)]
        return function(name, value) if isinstance(value, Tensor) else value

    return tuple(one(p.name, value) for p, value in zip(op.schema.params, values, strict=True))


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of the same layout, without history."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.layout is not torch.strided or type(tensor) is not Tensor:
        return tensor.clone()
    storage = tensor.untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def widened(tensor: Tensor) -> Tensor:
    """Return a copy in float64 or complex128, as it is where it is neither; what has 8 bits or less is a code."""
    if tensor.is_complex():
        return tensor.detach().to(torch.complex128, copy=True)
    return tensor.detach().to(torch.float64, copy=True) if tensor.dtype in FLOATING else copied(tensor)


def castable(op: Op[..., Any], values: Sequence[Any]) -> set[str]:
    """Return the names of floating arguments whose dtype the shape line leaves open."""
    plan = op._meta.plan
    rules = {t.name: t.dtype for t in plan.inputs} if plan is not None else {}

    def is_open(name: str, asked: tuple[str, ...] = ()) -> bool:
        rule = rules.get(name)
        if rule is None or name in asked:
            return True
        return rule.kind == "first" or (
            rule.kind in ("tensor", "each") and is_open(rule.name, (*asked, name))
        )

    tensors = named([p.name for p in op.schema.params], values)
    found = {n for n, v in tensors.items() if isinstance(v, Tensor) and v.dtype in FLOATING}
    return {n for n in found if is_open(n.split("[")[0])}


def cast(op: Op[..., Any], values: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the arguments with those that can be in `dtype`."""
    names = castable(op, values)
    return mapped(op, values, lambda name, t: t.detach().to(dtype) if name in names else t)


def outputs(op: Op[..., Any], function: Callable[..., Any], given: Sequence[Any]) -> dict[str, Any]:
    """Call with `given`, which may be overwritten; return results and mutated arguments by name."""
    args, kwargs = op.schema.split(given)
    found = named([r.name for r in op.schema.results], op.schema.flatten(function(*args, **kwargs)))
    for param, value in zip(op.schema.params, given, strict=True):
        if param.mutated:
            found.update(named([f"argument {param.name}"], [value]))
    return found


def outcome(op: Op[..., Any], values: Sequence[Any]) -> dict[str, Any]:
    """Call the op with copies of the arguments, and return what `outputs` does."""
    return outputs(op, op.overload, mapped(op, values, lambda _, t: copied(t)))


def reference(op: Op[..., Any]) -> Callable[..., Any]:
    """Return the reference as a function of what torch carries."""
    return op.schema.adapt(op.reference)


def chosen(op: Op[..., Any], values: Sequence[Any], backend: str) -> bool:
    """Whether a call is given to a backend where that is preferred."""
    args, kwargs = op.schema.split(op.schema.restore(values))
    with use_backend(backend):
        return op.explain(*args, **kwargs).selected == backend


def differentiable(op: Op[..., Any]) -> frozenset[str]:
    """Return the names of the arguments that the op has gradients for; none where it has no formula."""
    rule = op._formula
    if isinstance(rule, NoFormula) and (op._tangents or rule.tangents) is None:
        return frozenset()
    params = differentiable_arguments(op.schema, op._meta.plan, rule.non_differentiable)
    return frozenset(p.name for p in params)


def is_random(op: Op[..., Any]) -> bool:
    """Whether the op draws random numbers, so that no two calls give the same."""
    return torch.Tag.nondeterministic_seeded in op.overload.tags


def reason(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {error}".split("\n")[0]


def shown(op: Op[..., Any], values: Sequence[Any]) -> str:
    """Return the arguments of a call as one line: `x: float32[2, 5] strides (1, 2), eps=1e-06`.

    Example:
        >>> import opkit, torch
        >>> opkit.testing.arguments.shown(opkit.get("opkit::swiglu"), [torch.ones(2, 3), torch.ones(3, 2).t()])
        'gate: float32[2, 3], up: float32[2, 3] strides (1, 2)'
    """
    parts = []
    for param, value in zip(op.schema.params, op.schema.restore(values), strict=True):
        if isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and _has_tensors(value)):
            parts.append(f"{param.name}: {_described(value)}")
        else:
            parts.append(f"{param.name}={value!r}")
    return ", ".join(parts)


def _has_tensors(values: Iterable[Any]) -> bool:
    return any(isinstance(v, Tensor) for v in values)


def _described(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.device.type != "cpu":
        text += f" on {value.device}"
    if not value.is_contiguous():
        text += f" strides {tuple(value.stride())}"
    elif value.storage_offset():
        text += f" offset {value.storage_offset()}"
    return text


def count(values: Sequence[Any]) -> int:
    """Return how many elements the largest tensor of a call has."""
    listed = [v for one in values for v in (one if isinstance(one, (list, tuple)) else [one])]
    return max((math.prod(v.shape) for v in listed if isinstance(v, Tensor)), default=0)
