"""The three ways to say an op's gradient, behind one interface.

A formula keeps what it needs from a forward call, and later turns the gradients of the outputs
into one gradient (or None) per argument. It does not know how autograd calls it: that is `gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from opkit.dispatch.native.description import FunctionValue, OpValue, RuleValue, is_plain
from opkit.errors import GradientError, RegistrationError
from opkit.spec.plan import Plan, Tensors
from opkit.spec.schema import REQUIRED, Param, Schema, check_arity
from opkit.transforms.forward_mode import Tangents


class Formula(Protocol):
    """How an op is differentiated."""

    non_differentiable: frozenset[str]

    @property
    def tangents(self) -> Tangents | None:
        """The rule for forward mode that comes with it."""

    def save(self, ctx: Any, values: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Keep what the backward pass needs: arguments in schema order, outputs in order."""

    def gradients(self, ctx: Any, grads: tuple[Any, ...]) -> Sequence[Any]:
        """Return one gradient per argument, None where there is none."""

    def described(self) -> OpValue | FunctionValue | RuleValue:
        """Return it as the native core takes it."""


class FunctionFormula:
    """torch's form: `backward(ctx, *grads)` and `setup_context(ctx, inputs, output)`."""

    tangents = None

    def __init__(
        self,
        schema: Schema,
        backward: Callable[..., Any],
        setup_context: Callable[..., None] | None,
        non_differentiable: Sequence[str],
    ) -> None:
        check_arity(
            schema,
            backward,
            "the gradient",
            "backward",
            ["ctx", *(f"grad of {r.name}" for r in schema.results)],
        )
        if setup_context is not None:
            check_arity(schema, setup_context, "the gradient", "setup_context", ["ctx", "inputs", "output"])
        self.schema = schema
        self.backward = backward
        self.setup_context = setup_context
        self.non_differentiable = frozenset(non_differentiable)

    def save(self, ctx: Any, values: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        if self.setup_context is not None:
            self.setup_context(ctx, self.schema.restore(values), self.schema.pack(self.schema.raw(outputs)))

    def gradients(self, ctx: Any, grads: tuple[Any, ...]) -> Sequence[Any]:
        return self.counted(self.backward(ctx, *grads))

    def described(self) -> FunctionValue:
        constant = constant_results(self.schema, self.non_differentiable)
        return FunctionValue(constant, self.setup_context, self.backward, self.counted)

    def counted(self, result: Any) -> tuple[Any, ...]:
        """Return what `backward` returned as one gradient per argument, or raise."""
        params = self.schema.params
        if not isinstance(result, tuple):
            only_list = len(params) == 1 and params[0].type.is_list
            result = (result,) if not isinstance(result, list) or only_list else tuple(result)
        if len(result) != len(params):
            names = [p.name for p in params]
            raise GradientError(
                f"differentiating {self.schema.name}: its backward returned {len(result)} gradients; expected "
                f"{len(names)}, one per argument in order: {', '.join(names)}. Return None for arguments "
                "without a gradient.",
                op=self.schema.name,
            )
        return tuple(result)


class OpFormula:
    """The formula is another op: it takes the outputs' gradients, then the saved values."""

    tangents = None

    def __init__(
        self,
        schema: Schema,
        plan: Plan | None,
        formula: Any,
        saves: Sequence[str],
        non_differentiable: Sequence[str],
    ) -> None:
        self.schema = schema
        self.formula = formula
        self.non_differentiable = frozenset(non_differentiable)
        self.arguments = differentiable_arguments(schema, plan, self.non_differentiable)
        self.outputs = differentiable_outputs(schema, plan, self.non_differentiable)
        args = {p.name: i for i, p in enumerate(schema.params)}
        outs = {r.name: i for i, r in enumerate(schema.results)}
        self.saves: list[tuple[str, int]] = []
        for name in saves:
            if name not in args and name not in outs:
                raise RegistrationError(
                    f"registering the gradient of {schema.name}: saves names {name!r}; expected arguments "
                    f"({', '.join(args)}) or outputs ({', '.join(outs)}). Name one of these.",
                    op=schema.name,
                )
            self.saves.append(("in", args[name]) if name in args else ("out", outs[name]))
        takes = len(self.outputs) + len(self.saves)
        grads = [f"grad of {schema.results[i].name}" for i in self.outputs]
        needed = [p for i, p in enumerate(formula.schema.params) if i >= takes and p.default is REQUIRED]
        if len(formula.schema.positional) < takes or needed:
            raise RegistrationError(
                f"registering the gradient of {schema.name}: the formula {formula.name} takes "
                f"{', '.join(p.name for p in formula.schema.params)}; expected {takes} arguments: "
                f"{', '.join([*grads, *saves])}. Change saves= or the formula's signature.",
                op=schema.name,
            )
        if len(formula.schema.results) != len(self.arguments):
            raise RegistrationError(
                f"registering the gradient of {schema.name}: the formula {formula.name} returns "
                f"{len(formula.schema.results)} gradients; expected {len(self.arguments)}, one per "
                f"differentiable argument: {', '.join(p.name for p in self.arguments) or 'none'}. Name "
                "arguments without a gradient in non_differentiable=.",
                op=schema.name,
            )

    def save(self, ctx: Any, values: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        save_values(ctx, [(values if side == "in" else outputs)[i] for side, i in self.saves])

    def gradients(self, ctx: Any, grads: tuple[Any, ...]) -> Sequence[Any]:
        result = self.formula(*(grads[i] for i in self.outputs), *saved_values(ctx))
        by_name = dict(
            zip((p.name for p in self.arguments), self.formula.schema.flatten(result), strict=True)
        )
        # An absent optional gets one too, which autograd would refuse.
        return [
            by_name.get(p.name) if wants_gradient(needed) else None
            for p, needed in zip(self.schema.params, ctx.needs_input_grad, strict=True)
        ]

    def _saves_fit(self) -> bool:
        """Whether the values saved are of the types that the formula takes, so that nothing need be converted."""
        takes = self.formula.schema.params[len(self.outputs) :]
        for (side, place), param in zip(self.saves, takes, strict=False):
            given = (self.schema.params if side == "in" else self.schema.results)[place].type
            same = (given.base, given.is_list) == (param.type.base, param.type.is_list)
            if not same or (given.optional and not param.type.optional):
                return False
        return True

    def described(self) -> OpValue | RuleValue:
        constant, formula = constant_results(self.schema, self.non_differentiable), self.formula.schema
        plain = all(str(r.type) == "Tensor" for r in self.schema.results)
        tensors = all(r.type.base == "Tensor" and not r.type.optional for r in formula.results)
        rule = RuleValue(constant, self.save, self.gradients)
        if not (plain and tensors and is_plain(formula) and is_plain(self.schema) and self._saves_fit()):
            return rule
        places = {p.name: i for i, p in enumerate(self.schema.params)}
        return OpValue(
            constant,
            f"{formula.namespace}::{formula.opname}",
            tuple((side == "out", place) for side, place in self.saves),
            self.outputs,
            tuple(places[p.name] for p in self.arguments),
            tuple(place for side, place in self.saves if side == "out" and place not in self.outputs),
            rule,
            self,
        )


class NoFormula:
    """What an op has before a gradient is registered: differentiating it raises."""

    non_differentiable: frozenset[str] = frozenset()
    tangents = None

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def save(self, ctx: Any, values: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Nothing is kept."""

    def described(self) -> RuleValue:
        return RuleValue((False,) * len(self.schema.results), self.save, self.gradients)

    def gradients(self, ctx: Any, grads: tuple[Any, ...]) -> Sequence[Any]:
        name = self.schema.name
        raise GradientError(
            f"differentiating {name}: it has no gradient formula. Register one with "
            f"register_autograd(backward, setup_context=...), with another op, or with "
            f"register_autograd(opkit.from_reference) where the reference is differentiable.",
            op=name,
        )


def differentiable_arguments(
    schema: Schema, plan: Plan | None, non_differentiable: frozenset[str]
) -> tuple[Param, ...]:
    """Return the Tensor arguments that may have a gradient, by what is declared."""
    integer = _integer(plan.inputs if plan is not None else ())
    return tuple(
        p
        for p in schema.params
        if p.type.base == "Tensor"
        and not p.mutated
        and p.name not in non_differentiable
        and p.name not in integer
    )


def differentiable_outputs(
    schema: Schema, plan: Plan | None, non_differentiable: frozenset[str]
) -> tuple[int, ...]:
    """Return the places of the results that may have a gradient, by what is declared."""
    without = non_differentiable | _integer(plan.outputs if plan is not None else ())
    return tuple(i for i, r in enumerate(schema.results) if r.name not in without and not r.is_number)


def _integer(tensors: Sequence[Tensors]) -> set[str]:
    """Return the names of those whose declared dtype has no gradient."""
    fixed = {t.name: t.dtype.fixed for t in tensors if t.dtype is not None and t.dtype.kind == "fixed"}
    return {name for name, dtype in fixed.items() if not (dtype.is_floating_point or dtype.is_complex)}


def constant_results(schema: Schema, names: frozenset[str]) -> tuple[bool, ...]:
    """Return for each result whether it is among those without a gradient."""
    return tuple(result.name in names for result in schema.results)


def wants_gradient(needed: Any) -> bool:
    """Whether autograd wants a gradient of an argument: of one tensor, or of any in a list."""
    return any(needed) if isinstance(needed, (list, tuple)) else bool(needed)


def save_values(ctx: Any, values: Sequence[Any]) -> None:
    """Keep values for `saved_values`: tensors, also in lists, through autograd's own checks."""
    tensors: list[Tensor | None] = []
    pattern: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            pattern.append(len(value))
            tensors += value
        elif isinstance(value, Tensor):
            pattern.append(None)
            tensors.append(value)
        else:
            pattern.append((value,))
    ctx.opkit_pattern = pattern
    ctx.save_for_backward(*tensors)


def saved_values(ctx: Any) -> list[Any]:
    """Return what `save_values` kept."""
    tensors = iter(ctx.saved_tensors)
    values: list[Any] = []
    for item in ctx.opkit_pattern:
        if item is None:
            values.append(next(tensors))
        elif isinstance(item, tuple):
            values.append(item[0])
        else:
            values.append([next(tensors) for _ in range(item)])
    return values
