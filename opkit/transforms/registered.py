"""What `register_autograd` and `register_jvp` are given, as the formula and the tangents that it means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opkit.errors import RegistrationError
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema
from opkit.transforms.formula import Formula, FunctionFormula, OpFormula
from opkit.transforms.forward_mode import FunctionTangents, ReferenceTangents, Tangents
from opkit.transforms.recompute import ReferenceFormula, as_in_forward_within_a_kernel, from_reference


def formula(
    schema: Schema,
    plan: Plan | None,
    reference: Callable[..., Any] | None,
    backward: Any,
    setup_context: Callable[..., None] | None,
    *,
    saves: Sequence[str],
    non_differentiable: Sequence[str],
    effects: bool,
) -> Formula:
    """Return the formula that `backward` is: an op, a function, or `from_reference`.

    Args:
        schema: of the op that is differentiated.
        plan: its shape line.
        reference: what it computes, or None where nothing says that.
        backward: as given to `register_autograd`, like the rest.
        setup_context: for a function.
        saves: for an op.
        non_differentiable: outputs and arguments without a gradient.
        effects: whether the op has some.

    Raises:
        RegistrationError: these do not go together, or do not fit the op.
    """
    saves = [saves] if isinstance(saves, str) else saves
    without = [non_differentiable] if isinstance(non_differentiable, str) else non_differentiable
    what = "the gradient"
    _check_names(schema, without)
    if backward is from_reference and effects:
        raise _error(
            schema, what, "from_reference for an op with effects=True",
            "a formula without them, since the reference would run once more in backward",
            "Register a function or an op",
        )  # fmt: skip
    if saves and not _is_op(backward):
        raise _error(
            schema, what, "saves= with a formula that is not an op", "saves= with the Op form only",
            "Save values in setup_context, or leave saves= out",
        )  # fmt: skip
    if setup_context is not None and (_is_op(backward) or backward is from_reference):
        raise _error(
            schema, what, "setup_context with a formula that is not a function",
            "setup_context with the function form only", "Name the values in saves=",
        )  # fmt: skip
    if _is_op(backward):
        return OpFormula(schema, plan, backward, saves, without)
    if backward is from_reference:
        if reference is None:
            raise _error(
                schema, what, "from_reference", "a formula, as the op is declared without a reference",
                "Register a function or an op",
            )  # fmt: skip
        return ReferenceFormula(schema, reference, without)
    if callable(backward):
        return FunctionFormula(schema, backward, setup_context, without)
    raise _error(
        schema, what, repr(backward), "a function, an Op or opkit.from_reference", "Pass one of these"
    )


def tangents(
    schema: Schema, reference: Callable[..., Any], jvp: Any, setup_context: Callable[..., None] | None
) -> Tangents:
    """Return the rule for forward mode that `jvp` is: a function, or `from_reference`.

    Raises:
        RegistrationError: it does not fit the op.
    """
    what, mutated = "the forward-mode formula", [p.name for p in schema.params if p.mutated]
    if mutated:
        raise _error(
            schema, what, f"an op that mutates {', '.join(mutated)}", "one that mutates nothing, since the tangent of "
            "what it overwrites would be lost", "Write the op without mutation",
        )  # fmt: skip
    if jvp is from_reference:
        if setup_context is not None:
            raise _error(
                schema, what, "setup_context with from_reference", "it with a function only", "Leave it out"
            )
        return ReferenceTangents(schema, schema.adapt(reference), as_in_forward_within_a_kernel)
    if callable(jvp) and not _is_op(jvp):
        return FunctionTangents(schema, jvp, setup_context)
    raise _error(schema, what, repr(jvp), "a function or opkit.from_reference", "Pass one of these")


def _is_op(value: Any) -> bool:
    return isinstance(getattr(value, "schema", None), Schema)


def _check_names(schema: Schema, non_differentiable: Sequence[str]) -> None:
    names = [p.name for p in schema.params] + [r.name for r in schema.results]
    for name in non_differentiable:
        if name not in names:
            raise _error(
                schema, "the gradient", f"non_differentiable names {name!r}", f"one of {', '.join(names)}",
                "Name arguments or outputs of the op",
            )  # fmt: skip
        if names.count(name) > 1:
            raise _error(
                schema, "the gradient", f"non_differentiable names {name!r}, an argument and an output",
                "a name that says which of them has no gradient",
                f"Rename one of them, or return None for {name} in a formula of your own",
            )  # fmt: skip


def _error(schema: Schema, what: str, found: str, expected: str, advice: str) -> RegistrationError:
    return RegistrationError(
        f"registering {what} of {schema.name}: found {found}; expected {expected}. {advice}.", op=schema.name
    )
