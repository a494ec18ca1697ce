"""Calls of an op that its kernels are checked with: derived from its shape line, in several layouts, kept in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import opkit
from opkit._op import Op
from opkit.errors import ArgumentError
from opkit.testing import results
from opkit.testing.arguments import cast, copied, mapped
from opkit.testing.calls import UnmadeError, arguments, plan_of, sized
from opkit.testing.layouts import LAYOUTS, laid

Case = tuple[Sequence[Any], Mapping[str, Any]]

LARGE = (1 << 20) + 3  # about how many elements the largest argument has
SIZES = {"one": 1, "small": 5, "empty": 0, "large": LARGE}


class Call(NamedTuple):
    """Arguments in schema order, as torch carries them."""

    op: str
    backend: str
    values: tuple[Any, ...]
    slack: float = 0.0


def derived(op: Op[..., Any], n: int) -> Case:
    """Return the arguments of a call whose dimensions are of about size `n`.

    No two names have the same size, but where they are 0 or 1. Where `n` is 0 it is the batch that is empty, if there
    is one; where it is large, dimensions share it so that no argument has more elements.

    Raises:
        ArgumentError: the op has no shape line, or one that does not say enough.
    """
    try:
        plan = plan_of(op)
        degree = max((len(t.entry.dims) for t in plan.inputs), default=1) or 1
        size = n if n < 100 else max(int(n ** (1 / degree)), 2)
        batch = () if n == 1 else (2,) if 1 < n < 100 else (size,)
        if n == 0 and any(t.entry.star is not None for t in plan.inputs):
            size = 4
        made = arguments(op, sized(op, size, batch, {}))
    except UnmadeError as error:
        raise ArgumentError(
            f"making arguments for {op.name}: {error.lack}; expected a shape line over floating tensors. Return some "
            f"from the method `case(self, op, n)` of your suite, as (args, kwargs), for {op.name}.",
            op=op.name,
        ) from None
    return op.schema.split(op.schema.restore(made))


def values(op: Op[..., Any], case: Case, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Return the arguments in schema order, in a dtype where they can be, on a device."""
    args, kwargs = case
    given = op.schema.fill(*op.schema.carry(args, kwargs))
    if not (dtype.is_floating_point or dtype.is_complex):  # of standard normal numbers most would be 0
        given = mapped(op, given, lambda _, t: t * 10 if t.is_floating_point() else t)
    return mapped(op, cast(op, given, dtype), lambda _, t: t.to(device))


def layouts(op: Op[..., Any], given: Sequence[Any]) -> Iterable[tuple[str, tuple[Any, ...]]]:
    """Yield the same arguments contiguous, transposed in memory, as every second element, and with strides of 0."""
    for name in LAYOUTS:
        if name != "misaligned":  # libraries that exchange tensors by DLPack may ask for alignment
            yield name, laid(op, given, name)


def save(calls: Iterable[Call], path: Path) -> None:
    """Write calls into a file, for other processes."""
    torch.save([tuple(call) for call in calls], path)


def load(path: str) -> list[Call]:
    """Return the calls that a file has."""
    return [Call(*one) for one in torch.load(path, weights_only=True)]


def selected(call: Call) -> str:
    """Return the backend that a call is given to where its own is preferred."""
    op = opkit.get(call.op)
    args, kwargs = op.schema.split(op.schema.restore(call.values))
    with opkit.use_backend(call.backend):
        return op.explain(*args, **kwargs).selected or ""


def wrong(call: Call) -> list[str]:
    """Return how the results of a call, made where its backend is preferred, differ from the reference's."""
    op = opkit.get(call.op)
    with opkit.use_backend(call.backend), torch.no_grad():
        given = mapped(op, call.values, lambda _, t: copied(t))
        records = results.kernels(op, given, only=selected(call), slack=call.slack)
    return [f"{call.op}: {record}" for record in records if record.status == "failed"]
