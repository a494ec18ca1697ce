"""The autograd kernel of an op, in Python: it runs the op below autograd and records how to differentiate it.

Used for every op, also for one without a formula, so that backward raises instead of stopping silently.
It never goes through `torch.library.register_autograd`, which refuses keyword-only tensors and mutation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit import _torch
from opkit.errors import GradientError
from opkit.spec.schema import Schema
from opkit.transforms.formula import Formula, NoFormula

_FIXED = 2  # leading arguments of Function.apply that are not the op's


def autograd_kernel(schema: Schema, overload: Any, formula: Callable[[], Formula]) -> Callable[..., Any]:
    """Return the kernel for the Autograd key of `overload`, which asks `formula` at every call.

    The overload takes the arguments of `schema`, and possibly further keyword arguments, which are
    passed on as they are.
    """
    own = {p.name for p in schema.keyword_only}

    def below(keyset: Any, values: Sequence[Any], extra: dict[str, Any]) -> Any:
        args, kwargs = schema.split(values)
        with _torch.below_autograd():
            return overload.redispatch(keyset & _torch.after_autograd, *args, **kwargs, **extra)

    def forward(ctx: Any, keyset: Any, call: _Call, *flat: Any) -> Any:
        values = _unflatten(flat, call.lengths)
        outputs = schema.flatten(below(keyset, values, call.extra))
        ctx.opkit_call = call
        call.outputs = [len(o) if isinstance(o, (list, tuple)) else None for o in outputs]
        rule = formula()
        rule.save(ctx, tuple(values), outputs)
        constant: list[Tensor] = []
        for result, output in zip(schema.results, outputs, strict=True):
            for tensor in output if isinstance(output, (list, tuple)) else (output,):
                if isinstance(tensor, Tensor) and (
                    result.name in rule.non_differentiable
                    or not (tensor.is_floating_point() or tensor.is_complex())
                ):
                    constant.append(tensor)
        if constant:
            ctx.mark_non_differentiable(*constant)
        ctx.opkit_formula = rule
        return tuple(_flatten(outputs))

    def backward(ctx: Any, *flat: Any) -> Any:
        call: _Call = ctx.opkit_call
        needs = ctx.needs_input_grad
        try:
            ctx.needs_input_grad = tuple(_unflatten(needs[_FIXED:], call.lengths))
            found = ctx.opkit_formula.gradients(ctx, tuple(_unflatten(flat, call.outputs)))
        finally:
            ctx.needs_input_grad = needs
        grads: list[Any] = []
        for param, grad, length in zip(schema.params, found, call.lengths, strict=True):
            if length is None:
                grads.append(grad)
            elif grad is None:
                grads += [None] * length
            elif len(grad) != length:
                raise GradientError(
                    f"differentiating {schema.name}: the formula returned {len(grad)} gradients for the list "
                    f"{param.name}; expected {length}, one per tensor. Return a list of that length, or None.",
                    op=schema.name,
                )
            else:
                grads += grad
        return (None,) * _FIXED + tuple(grads)

    function: Any = type(
        schema.opname,  # torch adds Backward
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
        extra = {name: value for name, value in kwargs.items() if name not in own}
        values = schema.fill(args, {k: v for k, v in kwargs.items() if k in own} if extra else kwargs)
        _refuse_tangents(schema, values)
        if not _requires_grad(values) or not torch.is_grad_enabled():
            return below(keyset, values, extra)
        _refuse_lost_gradients(schema, values, formula())
        if not schema.results:
            return below(keyset, values, extra)
        lengths = [
            len(v) if p.type.base == "Tensor" and p.type.is_list and v is not None else None
            for p, v in zip(schema.params, values, strict=True)
        ]
        call = _Call(lengths, extra)
        outputs = function.apply(keyset, call, *_flatten(values, lengths))
        return schema.raw(_unflatten(outputs, call.outputs))

    return kernel


class _Call:
    """How one call's nested arguments and outputs were laid flat for autograd."""

    __slots__ = ("extra", "lengths", "outputs")

    def __init__(self, lengths: list[int | None], extra: dict[str, Any]) -> None:
        self.lengths = lengths
        self.extra = extra
        self.outputs: list[int | None] = []


def version_kernel(schema: Schema, overload: Any) -> Callable[..., Any]:
    """Return the ADInplaceOrView kernel of a mutating op: autograd must see that its inputs changed."""
    mutated = [i for i, p in enumerate(schema.params) if p.mutated]
    own = {p.name for p in schema.keyword_only}

    def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
        values = schema.fill(args, {k: v for k, v in kwargs.items() if k in own})
        for index in mutated:
            torch.autograd.graph.increment_version(values[index])
        return overload.redispatch(keyset & _torch.after_inplace_or_view, *args, **kwargs)

    return kernel


def _requires_grad(values: Sequence[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (list, tuple)) and _requires_grad(value):
            return True
    return False


def _refuse_tangents(schema: Schema, values: Sequence[Any]) -> None:
    for param, value in zip(schema.params, values, strict=True):
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, Tensor) and _torch.has_tangent(one):
                raise GradientError(
                    f"differentiating {schema.name} in forward mode: argument {param.name} has a tangent, and the "
                    "op has no forward-mode formula; torch would go on with zeros. Use reverse mode, or write "
                    "the computation with torch operations.",
                    op=schema.name,
                )


def _refuse_lost_gradients(schema: Schema, values: Sequence[Any], formula: Formula) -> None:
    """Raise where a mutation would make gradients silently wrong."""
    mutated = [p.name for p in schema.params if p.mutated]
    if not mutated:
        return
    for param, value in zip(schema.params, values, strict=True):
        if not _requires_grad((value,)):
            continue
        if param.mutated or isinstance(formula, NoFormula) or not schema.results:
            lost = "is overwritten" if param.mutated else f"flows into {', '.join(mutated)}"
            formula_helps = not param.mutated and schema.results
            raise GradientError(
                f"calling {schema.name} with gradients: argument {param.name} requires grad and {lost}; the op "
                f"mutates {', '.join(mutated)}, so autograd would silently give wrong gradients. Call it under "
                "torch.no_grad(), or write the op without mutation"
                + (", or register a formula with register_autograd." if formula_helps else "."),
                op=schema.name,
            )


def _flatten(values: Sequence[Any], lengths: Sequence[int | None] | None = None) -> list[Any]:
    flat: list[Any] = []
    for index, value in enumerate(values):
        nested = lengths[index] is not None if lengths is not None else isinstance(value, (list, tuple))
        if nested:
            flat += value
        else:
            flat.append(value)
    return flat


def _unflatten(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    items = iter(flat)
    return [next(items) if n is None else [next(items) for _ in range(n)] for n in lengths]
