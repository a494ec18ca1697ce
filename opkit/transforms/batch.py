"""The dimensions `*b` of a shape line: where they stand, and whether the op keeps their indices apart.

A shape line says of shapes that they are alike along `*b`. That the op works on each index by itself is what torch.vmap
and DTensor make of it, and `x / x.sum()` has the same line as `x.abs()`: so it is put to the test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opkit import _torch
from opkit.spec.plan import Plan
from opkit.spec.schema import Schema, tensors
from opkit.spec.shapes import Entry

Dims = Sequence[Any]  # for each argument None, the batched dimension, or a list of these for a list
_AXES = ("dim", "dims", "axis", "axes")  # numbers of dimensions, which a dimension in front would shift
_TOLERANCE = {torch.float64: 1e-6, torch.complex128: 1e-6, torch.float16: 5e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Stars:
    """Where in the shape line `*name` stands, for each Tensor argument and result that has one."""

    inputs: Mapping[str, tuple[str, int]]
    outputs: Sequence[tuple[str, int]]

    @classmethod
    def of(cls, schema: Schema, plan: Plan | None) -> Stars | None:
        """Return them, or None where the line does not promise that the op works on each index apart."""
        if plan is None or any(p.name in _AXES and p.type.base == "SymInt" for p in schema.params):
            return None
        if len(plan.outputs) != len(schema.results) or any(
            d.is_open for t in plan.outputs for d in t.entry.dims
        ):
            return None
        outputs = [_star(t.entry) for t in plan.outputs]
        if len({found[0] if found else None for found in outputs} | {None}) > 2 or None in outputs:
            return None
        inputs = {t.name: found for t in plan.inputs if (found := _star(t.entry))}
        return cls(inputs, [found for found in outputs if found])

    def place(self, batched: Sequence[str]) -> str | None:
        """Return the one star that all batched arguments and all results have, or None."""
        names = {self.inputs[name][0] if name in self.inputs else None for name in batched}
        names |= {star for star, _ in self.outputs}
        return names.pop() if len(names) == 1 else None


def _star(entry: Any) -> tuple[str, int] | None:
    found = entry.star
    return None if found is None or entry.dims[found].is_any else (entry.dims[found].text, found)


class Trial:
    """The first sample of a batch, taken before the op is called, as the op may write into it."""

    def __init__(self, schema: Schema, values: Sequence[Any], dims: Dims) -> None:
        self.schema = schema
        self.dims = dims
        with torch.no_grad():
            # Samples that are all alike tell nothing: of zeros, x and x + x.sum() are the same.
            self.telling = any(map(_varies, values, dims))
            each = zip(values, dims, schema.params, strict=True)
            self._alone = [_clone(sample(v, d, 0)) if p.mutated else sample(v, d, 0) for v, d, p in each]

    def difference(
        self, call: Callable[..., Any], values: Sequence[Any], outputs: Sequence[Any], out_dims: Dims
    ) -> tuple[str, float] | None:
        """Return a result or argument that is otherwise than when the op is called on the sample alone, and how far."""
        schema = self.schema
        with torch.no_grad():
            expected = call(self._alone)
            results = zip(schema.results, outputs, out_dims, expected, strict=True)
            pairs = [(r.name, sample(o, d, 0), e) for r, o, d, e in results]
            written = zip(schema.params, values, self.dims, self._alone, strict=True)
            pairs += [(p.name, sample(v, d, 0), a) for p, v, d, a in written if p.mutated]
            for name, found, wanted in pairs:
                for one, other in zip(tensors([found]), tensors([wanted]), strict=True):
                    apart = _apart(one, other)
                    if apart:
                        return name, apart
        return None


def differs(
    schema: Schema,
    plan: Plan,
    stars: Stars,
    star: str,
    values: Sequence[Any],
    call: Callable[[Sequence[Any]], Sequence[Any]],
    like: Callable[[Any], tuple[Sequence[Any], torch.dtype, Any]],
) -> tuple[bool, tuple[str, float] | None]:
    """Put `*star` to the test on small tensors made up for it, where the real ones have no data to look at.

    `like` gives shape, dtype and device of what stands for a tensor in `values`. Returns whether there was a test, and
    what it found: there is none where shapes are symbolic, where an argument is of integers, which a native kernel may
    take for places without a look, or where the op does not take what was made up.
    """
    entries = {t.name: t.entry for t in plan.inputs}
    places = [stars.inputs.get(p.name, ("", 0)) for p in schema.params]
    dims = [at if name == star else None for name, at in places]
    with _torch.outside_modes(), torch.no_grad():
        try:
            each = zip(schema.params, values, strict=True)
            numbers = torch.Generator().manual_seed(0)
            made = [
                _made_up(v, entries[p.name], star, like, numbers)
                if p.name in entries and v is not None
                else v
                for p, v in each
            ]
            trial = Trial(schema, made, dims)
            outputs = call(made)
            return True, trial.difference(call, made, outputs, [at for _, at in stars.outputs])
        except Exception:
            return False, None


def _made_up(
    value: Any, entry: Entry, star: str, like: Callable[[Any], Any], numbers: torch.Generator
) -> Any:
    """Return a small tensor like `value`, or those of a list, with two indices along `*star`."""
    if isinstance(value, (list, tuple)):
        return [_made_up(one, entry, star, like, numbers) for one in value]
    shape, dtype, device = like(value)
    shape, at = list(shape), entry.star
    if not all(type(size) is int for size in shape):
        raise NotImplementedError("symbolic sizes")
    if not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool):
        raise NotImplementedError("places")
    if at is not None:
        end = len(shape) - (len(entry.dims) - at - 1)
        few = (
            [2, *[1] * (end - at - 1)] if entry.dims[at].text == star else [min(s, 2) for s in shape[at:end]]
        )
        shape[at:end] = few[: end - at]
    made = torch.empty(shape, dtype=torch.float64).uniform_(0.5, 1.5, generator=numbers)
    return made.to(dtype).to(device)


def sample(value: Any, dim: Any, index: int | None) -> Any:
    """Return one sample of an argument; index None gives an empty tensor on meta, of the sample's shape."""
    if isinstance(value, (list, tuple)):
        each = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
        return [sample(v, d, index) for v, d in zip(value, each, strict=True)]
    if not isinstance(value, Tensor):
        return value
    if index is None:
        return torch.empty(without(value.shape, dim), dtype=value.dtype, device="meta")
    return value if dim is None else value.select(dim, index)


