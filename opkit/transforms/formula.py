"""The three ways to say an op's gradient, behind one interface.

A formula keeps what it needs from a forward call, and later turns the gradients of the outputs
into one gradient (or None) per argument. It does not know how autograd calls it: that is `gradient`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from opkit import _torch
from opkit.errors import GradientError, RegistrationError
from opkit.spec.plan import Plan, Tensors
from opkit.spec.schema import REQUIRED, Param, Schema, check_arity, tensors
from opkit.transforms.forward_mode import ReferenceTangents, Tangents


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
        result = self.backward(ctx, *grads)
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
        return result


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


class ReferenceFormula:
    """Differentiate the reference: run it again in backward and ask autograd."""

    non_differentiable: frozenset[str]

    def __init__(
        self, schema: Schema, reference: Callable[..., Any], non_differentiable: Sequence[str] = ()
    ) -> None:
        mutated = [p.name for p in schema.params if p.mutated]
        if mutated:
            raise RegistrationError(
                f"registering the gradient of {schema.name}: found from_reference for an op that mutates "
                f"{', '.join(mutated)}; expected one that mutates nothing, since the reference would run, and "
                "mutate, once more in backward. Register a function or an op.",
                op=schema.name,
            )
        self.schema = schema
        self.reference = reference
        self._call = schema.adapt(reference)
        self.non_differentiable = frozenset(non_differentiable)
        self.tangents = ReferenceTangents(schema, self._call, as_in_forward_within_a_kernel)

    def save(self, ctx: Any, values: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        save_values(ctx, values)

    def gradients(self, ctx: Any, grads: tuple[Any, ...]) -> Sequence[Any]:
        needs = ctx.needs_input_grad
        saved = saved_values(ctx)
        wanted = [v for v, need in _pairs(saved, needs) if need]
        chosen = [
            (index, place)
            for index, (result, grad) in enumerate(zip(self.schema.results, grads, strict=True))
            if result.name not in self.non_differentiable
            for place, one in (enumerate(grad) if isinstance(grad, (list, tuple)) else [(None, grad)])
            if one is not None
        ]

        def again(*leaves: Tensor) -> list[Any]:
            """Return the outputs that have gradients, from the arguments that need one."""
            rest = iter(leaves)
            values = [_replaced(v, need, rest) for v, need in zip(saved, needs, strict=True)]
            args, kwargs = self.schema.split(values)
            outputs = self.schema.flatten(self._call(*args, **kwargs))
            return [outputs[i] if p is None else outputs[i][p] for i, p in chosen]

        if not wanted or not chosen:
            return [None] * len(self.schema.params)
        cotangents = [grads[i] if p is None else grads[i][p] for i, p in chosen]
        with as_in_forward(self.schema.name, saved):
            found = iter(_derived(again, wanted, cotangents))
        return [_replaced(None, need, found) for need in needs]


def _derived(
    function: Callable[..., list[Any]], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return the gradients of the leaves, connected to them where a second derivative is wanted."""
    if _torch.in_func_transform():  # only a level of its own can be differentiated there
        leaves = [leaf.view_as(leaf) for leaf in leaves]  # of an ended transform, perhaps, which this unwraps
        kept: list[tuple[int, torch.dtype]] = []

        def differentiable(*given: Tensor) -> tuple[Tensor, ...]:
            outputs = [
                (i, o) for i, o in enumerate(function(*given)) if o.is_floating_point() or o.is_complex()
            ]
            kept.extend((i, o.dtype) for i, o in outputs)
            return tuple(o for _, o in outputs)

        pull: Any = torch.func.vjp(differentiable, *leaves)[1]
        found: tuple[Tensor, ...] = pull(tuple(cotangents[i].to(dtype) for i, dtype in kept))
        return found
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [leaf.view_as(leaf) if twice else leaf.detach() for leaf in leaves]
        leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
        pairs = [
            (o, g.to(o.dtype)) for o, g in zip(function(*leaves), cotangents, strict=True) if o.requires_grad
        ]
        if not pairs:
            return [None] * len(leaves)
        return torch.autograd.grad(
            [o for o, _ in pairs], leaves, [g for _, g in pairs], create_graph=twice, allow_unused=True
        )


def _pairs(values: Sequence[Any], needs: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield each value with whether it needs a gradient, those of lists one by one."""
    for value, need in zip(values, needs, strict=True):
        if isinstance(need, (list, tuple)):  # a list of tensors; of a list of numbers none is needed
            yield from zip(value, need, strict=True)
        else:
            yield value, bool(need)


def _replaced(value: Any, need: Any, leaves: Iterator[Any]) -> Any:
    """Return `value` with the next leaves in the place of what needs a gradient."""
    if isinstance(need, (list, tuple)):
        values = value if value is not None else [None] * len(need)
        return [next(leaves) if n else v for v, n in zip(values, need, strict=True)]
    return next(leaves) if need else value


@contextlib.contextmanager
def as_in_forward(op: str, values: Sequence[Any]) -> Iterator[None]:
    """Run a reference again as its kernel ran: without autocast (dispatch/run.py), and with no other numbers."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_RefuseRandom(op))
        for device in {t.device.type for t in tensors(values)}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def as_in_forward_within_a_kernel(op: str, values: Sequence[Any]) -> Iterator[None]:
    """Do the same inside of an autograd kernel, from where torch.func keeps what a level below sees."""
    if _torch.in_func_transform():
        if any(torch.is_autocast_enabled(t.device.type) for t in tensors(values)):
            raise GradientError(
                f"differentiating {op} in forward mode by its reference: torch.func runs the reference "
                "under the autocast that is on, and the op runs without it, so tangents would be inexact. "
                "Turn autocast off around the transform, or register a function with register_jvp.",
                op=op,
            )
        with _RefuseRandomCalls(op):
            yield
    else:
        with as_in_forward(op, values):
            yield


def _random_error(op: str, drawn: Any) -> GradientError:
    return GradientError(
        f"differentiating {op} by its reference: the reference draws random numbers ({drawn}), and it would draw "
        "others than in forward. Pass the numbers as an argument, or write the formula with register_autograd "
        "or register_jvp.",
        op=op,
    )


class _RefuseRandom(_torch.TorchDispatchMode):
    """Raise where the code inside draws random numbers."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _random_error(self.op, func)
        return func(*args, **(kwargs or {}))


class _RefuseRandomCalls(TorchFunctionMode):
    """Raise where the code inside calls a torch function that draws random numbers."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(torch.ops.aten, getattr(func, "__name__", ""), None)
        overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
        if any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads):
            raise _random_error(self.op, func)
        return func(*args, **(kwargs or {}))


class NoFormula:
    """What an op has before a gradient is registered: differentiating it raises."""

    non_differentiable: frozenset[str] = frozenset()
    tangents = None

    def __init__(self, schema: Schema) -> None:
        self.schema = schema

    def save(self, ctx: Any, values: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Nothing is kept."""

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


class _FromReference:
    """The formula `opkit.from_reference`: run the reference again in backward and differentiate it."""

    def __repr__(self) -> str:
        return "from_reference"


from_reference = _FromReference()
