"""The calls that are measured where nobody names a case: those that the op's declaration makes, small to large.

A leading `*b` grows and the other dimensions stay as they are; where there is none, all dimensions grow together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from opkit._op import Op
from opkit.errors import ArgumentError
from opkit.testing import samples
from opkit.testing.calls import UnmadeError

ELEMENTS = (1 << 12, 1 << 16, 1 << 20, 1 << 22)  # of the largest tensor: from the first cache to memory
_SIDES = (1, 1024, 64, 16, 8)  # of each named dimension, by how many an entry has
_ALL = "size"  # stands for all named dimensions


def case_of(
    op: Op[..., Any], over: Mapping[str, Sequence[Any]] | None, device: str | None
) -> tuple[Callable[..., Any], Mapping[str, Sequence[Any]]]:
    """Return a case for an op and the sizes to measure: those given, or some.

    Raises:
        ArgumentError: neither the declaration nor `register_samples` says enough to make a call.
    """
    try:
        registered = samples.registered(op, device or "cpu")
        if registered is not None:
            listed = [(one.args, one.kwargs) for one in registered]
            return lambda sample: listed[sample], over or {"sample": range(len(listed))}
        made = _Case(op)
        made(dtype=torch.float32, device=device or "cpu")
    except UnmadeError as error:
        names = ", ".join(p.name for p in op.schema.positional)
        raise ArgumentError(
            f"benchmarking {op.name}: found no case, and {error.lack}, so that its declaration makes no call; expected "
            f"a function of sizes that returns (args, kwargs). Write: def case(n): return ({names},), {{}}",
            op=op.name,
        ) from None
    return made, over or made.sizes()


class _Case:
    """A case whose arguments are the names in the shape line, and `size` for all that stand for one dimension."""

    def __init__(self, op: Op[..., Any]) -> None:
        self._op = op
        self._names, self._ints, self._stars = samples.dimensions(op)
        entries = [] if op._meta.plan is None else [t.entry for t in op._meta.plan.inputs]
        counts = [sum(d.is_name for d in entry.dims) for entry in entries]
        self._degree = max(counts, default=0)
        self._side = _SIDES[min(self._degree, len(_SIDES) - 1)]
        # How many elements one index of the first star stands for.
        own = [
            n for n, e in zip(counts, entries, strict=True) if any(d.text in self._stars[:1] for d in e.dims)
        ]
        self._beside = self._side ** max(own, default=0)
        kind = inspect.Parameter.KEYWORD_ONLY
        takes = [*self._names, *self._ints, *self._stars, *self._every(), "dtype", "device"]
        self.__signature__ = inspect.Signature([inspect.Parameter(n, kind, default=None) for n in takes])

    def _every(self) -> list[str]:
        return [_ALL] if len(self._names) > 1 and _ALL not in self._names else []

    def sizes(self) -> dict[str, list[int]]:
        """Return the sizes that are measured where nobody names any."""
        if self._stars:
            return {self._stars[0]: list(dict.fromkeys(max(n // self._beside, 1) for n in ELEMENTS))}
        if not self._names:
            return {}
        # The work may grow faster than the tensors, so the largest ones are left out.
        sides = [round(n ** (1 / self._degree)) for n in ELEMENTS[:-1]]
        return {(self._every() or self._names)[0]: sides}

    def __call__(
        self, *, dtype: torch.dtype | None = None, device: str | None = None, **given: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        every = given.pop(_ALL, self._side) if self._every() else self._side
        sizes: dict[str, Any] = dict.fromkeys(self._names, every)
        sizes.update(dict.fromkeys(self._stars, max(ELEMENTS[1] // self._beside, 1)))
        sizes.update(given)
        made = samples.sample(self._op, sizes, dtype=dtype or torch.float32, device=device or "cpu")
        return made.args, made.kwargs
