"""The autograd kernel of an op, in Python: it runs the op below autograd and records how to differentiate it.

Used for every op, also for one without a formula, so that backward raises instead of stopping silently.
It never goes through `torch.library.register_autograd`, which refuses keyword-only tensors and mutation.

Under torch.func the kernel runs once for every level of the transforms, as torch's own C++ kernels do: each
level records its own derivative and calls the op again for the level below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit import _torch, _torch_compile, _torch_library
from opkit.dispatch.native.description import Derivation, FunctionValue, OpValue, RuleValue
from opkit.errors import GradientError
from opkit.spec.schema import Schema
from opkit.transforms import double_backward, forward_mode, mutation
from opkit.transforms.formula import Formula, OpFormula, save_values
from opkit.transforms.forward_mode import Tangents

EXTRA = "opkit_backend"  # the keyword argument that a variant has beside the op's own
_FIXED = 2  # leading arguments of Function.apply that are not the op's
_NOTHING = (None,) * _FIXED  # their gradients


def autograd_kernel(
    schema: Schema,
    overload: _torch_library.Overload,
    run: Callable[..., Any],
    formula: Callable[[], Formula],
    tangents: Callable[[], Tangents | None],
    *,
    variant: bool,
) -> Callable[..., Any]:
    """Return the kernel for the Autograd key of `overload`, which asks for the rules at every call.

    Args:
        schema: of the op.
        overload: what is differentiated.
        run: what `overload` does on real tensors, called without another trip through the dispatcher where
            nothing stands between autograd and the device.
        formula: gives the formula now registered.
        tangents: gives the rule for forward mode, if there is one.
        variant: whether the overload has one more keyword argument, which is passed on as it is.
    """
    types = [p.type for p in schema.params] + [r.type for r in schema.results]
    nested = any(t.base == "Tensor" and t.is_list for t in types)
    mutates = any(p.mutated for p in schema.params)
    # A mutating op has a kernel of its own on ADInplaceOrView, for the others the key means nothing.
    mask = _torch.after_autograd if mutates else _torch.after_inplace_or_view
    plain = [i for i, p in enumerate(schema.params) if p.type.base != "Tensor"]
    straight = _torch_library.Straight(overload.qualified)
    flat_call = _Call([None] * len(schema.params), [None] * len(schema.results))

    def below(keyset: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with _torch.below_autograd():
            if not mutates and straight(keyset):
                return run(*args, **kwargs)
            return overload().redispatch(keyset & mask, *args, **kwargs)

    def forward(ctx: Any, keyset: Any, call: _Call, *flat: Any) -> Any:
        values = tuple(_unflatten(flat, call.lengths)) if nested else flat
        given = tuple(list(v) if isinstance(v, list) else v for v in values) if nested else values
        args, kwargs = (
            schema.split(given) if schema.keyword_only else (given, {})
        )  # kernels may change their lists
        kwargs = {**kwargs, **call.extra} if call.extra else kwargs
        if call.modes is None:
            outputs = schema.flatten(below(keyset, args, kwargs))
        else:
            with _torch.differentiating(*call.modes):
                outputs = schema.flatten(below(keyset, args, kwargs))
        # As the formula knows its arguments. In backward it would be too late: threads may share the context.
        needs = ctx.needs_input_grad[_FIXED:]
        ctx.needs_input_grad = tuple(_unflatten(needs, call.lengths)) if nested else needs
        rule = formula()
        rule.save(ctx, values, outputs)
        constant = _without_gradient(schema, outputs, rule)
        metas = [(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else None for v in flat]
        lost = double_backward.lost_history(ctx, rule, values, outputs, constant)
        ctx.opkit_call = call, rule, metas, lost
        if nested:
            call.outputs = [len(o) if isinstance(o, (list, tuple)) else None for o in outputs]
        if constant:
            ctx.mark_non_differentiable(*(ctx.non_differentiable or ()), *constant)
        if call.dual:
            ctx.opkit_forward = values, outputs, ctx.non_differentiable or ()
        return tuple(_flatten(outputs, call.outputs)) if nested else outputs

    def backward(ctx: Any, *flat: Any) -> Any:
        call, rule, metas, lost = ctx.opkit_call
        grads = tuple(_unflatten(flat, call.outputs)) if nested else flat
        seen = (
            ctx if lost is None or not torch.is_grad_enabled() else double_backward.tracked(schema, ctx, lost)
        )
        found = rule.gradients(seen, grads)
        if any(found[index] is not None for index in plain):
            _refuse_plain(schema, found)
        if nested:
            found = _laid_flat(schema, found, call.lengths)
        for index, (grad, meta) in enumerate(zip(found, metas, strict=True)):
            if grad is not None and (
                type(grad) is not Tensor or (grad.shape, grad.dtype, grad.device) != meta
            ):
                _check_gradient(schema, index, call.lengths, grad, meta)
        return (*_NOTHING, *found)

    def jvp(ctx: Any, *flat: Any) -> Any:
        call, formula_rule, _, _ = ctx.opkit_call
        values, outputs, constant = ctx.opkit_forward
        del ctx.opkit_forward  # outputs that know the context, and are known to it
        rule = tangents()
        assert rule is not None  # `kernel` has asked
        with _torch.differentiating(torch.is_grad_enabled(), True):
            # Those that torch passes here are zeros also where there is none.
            given = tuple(map(forward_mode.tangent, values))
            primals = tuple(map(forward_mode.primal, values))
            found = rule.tangents(primals, outputs, given, formula_rule.save)
            found = [_completed(o, t, constant) for o, t in zip(outputs, found, strict=True)]
        found = _flatten(found, call.outputs) if nested else found
        return found[0] if len(found) == 1 else tuple(found)

    made: list[tuple[Formula, Callable[..., Any]]] = []

    def applier() -> Callable[..., Any]:
        """Return what records a call; made when first needed, as it costs as much as all else in defining an op."""
        rule = formula()
        if not made or made[0][0] is not rule:  # compiled autograd knows formulas by the class
            function: Any = type(
                schema.opname,  # torch adds Backward
                (_torch.LevelFunction,),
                {
                    "forward": staticmethod(forward),
                    "backward": staticmethod(backward),
                    "jvp": staticmethod(jvp),
                },
            )
            made[:] = [(rule, function.apply)]
        return made[0][1]

    def kernel(keyset: Any, /, *args: Any, **kwargs: Any) -> Any:
        dual = _torch.in_forward_mode() and forward_mode.has_tangents([*args, *kwargs.values()])
        if dual and (mutates or not schema.results or tangents() is None):
            forward_mode.refuse_tangents(schema, [*args, *kwargs.values()])
        transformed = _torch.in_func_transform()
        if transformed and mutates:
            mutation.refuse_unseen_mutation(schema)
        if not dual and not (torch.is_grad_enabled() and _torch.any_requires_grad(*args, **kwargs)):
            return below(keyset, args, kwargs)
        extra = {EXTRA: kwargs.pop(EXTRA)} if variant else {}
        values = schema.fill(args, kwargs)
        if mutates:
            mutation.refuse_lost_gradients(schema, values, formula())
        if not schema.results:
            args, kwargs = schema.split(values)
            return below(keyset, args, {**kwargs, **extra})
        call = flat_call
        if nested or extra or dual or transformed:
            call = _Call(_lengths(schema, values), [None] * len(schema.results), extra)
            call.dual = dual
        flat = _flatten(values, call.lengths) if nested else values
        if transformed:
            call.modes = _torch.differentiation_modes()
            with _torch.at_one_level():
                outputs = applier()(keyset, call, *flat)
        else:
            outputs = applier()(keyset, call, *flat)
        return schema.raw(_unflatten(outputs, call.outputs) if nested else outputs)

    return kernel


def derivation(schema: Schema, kernel: Callable[..., Any], formula: Callable[[], Formula]) -> Derivation:
    """Return what the native core asks where it differentiates an op whose autograd kernel in Python is `kernel`."""

    def twin(keys: int, *values: Any) -> Any:
        args, kwargs = schema.split(values)
        return kernel(_torch.keyset(keys), *args, **kwargs)

    def lost(ctx: Any, values: Any, outputs: Any, constant: Any) -> Any:
        return double_backward.lost_history(ctx, formula(), values, outputs, constant)

    def again(rule: OpFormula, grads: Any, values: Any, needs: Any) -> Any:
        ctx = forward_mode.Context()
        ctx.needs_input_grad = needs
        save_values(ctx, values)
        without = {place for side, place in rule.saves if side == "out" and place not in rule.outputs}
        saved = double_backward.lost_outputs(rule.saves, values, without)
        return rule.gradients(double_backward.tracked(schema, ctx, saved), grads)

    def check(index: int, lengths: Any, grad: Any, shape: Any, like: Tensor) -> None:
        _check_gradient(schema, index, lengths, grad, (torch.Size(shape), like.dtype, like.device))

    def described() -> OpValue | FunctionValue | RuleValue:
        rule = formula()
        return rule.described()._replace(settled=mutation.is_settled(schema, rule))

    def flatten(found: Any, lengths: Any) -> list[Any]:
        _refuse_plain(schema, found)
        flat = _laid_flat(schema, found, lengths)
        for index, grad in enumerate(flat):
            if grad is not None and not isinstance(grad, Tensor):
                _check_gradient(schema, index, lengths, grad, None)
        return flat

    return Derivation(
        f"{schema.opname}Backward",
        twin,
        described,
        lost,
        functools.partial(double_backward.tracked, schema),
        again,
        _torch_compile.outside_compiled_autograd,
        check,
        flatten,
    )


def _refuse_plain(schema: Schema, found: Sequence[Any]) -> None:
    """Raise for a gradient of what is no tensor."""
    for param, grad in zip(schema.params, found, strict=True):
        if grad is not None and param.type.base != "Tensor":
            raise _gradient_error(schema, param.name, _kind(grad), "None, as it is not a tensor")


class _Call:
    """What one call has of its own: how its nested arguments and outputs were laid flat, and how it is derived."""

    __slots__ = ("dual", "extra", "lengths", "modes", "outputs")

    def __init__(
        self, lengths: list[int | None], outputs: list[int | None], extra: dict[str, Any] | None = None
    ) -> None:
        self.lengths = lengths
        self.outputs = outputs
        self.extra = extra or {}
        self.dual = False
        """Whether an argument has a tangent."""
        self.modes: tuple[bool, bool] | None = None
        """What is on of reverse and forward mode, where outer levels of torch.func must see it."""


def _lengths(schema: Schema, values: Sequence[Any]) -> list[int | None]:
    return [
        len(v) if p.type.base == "Tensor" and p.type.is_list and v is not None else None
        for p, v in zip(schema.params, values, strict=True)
    ]


def _without_gradient(schema: Schema, outputs: Sequence[Any], rule: Formula) -> list[Tensor]:
    found = []
    for result, output in zip(schema.results, outputs, strict=True):
        for one in output if isinstance(output, (list, tuple)) else (output,):
            if not isinstance(one, Tensor):
                continue
            if result.name in rule.non_differentiable or not (one.is_floating_point() or one.is_complex()):
                found.append(one)
    return found


def _completed(output: Any, tangent: Any, constant: Sequence[Any]) -> Any:
    """Return the tangent of an output as torch demands it: zeros for None, and None where there is no derivative."""
    if isinstance(output, (list, tuple)):
        tangents = tangent if tangent is not None else [None] * len(output)
        return [_completed(o, t, constant) for o, t in zip(output, tangents, strict=True)]
    if not isinstance(output, Tensor) or any(output is c for c in constant):
        return None
    return torch.zeros_like(output) if tangent is None else tangent


def _laid_flat(schema: Schema, found: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """Return the gradients of nested arguments one after the other, as autograd wants them."""
    grads: list[Any] = []
    for param, grad, length in zip(schema.params, found, lengths, strict=True):
        if length is None:
            grads.append(grad)
        elif grad is None:
            grads += [None] * length
        elif not isinstance(grad, (list, tuple)):
            raise _gradient_error(
                schema, param.name, _kind(grad), f"a list of {length}, one per tensor, or None"
            )
        elif len(grad) != length:
            raise GradientError(
                f"differentiating {schema.name}: the formula returned {len(grad)} gradients for the list "
                f"{param.name}; expected {length}, one per tensor. Return a list of that length, or None.",
                op=schema.name,
            )
        else:
            grads += grad
    return grads


def _check_gradient(schema: Schema, index: int, lengths: Sequence[int | None], grad: Any, meta: Any) -> None:
    """Raise for a gradient that cannot be that of its argument; torch would name it by a number.

    What torch takes is taken: another floating dtype, and more dimensions than the argument has, which are summed up.

    Args:
        schema: of the op.
        index: of the argument, laid flat.
        lengths: of the lists among the arguments.
        grad: what the formula returned for it.
        meta: its shape, dtype and device; None for what is not a tensor.
    """
    if isinstance(grad, Tensor) and (type(grad) is not Tensor or meta is None):
        return  # of a subclass, also while tracing: that has rules of its own; or of an absent optional
    if not isinstance(grad, Tensor):
        raise _gradient_error(schema, _name(schema, index, lengths), _kind(grad), "a Tensor or None")
    shape, dtype, device = meta
    if grad.shape != shape and not _sums_to(grad.shape, shape):
        found, expected = f"one of shape {tuple(grad.shape)}", f"{tuple(shape)}, that of the argument"
    elif grad.is_complex() and not dtype.is_complex:
        found, expected = f"one of dtype {grad.dtype}", f"a real one, as the argument is {dtype}"
    elif grad.device != device and grad.dim():
        found, expected = f"one on {grad.device}", f"{device}, where the argument is"
    else:
        return
    raise _gradient_error(schema, _name(schema, index, lengths), found, expected)


def _sums_to(found: Sequence[int], wanted: Sequence[int]) -> bool:
    pairs = zip(reversed(found), reversed(wanted), strict=False)
    return len(found) >= len(wanted) and all(w in (1, f) for f, w in pairs)


def _name(schema: Schema, index: int, lengths: Sequence[int | None]) -> str:
    """Return the name of the flat argument `index`: `x`, or `xs[1]`."""
    names = []
    for param, length in zip(schema.params, lengths, strict=True):
        names += [param.name] if length is None else [f"{param.name}[{i}]" for i in range(length)]
    return names[index]


def _kind(value: Any) -> str:
    return (
        f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float)) else type(value).__name__
    )


def _gradient_error(schema: Schema, name: str, found: str, expected: str) -> GradientError:
    return GradientError(
        f"differentiating {schema.name}: the formula returned {found} as the gradient of {name}; expected "
        f"{expected}. Correct the formula given to register_autograd.",
        op=schema.name,
    )


def _flatten(values: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    flat: list[Any] = []
    for value, length in zip(values, lengths, strict=True):
        if length is None:
            flat.append(value)
        else:
            flat += value if value is not None else [None] * length
    return flat


def _unflatten(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    items = iter(flat)
    return [next(items) if n is None else [next(items) for _ in range(n)] for n in lengths]
