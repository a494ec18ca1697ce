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
_NOTHING = (None,) * _FIXED  # their gradients


def autograd_kernel(
    schema: Schema, overload: Any, run: Callable[..., Any], formula: Callable[[], Formula], *, variant: bool
) -> Callable[..., Any]:
    """Return the kernel for the Autograd key of `overload`, which asks `formula` at every call.

    Args:
        schema: of the op.
        overload: what is differentiated.
        run: what `overload` does on real tensors, called without another trip through the dispatcher where
            nothing stands between autograd and the device.
        formula: gives the formula now registered.
        variant: whether the overload has one more keyword argument, which is passed on as it is.
    """
    types = [p.type for p in schema.params] + [r.type for r in schema.results]
    nested = any(t.base == "Tensor" and t.is_list for t in types)
    mutates = any(p.mutated for p in schema.params)
    # A mutating op has a kernel of its own on ADInplaceOrView, for the others the key means nothing.
    mask = _torch.after_autograd if mutates else _torch.after_inplace_or_view
    straight = _torch.Straight(overload)
    flat_call = _Call([None] * len(schema.params), [None] * len(schema.results))

    def below(keyset: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with _torch.below_autograd():
            if not mutates and straight(keyset):
                return run(*args, **kwargs)
            return overload.redispatch(keyset & mask, *args, **kwargs)

    def forward(ctx: Any, keyset: Any, call: _Call, *flat: Any) -> Any:
        values = _unflatten(flat, call.lengths) if nested else flat
        if schema.keyword_only:
            args, kwargs = schema.split(values)
            outputs = schema.flatten(below(keyset, args, {**kwargs, **call.extra}))
        else:
            outputs = schema.flatten(below(keyset, values, call.extra))
        rule = formula()
        rule.save(ctx, tuple(values), outputs)
        ctx.opkit_call, ctx.opkit_formula = call, rule
        if nested:
            call.outputs = [len(o) if isinstance(o, (list, tuple)) else None for o in outputs]
        constant = _without_gradient(schema, outputs, rule)
        if constant:
            ctx.mark_non_differentiable(*constant)
        return tuple(_flatten(outputs, call.outputs)) if nested else outputs

    def backward(ctx: Any, *flat: Any) -> Any:
        call: _Call = ctx.opkit_call
        needs = ctx.needs_input_grad
        own, grads = needs[_FIXED:], flat
        if nested:
            own, grads = tuple(_unflatten(own, call.lengths)), tuple(_unflatten(flat, call.outputs))
        ctx.needs_input_grad = own
        try:
            found = ctx.opkit_formula.gradients(ctx, grads)
        finally:
            ctx.needs_input_grad = needs  # a retained graph comes here again
        return (*_NOTHING, *(_laid_flat(schema, found, call.lengths) if nested else found))

    function: Any = type(
        schema.opname,  # torch adds Backward
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
        if _torch.in_forward_mode():
            _refuse_tangents(schema, [*args, *kwargs.values()])
        if not (torch.is_grad_enabled() and _torch.any_requires_grad(*args, **kwargs)):
            return below(keyset, args, kwargs)
        extra = {EXTRA: kwargs.pop(EXTRA)} if variant else {}
        values = schema.fill(args, kwargs)
        if mutates:
            _refuse_lost_gradients(schema, values, formula())
        if not schema.results:
            args, kwargs = schema.split(values)
            return below(keyset, args, {**kwargs, **extra})
        call = flat_call
        if nested or extra:
            call = _Call(_lengths(schema, values), [None] * len(schema.results), extra)
        try:
            outputs = function.apply(keyset, call, *(_flatten(values, call.lengths) if nested else values))
        except RuntimeError as err:
            if "setup_context" not in str(err):
                raise
            raise GradientError(
                f"differentiating {schema.name} with torch.func: torch cannot transform a formula in Python; "
                "expected torch.autograd (backward, autograd.grad, functional.jacobian). Use it instead.",
                op=schema.name,
            ) from err
        return schema.raw(_unflatten(outputs, call.outputs) if nested else outputs)

    return kernel


EXTRA = "opkit_backend"  # the keyword argument that a variant has beside the op's own


class _Call:
    """How one call's nested arguments and outputs were laid flat for autograd."""

    __slots__ = ("extra", "lengths", "outputs")

    def __init__(
        self, lengths: list[int | None], outputs: list[int | None], extra: dict[str, Any] | None = None
    ) -> None:
        self.lengths = lengths
        self.outputs = outputs
        self.extra = extra or {}


def _lengths(schema: Schema, values: Sequence[Any]) -> list[int | None]:
    return [
        len(v) if p.type.base == "Tensor" and p.type.is_list and v is not None else None
        for p, v in zip(schema.params, values, strict=True)
    ]


def _without_gradient(schema: Schema, outputs: Sequence[Any], rule: Formula) -> list[Tensor]:
    found = []
    for result, output in zip(schema.results, outputs, strict=True):
        for one in output if isinstance(output, (list, tuple)) else (output,):
            if result.name in rule.non_differentiable or not (one.is_floating_point() or one.is_complex()):
                found.append(one)
    return found


def _laid_flat(schema: Schema, found: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """Return the gradients of nested arguments one after the other, as autograd wants them."""
    grads: list[Any] = []
    for param, grad, length in zip(schema.params, found, lengths, strict=True):
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
    return grads


def version_kernel(schema: Schema, overload: Any) -> Callable[..., Any]:
    """Return the ADInplaceOrView kernel of a mutating op: autograd must see that its inputs changed."""
    mutated = [i for i, p in enumerate(schema.params) if p.mutated]

    def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
        values = schema.fill(args, {k: v for k, v in kwargs.items() if k != EXTRA})
        for index in mutated:
            torch.autograd.graph.increment_version(values[index])
        return overload.redispatch(keyset & _torch.after_inplace_or_view, *args, **kwargs)

    return kernel


def _refuse_tangents(schema: Schema, values: Sequence[Any]) -> None:
    for value in values:
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, Tensor) and _torch.has_tangent(one):
                raise GradientError(
                    f"differentiating {schema.name} in forward mode: an argument has a tangent, and the op has no "
                    "forward-mode formula; torch would go on with zeros. Use reverse mode, or write the "
                    "computation with torch operations.",
                    op=schema.name,
                )


def _refuse_lost_gradients(schema: Schema, values: Sequence[Any], formula: Formula) -> None:
    """Raise where a mutation would make gradients silently wrong."""
    mutated = [p.name for p in schema.params if p.mutated]
    if not mutated:
        return
    for param, value in zip(schema.params, values, strict=True):
        if not _torch.any_requires_grad(value):
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


def _flatten(values: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    flat: list[Any] = []
    for value, length in zip(values, lengths, strict=True):
        if length is None:
            flat.append(value)
        else:
            flat += value
    return flat


def _unflatten(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    items = iter(flat)
    return [next(items) if n is None else [next(items) for _ in range(n)] for n in lengths]
