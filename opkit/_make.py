"""`@op`, which makes an op of a function, and what every other way to make one shares with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch

from opkit import _registry
from opkit._op import Op
from opkit.errors import SchemaError
from opkit.spec import plan as plans
from opkit.spec import signature, text
from opkit.spec.schema import Schema, check_name, describe
from opkit.transforms.effects import check_effects
from opkit.transforms.flops import counting
from opkit.transforms.inline import check_inline
from opkit.transforms.layout import Layout

P = ParamSpec("P")
R = TypeVar("R")


def op(
    name: str,
    *,
    shapes: str | None = None,
    mutates_args: Sequence[str] = (),
    schema: str | None = None,
    inline: bool = False,
    tags: Sequence[torch.Tag] = (),
    layout: str | torch.memory_format | None = None,
    flops: Callable[..., Any] | None = None,
    effects: bool = False,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make the decorated function an op.

    The function becomes the op's reference: it says what the op computes, is the oracle in tests, and
    runs where no kernel can. The op keeps its signature, defaults and docstring.

    Args:
        name: `namespace::name`.
        shapes: the shape line, one entry per Tensor argument and per Tensor result. The meta function is
            derived from it, calls are checked against it, and native kernels get their outputs by it.
            Outputs are contiguous, with the first tensor's dtype and device unless a suffix says otherwise.
            The entry of a list of tensors stands in brackets, as in `[*s] -> [*s]`: an output list is as long as the
            input list that it names. Without a line, annotations such as jaxtyping's `Float[Tensor, "*b n"]` say it.
        mutates_args: names of Tensor arguments that the op writes into.
        schema: the op's schema as torch writes it, `(Tensor x, int[] k) -> Tensor`, in the place of annotations;
            its arguments are the function's.
        inline: let Inductor fuse through the reference, in the place of a kernel; `opkit.inline` does so, or the
            opposite, for some calls. Eager calls run kernels, and gradients follow the registered formula.
        tags: torch tags to define the op with, beside `pt2_compliant_tag`. An op that draws random numbers has
            `torch.Tag.nondeterministic_seeded`.
        layout: what its kernels want their tensors to be like.

            - `"exact"`: in compiled code the strides that they have in eager; torch's default.
            - `"order"`: in compiled code the order of strides that they have in eager.
            - `"contiguous"`: contiguous, in eager too: other arguments are copied first.
            - `"flexible"`: anything goes, Inductor may choose.
            - `torch.channels_last`, `torch.channels_last_3d`: arguments of rank 4 (5) and what the shape line says
              of results of that rank are in this format, others contiguous; in eager too.
        flops: how many floating-point operations a call takes, for `torch.utils.flop_counter.FlopCounterMode`: a
            function of the op's arguments with `torch.Size` in the place of tensors, and of `out_shape`, those of
            the results, if it has such a parameter.
        effects: whether a call does something beside what it returns, such as printing. Compiled and exported
            programs then keep every call, in order.

    Raises:
        RegistrationError: an op with `inline=True` or `effects=True` mutates arguments.
        SchemaError: the name has no namespace, or an annotation is not one that an op can have.
        ShapeError: the shape line does not fit the signature.
        DuplicateOpError: another function has defined this name.

    Example:
        >>> import opkit, torch
        >>> from torch import Tensor
        >>> @opkit.op("doc::scale", shapes="*b n, n -> *b n")
        ... def scale(x: Tensor, factor: Tensor, power: int = 1) -> Tensor:
        ...     return x * factor**power
        >>> print(scale.schema)
        doc::scale(Tensor x, Tensor factor, SymInt power=1) -> (Tensor)
        >>> scale(torch.ones(2, 3), torch.full((3,), 2.0), power=3)
        tensor([[8., 8., 8.],
                [8., 8., 8.]])
    """
    if callable(name):
        raise SchemaError(
            f"declaring an op from {describe(name)}: @opkit.op was used without a name; expected "
            f'namespace::name. Write @opkit.op("mylib::{getattr(name, "__name__", "my_op")}").'
        )
    check_name(name)
    return declaring(
        name,
        sys._getframe(1).f_locals,
        shapes=shapes,
        schema=schema,
        mutates_args=mutates_args,
        inline=inline,
        tags=tags,
        layout=layout,
        flops=flops,
        effects=effects,
    )


def declaring(
    name: str,
    scope: Mapping[str, Any],
    *,
    shapes: str | None,
    mutates_args: Sequence[str],
    schema: str | None = None,
    inline: bool = False,
    tags: Sequence[torch.Tag],
    **options: Any,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Return the decorator that `op` is, for a caller whose local names are `scope`; `options` go to `Op`."""

    def decorate(function: Callable[P, R]) -> Op[P, R]:
        mutated = [mutates_args] if isinstance(mutates_args, str) else list(mutates_args)
        if schema is None:
            read = signature.from_function(name, function, mutates=mutated, scope=scope)
        else:
            read = text.for_function(name, schema, function, mutated, scope)
        return make(read, function, shapes=shapes, tags=tags, inline=inline, **options)

    return decorate


def make(
    schema: Schema,
    reference: Callable[P, R],
    *,
    shapes: str | None = None,
    kind: type[Op[..., Any]] | None = None,
    **options: Any,
) -> Op[P, R]:
    """Return a new op, entered into the registry in the place of the one that it redefines; `options` go to `Op`."""
    plan = plans.declared(schema, shapes)
    _check_options(schema, **options)  # while the op that it may redefine is there still
    # A redefinition makes the same object anew, so that whoever holds the op has the new one.
    made: Any = _registry.make_room(schema.name, reference)
    kind = kind or Op
    if type(made) is not kind:
        made = kind.__new__(kind)
    made.__dict__.clear()
    made.__init__(schema, reference, plan=plan, **options)
    _registry.add(made)
    return cast("Op[P, R]", made)


def _check_options(
    schema: Schema,
    *,
    tags: Sequence[torch.Tag] = (),
    inline: bool = False,
    layout: str | torch.memory_format | None = None,
    flops: Callable[..., Any] | None = None,
    effects: bool = False,
    **_others: Any,
) -> None:
    """Raise for options that do not fit the op."""
    if inline:
        check_inline(schema)
    if effects:
        check_effects(schema)
    if flops is not None:
        counting(schema, flops)
    Layout.of(layout, schema.name, tags)