def without(shape: Sequence[Any], dim: int | None) -> tuple[Any, ...]:
    """Return a shape without one of its dimensions."""
    return tuple(s for i, s in enumerate(shape) if i != dim)


def _varies(value: Any, dim: Any) -> bool:
    """Whether a batched argument is not the same for every sample."""
    if isinstance(value, (list, tuple)):
        each = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
        return any(map(_varies, value, each))
    return isinstance(value, Tensor) and dim is not None and bool((value != value.narrow(dim, 0, 1)).any())


def _clone(value: Any) -> Any:
    return [_clone(v) for v in value] if isinstance(value, (list, tuple)) else value.clone()


def _apart(one: Tensor, other: Tensor) -> float:
    """Return how far two results are apart, relative to the largest value; 0 where rounding explains it."""
    if one.numel() == 0:
        return 0.0
    exact = not (one.is_floating_point() or one.is_complex())
    tolerance = 0.0 if exact else _TOLERANCE.get(one.dtype, 1e-3)
    kind = torch.complex128 if one.is_complex() else torch.float64
    one, other = one.to(kind), other.to(kind)
    same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(same, 0, (one - other).abs()).max()
    scale = torch.where(one.isfinite() & other.isfinite(), torch.maximum(one.abs(), other.abs()), 0).max()
    apart = float(difference / scale) if float(scale) else float(difference)
    return apart if not apart <= tolerance else 0.0
