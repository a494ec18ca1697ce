"""The difference between a result and what it should be, by the tolerance of a dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of each dtype, how far an element may be off: this part of what is expected of it plus this part of the root mean
# square of all, as an element may be the difference of larger ones. Several roundings each, not a whole digit.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Difference(NamedTuple):
    """What was found where the difference is largest, and what was expected there."""

    found: str
    expected: str


def tolerance(values: Iterable[Any]) -> float:
    """Return the tolerance of the coarsest dtype among tensors; 0 where none is floating or complex."""
    dtypes = {v.dtype for v in values if isinstance(v, Tensor)}
    real = {d.to_real() for d in dtypes if d.is_complex or d.is_floating_point}
    return max((TOLERANCES.get(d, 4 * torch.finfo(d).eps) for d in real), default=0.0)


def difference(found: Any, expected: Any, part: float, slack: float = 0.0) -> Difference | None:
    """Return how `found` differs from `expected`, or None.

    Args:
        found: a tensor, number or None.
        expected: the same, perhaps in a wider dtype.
        part: the tolerance of the call; that of the dtype of `found` counts where it is larger.
        slack: how far an element may be off in any case.
    """
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        numbers = isinstance(found, (int, float)) and isinstance(expected, (int, float))
        equal = math.isclose(found, expected, rel_tol=part) if numbers else found is expected
        return (
            None
            if equal or (found != found and expected != expected)
            else Difference(_kind(found), _kind(expected))
        )
    if found.shape != expected.shape:
        return Difference(f"the shape {tuple(found.shape)}", f"{tuple(expected.shape)}")
    part = max(part, tolerance([found]))
    wide = (
        torch.complex128
        if found.is_complex()
        else torch.float64
        if found.is_floating_point()
        else found.dtype
    )
    right = expected.detach().to(found.dtype).to(wide)  # rounded, and infinite where the dtype cannot hold it
    left = found.detach().to(wide)
    same = (left == right) | (left.isnan() & right.isnan())
    if wide is not found.dtype or found.is_floating_point() or found.is_complex():
        sizes = right.abs()
        usual = sizes[sizes.isfinite()].square().mean().sqrt().nan_to_num()
        off = (left - right).abs()
        wrong = ~same & ~(right.isfinite() & (off <= part * (sizes + usual) + slack))
    else:
        off, wrong = (left != right).double(), ~same
    if not wrong.any():
        return None
    worst = torch.where(wrong, off.nan_to_num(nan=math.inf), -1.0).argmax()
    place = [int(i) for i in torch.unravel_index(worst, found.shape)]
    largest = f"{off[tuple(place)].item():.3g}"
    return Difference(
        f"{found[tuple(place)].item():.6g} at {place}, the largest difference ({largest}) of {int(wrong.sum())} "
        f"among {found.numel()} elements",
        f"{expected[tuple(place)].item():.6g}, to {part:g} of it and of the root mean square"
        + (f", or to {slack:.3g}" if slack else ""),
    )


def _kind(value: Any) -> str:
    return f"a Tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def largest(found: Any, expected: Any) -> float:
    """Return the largest difference of elements; 0 where it is not finite or there is none."""
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor) and found.numel()):
        return 0.0
    off = _off(found, expected).abs().max().item()
    return off if math.isfinite(off) else 0.0


def usual(found: Any, expected: Any) -> float:
    """Return the root mean square of the finite differences of elements; 0 where there are none."""
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor) and expected.is_floating_point()):
        return 0.0
    if found.shape != expected.shape:  # it depends on the data, and they were rounded
        return 0.0
    off = _off(found, expected)
    return off[off.isfinite()].abs().square().mean().sqrt().nan_to_num().item()


def _off(found: Tensor, expected: Tensor) -> Tensor:
    """Return by how much elements are off, in a dtype that torch subtracts in."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    return found.detach().to(wide) - expected.detach().to(wide)
