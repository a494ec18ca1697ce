"""Forward-mode differentiation of an op: the tangents of its outputs from those of its arguments.

A rule gets primals and tangents, and does not know how autograd calls it: that is `gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from opkit import _torch
from opkit.errors import GradientError
from opkit.spec.schema import Schema, check_arity, tensors

Save = Callable[[Any, "tuple[Any, ...]", "tuple[Any, ...]"], None]


class Tangents(Protocol):
    """How an op is differentiated in forward mode."""

    def tangents(
        self, values: tuple[Any, ...], outputs: tuple[Any, ...], tangents: tuple[Any, ...], save: Save
    ) -> Sequence[Any]:
        """Return one tangent per output, None where there is none.

        Args:
            values: the primal arguments in schema order.
            outputs: the primal outputs.
            tangents: one per argument; None for what has none, also inside lists.
            save: what the gradient formula does with a context after a forward call.
        """


class FunctionTangents:
    """torch's form: `jvp(ctx, *tangents)`, with the context that the backward formula would get."""

    def __init__(
        self, schema: Schema, jvp: Callable[..., Any], setup_context: Callable[..., None] | None
    ) -> None:
        wanted = ["ctx", *(f"tangent of {p.name}" for p in schema.params)]
        check_arity(schema, jvp, "the forward-mode formula", "jvp", wanted)
        self.schema = schema
        self.jvp = jvp
        self.setup_context = setup_context

    def tangents(
        self, values: tuple[Any, ...], outputs: tuple[Any, ...], tangents: tuple[Any, ...], save: Save
    ) -> Sequence[Any]:
        schema, ctx = self.schema, Context()
        ctx.needs_input_grad = tuple(map(_has_any, tangents))
        if self.setup_context is not None:
            self.setup_context(ctx, schema.restore(values), schema.pack(schema.raw(outputs)))
        else:
            save(ctx, values, outputs)
        given = tuple(map(_materialized, values, tangents))
        found = self.jvp(ctx, *given)
        if not isinstance(found, tuple):
            only_list = len(schema.results) == 1 and schema.results[0].type.is_list
            found = (found,) if not isinstance(found, list) or only_list else tuple(found)
        if len(found) != len(schema.results):
            raise GradientError(
                f"differentiating {schema.name} in forward mode: its jvp returned {len(found)} tangents; expected "
                f"{len(schema.results)}, one per output in order: {', '.join(r.name for r in schema.results)}. "
                "Return None for outputs without a tangent.",
                op=schema.name,
            )
        for result, output, tangent in zip(schema.results, outputs, found, strict=True):
            if tangent is None:
                continue
            many = result.type.is_list
            if many and not (isinstance(tangent, (list, tuple)) and len(tangent) == len(output)):
                raise self._error(result.name, tangent, f"a list of {len(output)} tangents")
            pairs = zip(output, tangent, strict=True) if many else [(output, tangent)]
            for one, its in pairs:
                self._check(result.name, one, its)
        return found

    def _check(self, name: str, output: Any, tangent: Any) -> None:
        if tangent is None or not isinstance(output, Tensor):
            return
        if not isinstance(tangent, Tensor):
            raise self._error(name, tangent, "a Tensor or None")
        for field in ("shape", "dtype", "device"):
            wanted, found = getattr(output, field), getattr(tangent, field)
            if wanted != found:
                wanted, found = (tuple(f) if field == "shape" else f for f in (wanted, found))
                raise self._error(name, f"the {field} {found}", f"{wanted}, that of the output")

    def _error(self, name: str, found: Any, expected: str) -> GradientError:
        shown = found if isinstance(found, str) else type(found).__name__
        return GradientError(
            f"differentiating {self.schema.name} in forward mode: its jvp returned {shown} as the tangent of "
            f"{name}; expected {expected}. Correct the function given to register_jvp.",
            op=self.schema.name,
        )


class ReferenceTangents:
    """Run the reference again on dual numbers."""

    def __init__(self, schema: Schema, reference: Callable[..., Any], guard: Callable[..., Any]) -> None:
        self.schema = schema
        self.reference = reference
        self.guard = guard

    def tangents(
        self, values: tuple[Any, ...], outputs: tuple[Any, ...], tangents: tuple[Any, ...], save: Save
    ) -> Sequence[Any]:
        with self.guard(self.schema.name, values):
            args, kwargs = self.schema.split(tuple(map(_dual, values, tangents)))
            found = self.schema.flatten(self.reference(*args, **kwargs))
            return [tangent(o) for o in found]


class Context:
    """What `setup_context` fills and `jvp` reads: torch's context, as far as forward mode has a use for it."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.needs_input_grad: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors, for `saved_tensors`."""
        self.saved_tensors = tensors

    save_for_forward = save_for_backward

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Say nothing: the autograd kernel has been told in the forward call."""

    def set_materialize_grads(self, value: bool) -> None:
        """Say nothing: it is about the backward pass."""


def primal(value: Any) -> Any:
    """Return an argument without its tangents, a list with each of its tensors so."""
    if isinstance(value, (list, tuple)):
        return [primal(v) for v in value]
    return _torch.primal(value) if isinstance(value, Tensor) else value


def tangent(value: Any) -> Any:
    """Return the tangent of an argument or output, None where there is none; a list of them for a list of tensors."""
    if isinstance(value, (list, tuple)):
        return [tangent(v) for v in value]
    return _torch.tangent(value) if isinstance(value, Tensor) else None


def refuse_tangents(schema: Schema, values: Sequence[Any]) -> None:
    """Raise for a call with tangents that no rule can take on."""
    mutated = [p.name for p in schema.params if p.mutated]
    why, advice = "the op has no forward-mode formula", (
        "Register one with register_jvp(jvp), or with register_jvp(opkit.from_reference) where the reference is "
        "differentiable, or use reverse mode"
    )  # fmt: skip
    if mutated or not schema.results:
        why = f"the op mutates {', '.join(mutated)}" if mutated else "the op has no results"
        advice = "Write the op without mutation, or the computation with torch operations"
    if has_tangents(values):
        raise GradientError(
            f"differentiating {schema.name} in forward mode: an argument has a tangent, and {why}; torch would "
            f"go on with zeros. {advice}.",
            op=schema.name,
        )


def has_tangents(values: Sequence[Any]) -> bool:
    """Whether any of the values, or of the tensors in a list among them, has a tangent."""
    return any(_torch.has_tangent(t) for t in tensors(values))


def _has_any(tangent: Any) -> Any:
    return [t is not None for t in tangent] if isinstance(tangent, (list, tuple)) else tangent is not None


def _materialized(value: Any, tangent: Any) -> Any:
    """Return the tangent of an argument, zeros where it has none but could have one."""
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return [_materialized(v, t) for v, t in zip(value, tangent or [None] * len(value), strict=True)]
    if tangent is None and isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return torch.zeros_like(value)
    return tangent


def _dual(value: Any, tangent: Any) -> Any:
    if isinstance(value, (list, tuple)) and isinstance(tangent, (list, tuple)):
        return [_dual(v, t) for v, t in zip(value, tangent, strict=True)]
    return value if tangent is None else _torch.make_dual(value, tangent)
