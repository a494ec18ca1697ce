"""What autograd must know of an op that writes into its arguments, and where it has to refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from opkit import _torch, _torch_library
from opkit.errors import GradientError
from opkit.spec.schema import Schema, tensors
from opkit.transforms.formula import Formula, NoFormula


def version_kernel(schema: Schema, overload: _torch_library.Overload, extra: str) -> Callable[..., Any]:
    """Return the ADInplaceOrView kernel of a mutating op: autograd must see that its inputs changed.

    Args:
        schema: of the op.
        overload: whose kernel it is.
        extra: a keyword argument of the overload that the op has not.
    """
    mutated = [i for i, p in enumerate(schema.params) if p.mutated]

    def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
        values = schema.fill(args, {k: v for k, v in kwargs.items() if k != extra})
        for index in mutated:
            torch.autograd.graph.increment_version(values[index])
        return overload().redispatch(keyset & _torch.after_inplace_or_view, *args, **kwargs)

    return kernel


def refuse_unseen_mutation(schema: Schema) -> None:
    """Raise where torch.func would differentiate a mutation that it cannot see.

    It wraps a captured tensor anew for every operation, so what was saved of it before has another version
    counter than what the op writes into. torch checks that for its own in-place operations only.
    """
    if _torch.in_func_gradient():
        mutated = ", ".join(p.name for p in schema.params if p.mutated)
        raise GradientError(
            f"calling {schema.name} inside a gradient of torch.func (grad, vjp, jacrev): the op mutates {mutated}, "
            "and torch.func cannot see whether a saved tensor changed, so gradients would be silently wrong. "
            "Call it outside of the transform, use torch.autograd (backward, autograd.grad), or write the op "
            "without mutation.",
            op=schema.name,
        )


def refuse_lost_gradients(schema: Schema, values: Sequence[Any], formula: Formula) -> None:
    """Raise where a mutation would make gradients silently wrong.

    What a formula differentiates are results. What the op writes into an argument is a constant to autograd, and
    the author must have said that it is one, by naming the argument in `non_differentiable`.
    """
    mutated = ", ".join(p.name for p in schema.params if p.mutated)
    has_formula = not isinstance(formula, NoFormula)
    unsaid = ", ".join(
        p.name
        for p, value in zip(schema.params, values, strict=True)
        if p.mutated and p.name not in formula.non_differentiable and _has_gradients(value)
    )
    for param, value in zip(schema.params, values, strict=True):
        if not _torch.any_requires_grad(value):
            continue
        if param.mutated or not has_formula or not schema.results or unsaid:
            lost = "is overwritten" if param.mutated else f"flows into {mutated}"
            advice = "."
            if not param.mutated and schema.results:
                advice = (
                    f", or name {unsaid} in non_differentiable= of register_autograd, where what is written there is "
                    "not to be differentiated."
                    if has_formula
                    else ", or register a formula with register_autograd."
                )
            raise GradientError(
                f"calling {schema.name} with gradients: argument {param.name} requires grad and {lost}; the op "
                f"mutates {mutated}, so autograd would silently give wrong gradients. Call it under "
                f"torch.no_grad(), or write the op without mutation{advice}",
                op=schema.name,
            )


def is_settled(schema: Schema, formula: Formula) -> bool:
    """Whether all that an op writes into is said to have no gradient, and its results have one."""
    named = all(p.name in formula.non_differentiable for p in schema.params if p.mutated)
    return named and bool(schema.results) and not isinstance(formula, NoFormula)


def _has_gradients(value: Any) -> bool:
    """Whether a tensor, or one in a list, is of a dtype that can be differentiated."""
    return any(t.is_floating_point() or t.is_complex() for t in tensors([value]))
