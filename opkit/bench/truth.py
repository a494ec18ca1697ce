"""What results and gradients must be: those of the reference in float64, to the tolerance of `opkit.testing.check`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.bench.candidates import Candidate, floating
from opkit.bench.sweep import Call
from opkit.testing.arguments import copied, mapped, named, widened
from opkit.testing.difference import difference, largest, tolerance
from opkit.testing.results import reference_results

Tensors = dict[str, Tensor]


class Truth:
    """What one call must give.

    `missing` says why nothing can be compared, if so.
    """

    def __init__(self, op: Op[..., Any], call: Call, leaves: frozenset[str]) -> None:
        self.op = op
        self.values = call.values
        self.given = call.given
        self.leaves = leaves
        carried = op.schema.fill(*op.schema.carry(*op.schema.split(call.values)))
        self._results, self._off, missing = reference_results(op, carried)
        self.missing = missing or ""
        self._part = tolerance(named([p.name for p in op.schema.params], call.values).values())
        self._reference = Candidate("reference", op, op.reference)
        self._into: Sequence[str] = ()
        self._right: tuple[Tensors, ...] = ({}, {})

    def wrong_result(self, found: Mapping[str, Any]) -> str:
        """Return how results differ from what they must be, or nothing."""
        if self.missing:
            return ""
        for name, value in found.items():
            wrong = difference(value, self._results.get(name), self._part, self._off.get(name, 0.0))
            if wrong:
                return f"{name} is {wrong.found}; expected {wrong.expected}"
        return ""

    def wrong_gradient(self, found: Mapping[str, Tensor], into: Sequence[str]) -> str:
        """Return how the gradients of the results `into` differ from what they must be, or nothing.

        Raises:
            Exception: what the reference raises where it cannot be differentiated.
        """
        if self.missing:
            return ""
        if into != self._into:
            self._into = into
            self._right = tuple(self.gradients(self._reference, into, form) for form in (widened, copied))
        right, rounded = self._right
        for name in found:
            slack = 0.0 if found[name].dtype == torch.float64 else 2 * largest(rounded.get(name), right[name])
            wrong = difference(found[name], right[name], self._part, slack)
            if wrong:
                return f"the gradient of {name} is {wrong.found}; expected {wrong.expected}"
        return ""

    def gradients(
        self, candidate: Candidate, into: Sequence[str], form: Callable[[Tensor], Tensor] = copied
    ) -> Tensors:
        """Return the gradients of the leaves by name, zeros where there is none, through the results `into`."""
        leaves, given = leaves_of(self.op, self.values, self.leaves, form)
        with torch.enable_grad():
            outs = floating(candidate.call(given, self.given))
        found = [outs[name] for name in into]
        grads = torch.autograd.grad(
            found, list(leaves.values()), cotangents(into, found), allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, grads, strict=True))


def leaves_of(
    op: Op[..., Any],
    values: Sequence[Any],
    wanted: Iterable[str],
    form: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensors, tuple[Any, ...]]:
    """Return leaves by name, and the arguments with them in their places.

    Each tensor is in the `form` given; without one it is as it is, or a copy where the op overwrites it.
    """
    leaves: Tensors = {}
    wanted = frozenset(wanted)
    mutated = {p.name for p in op.schema.params if p.mutated}

    def made(name: str, tensor: Tensor) -> Tensor:
        if form is not None:
            own = form(tensor)
        else:
            own = copied(tensor) if name.split("[")[0] in mutated else tensor.detach()
        if name in wanted:
            leaves[name] = own.requires_grad_()
        return own

    return leaves, mapped(op, values, made)


def cotangents(names: Sequence[str], results: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of results: the same numbers for all candidates, whatever their dtype."""
    found = []
    for name, result in zip(names, results, strict=True):
        numbers = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        wide = torch.complex128 if result.is_complex() else torch.float64
        made = torch.randn(result.shape, generator=numbers, dtype=wide)
        found.append(made.to(result.device, result.dtype))
    return found
