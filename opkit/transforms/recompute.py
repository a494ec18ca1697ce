"""`from_reference`: an op's gradient by running its reference again, in backward, and differentiating that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from opkit import _torch
from opkit.dispatch.native.description import RuleValue
from opkit.errors import GradientError, RegistrationError
from opkit.spec.schema import Schema, tensors
from opkit.transforms.formula import constant_results, save_values, saved_values
from opkit.transforms.forward_mode import ReferenceTangents


class _FromReference:
    """The formula `opkit.from_reference`: run the reference again in backward and differentiate it.

    Gradients are those of the op's arguments. A tensor with `requires_grad` that the reference has from elsewhere
    would go without its own: backward raises. A call whose arguments need no gradient records nothing, and does not.
    """

    def __repr__(self) -> str:
        return "from_reference"


from_reference = _FromReference()


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

    def described(self) -> RuleValue:
        return RuleValue(constant_results(self.schema, self.non_differentiable), self.save, self.gradients)

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
            found = iter(_derived(self.schema.name, again, wanted, cotangents, tensors(saved)))
        return [_replaced(None, need, found) for need in needs]


def _derived(
    op: str,
    function: Callable[..., list[Any]],
    leaves: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    arguments: Sequence[Tensor],
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
        outputs = function(*leaves)
        _refuse_others(op, outputs, [*leaves, *arguments])
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not pairs:
            return [None] * len(leaves)
        return torch.autograd.grad(
            [o for o, _ in pairs], leaves, [g for _, g in pairs], create_graph=twice, allow_unused=True
        )


def _refuse_others(op: str, outputs: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Raise where outputs are functions of tensors with gradients that are not known, which would be lost."""
    own = {id(one) for one in known}
    seen = {one.grad_fn for one in known}
    others = [o for o in outputs if o.requires_grad and o.grad_fn is None and id(o) not in own]
    waiting = [o.grad_fn for o in outputs]
    while waiting and not others:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = [function for function, _ in node.next_functions]
        waiting += before
        leaf = None if before else getattr(node, "variable", None)
        others = [leaf] if leaf is not None and id(leaf) not in own else []
    if others:
        raise GradientError(
            f"differentiating {op} by its reference: the reference reads a tensor of shape {tuple(others[0].shape)} "
            "that requires grad and is no argument of the op, so its gradient would be lost; expected a function of "
            "its arguments. Make the tensor an argument, or detach it where the reference reads it.",
            op=op,
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
