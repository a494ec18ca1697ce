"""What competes: each backend of the op, and functions that a user names beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.bench.sweep import Given
from opkit.dispatch.preference import use_backend
from opkit.errors import ArgumentError, did_you_mean
from opkit.testing.arguments import named

COPY = "copy"
"""The name in reports of the copy that is the limit."""


@dataclass(frozen=True)
class Candidate:
    """A function of the op's arguments. `backend` is None for one that a user names."""

    name: str
    op: Op[..., Any]
    function: Callable[..., Any]
    backend: str | None = None

    @property
    def kind(self) -> str:
        """`backend` or `peer`, as reports say it."""
        return "peer" if self.backend is None else "backend"

    def inside(self) -> AbstractContextManager[object]:
        """Return the context in which its calls run, and their gradients."""
        return contextlib.nullcontext() if self.backend is None else use_backend(self.backend)

    def results(self, returned: Any) -> dict[str, Any]:
        """Return results by the names of the op's, those of a list one by one; a peer may return only the first ones.

        Raises:
            TypeError: it returned something else.
        """
        names = [r.name for r in self.op.schema.results]
        values = self.op.schema.flatten(returned)
        if len(values) > len(names):
            raise TypeError(f"it returned {len(values)} values, and the op {len(names)}")
        return named(names[: len(values)], values)

    def call(self, values: Sequence[Any], given: Given) -> dict[str, Any]:
        """Call it with the values that the case gave, all are in schema order; return results and what it overwrote."""
        args, kwargs = given.split(self.op, values)
        found = self.results(self.function(*args, **kwargs))
        for param, value in zip(self.op.schema.params, values, strict=True):
            if param.mutated:
                found.update(named([f"argument {param.name}"], [value]))
        return found


def all_of(
    op: Op[..., Any],
    backends: Sequence[str] | None,
    against: Mapping[str, Callable[..., Any]] | None,
    *,
    compiled: bool,
) -> list[Candidate]:
    """Return the backends of an op, or those that are named, and the peers.

    Raises:
        ArgumentError: the op has no such backend, or a peer is no function or has a name that is taken.
    """
    known = list(dict.fromkeys(kernel.backend for kernel in op.kernels))
    if op._table.declared:
        known = [name for name in known if name != "reference"]
    names = known if backends is None else [backends] if isinstance(backends, str) else list(backends)
    for name in names:
        if name not in known:
            raise ArgumentError(
                f"benchmarking {op.name}: backends= names {name!r}; expected some of {', '.join(known) or 'none'}."
                f"{did_you_mean(name, known)} Name one of these, or register a kernel with that backend.",
                op=op.name,
            )
    found = {name: Candidate(name, op, op, name) for name in names}
    for name, function in _peers(op, against, compiled=compiled).items():
        if not callable(function):
            raise ArgumentError(
                f"benchmarking {op.name}: against= has {name!r}: {function!r}, which is no function; expected "
                f"functions of the op's arguments. Write against={{{name!r}: function}}.",
                op=op.name,
            )
        if name in found or name == COPY:
            raise ArgumentError(
                f"benchmarking {op.name}: against= has the name {name!r}, which is that of "
                f"{'the limit' if name == COPY else 'a backend'}; expected another. Rename it.",
                op=op.name,
            )
        found[name] = Candidate(name, op, function)
    return list(found.values())


def _peers(op: Op[..., Any], against: Any, *, compiled: bool) -> dict[str, Any]:
    if against is not None and not isinstance(against, Mapping):
        raise ArgumentError(
            f"benchmarking {op.name}: against= is of type {type(against).__name__}; expected functions by name. Write "
            'against={"eager": function}.',
            op=op.name,
        )
    found = {str(name): function for name, function in (against or {}).items()}
    if compiled:
        if op._table.declared:
            raise ArgumentError(
                f"benchmarking {op.name}: compiled=True is torch.compile of the reference; found an op that is "
                "declared without one. Name a function of yours: against={'compiled': torch.compile(function)}.",
                op=op.name,
            )
        found.setdefault("compiled", torch.compile(op.reference, dynamic=False))
    return found


def floating(results: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return results through which gradients flow."""
    return {n: r for n, r in results.items() if isinstance(r, Tensor) and r.requires_grad}
