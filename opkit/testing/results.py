"""What an op's kernels give, against the reference in float64 and against what tracers are told."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.errors import OutputError
from opkit.spec.plan import OpenSize, OutputMeta
from opkit.testing.arguments import (
    copied,
    is_random,
    mapped,
    named,
    outcome,
    outputs,
    reason,
    reference,
    widened,
)
from opkit.testing.difference import difference, largest, tolerance, usual
from opkit.testing.report import Record

_AROUND = 8
_OWN = 4  # times what the reference is off itself, on average: a kernel may add up in another order


def kernels(
    op: Op[..., Any],
    values: Sequence[Any],
    *,
    only: str | Sequence[str] | None = None,
    without: Collection[str] = (),
    slack: float = 0.0,
) -> Iterator[Record]:
    """Yield what each kernel that can take the call gives, or only those of the backends `only`, or all `without` some.

    Results may be off by `slack` beyond the tolerance.
    """
    args, kwargs = op.schema.split(op.schema.restore(values))
    right, off, missing = reference_results(op, values)
    part = tolerance(named([p.name for p in op.schema.params], values).values())
    around: dict[str, float] | None = None
    for candidate in op.explain(*args, **kwargs).candidates:
        backend = candidate.backend
        if backend in without or (
            only is not None and backend not in ((only,) if isinstance(only, str) else only)
        ):
            continue
        if candidate.status == "rejected":
            yield Record(op.name, backend, "kernel", "not applicable", candidate.reason)
            continue
        try:
            with use_backend(backend, strict=True), torch.no_grad():
                found = outcome(op, values)
        except Exception as err:
            what, expected = "call", "a result"
            if isinstance(err, OutputError):
                shares = "shares storage with" in str(err)
                what, expected = ("aliasing", "memory of its own") if shares else ("meta", "what is declared")
            yield Record(op.name, backend, what, "failed", reason(err), expected)
            continue
        if not found:
            yield Record(op.name, backend, "call", "passed")
            continue
        yield from _against_meta(op, backend, values, found)
        if missing is not None:
            yield Record(op.name, backend, "results", "not applicable", missing)
            continue
        for name, value in found.items():
            wrong = difference(value, right.get(name), part, slack + off.get(name, 0.0))
            if wrong and around is None:
                around = _off_around(op, values)
            if wrong and around and around.get(name, 0.0) > off.get(name, 0.0):
                wrong = difference(value, right.get(name), part, slack + around[name])
            yield Record(op.name, backend, f"result {name}", "failed" if wrong else "passed", *(wrong or ()))


def _off_around(op: Op[..., Any], values: Sequence[Any]) -> dict[str, float]:
    """Return how far results may be off, as the reference is with arguments near these.

    Where terms cancel, what is left of them is rounding, and with the very arguments it may be little by chance.
    """
    found: dict[str, float] = {}
    for step in range(1, _AROUND + 1):
        scaled = mapped(op, values, lambda _, t: t * (1 + step / 16) if t.is_floating_point() else t)  # noqa: B023
        for name, off in reference_results(op, scaled)[1].items():
            found[name] = max(found.get(name, 0.0), off)
    return found


def reference_results(
    op: Op[..., Any], values: Sequence[Any]
) -> tuple[dict[str, Any], dict[str, float], str | None]:
    """Return the reference's results in float64 and how far others may be off, or why there are none."""
    if op._table.declared:
        return {}, {}, "the op is declared without a reference"
    if is_random(op):
        return {}, {}, "the op draws random numbers"
    try:
        with torch.no_grad():
            wide = outputs(op, reference(op), mapped(op, values, lambda _, t: widened(t)))
            # What is rounded to an int is rounded from the dtype of the call.
            plain = outputs(op, reference(op), mapped(op, values, lambda _, t: copied(t)))
        off = {n: max(_OWN * usual(v, wide[n]), 2 * largest(v, wide[n])) for n, v in plain.items()}
        return {n: wide[n] if _is_floating(v) else v for n, v in plain.items()}, off, None
    except Exception as err:
        return {}, {}, f"the reference does not run in float64, {reason(err)}"


def _against_meta(
    op: Op[..., Any], backend: str, values: Sequence[Any], found: dict[str, Any]
) -> Iterator[Record]:
    metas, device = op._meta.expect(values)
    if metas is None:
        yield Record(
            op.name, backend, "meta", "not applicable", "nothing says what the outputs are without their data"
        )
        return
    for name, meta in named([r.name for r in op.schema.results], metas).items():
        output = found.get(name)
        if not isinstance(meta, OutputMeta) or not isinstance(output, Tensor):
            continue
        known = [None if isinstance(size, OpenSize) else size for size in meta.shape]
        sizes = output.shape if output.dim() == len(known) else [0] * len(known)
        shape: tuple[int, ...] = tuple(size if k is None else k for k, size in zip(known, sizes, strict=True))
        empty = torch.empty(shape, dtype=meta.dtype, device="meta")
        wanted = shape, meta.dtype, meta.device or device, meta.stride or empty.stride()
        got = tuple(output.shape), output.dtype, output.device, output.stride()
        # What is never stepped along may have any stride.
        ok = got[:3] == wanted[:3] and all(
            n < 2 or a == b for n, a, b in zip(shape, got[3], wanted[3], strict=True)
        )
        text = ("", "") if ok else (_described(got), _described(wanted))
        yield Record(op.name, backend, f"meta of {name}", "passed" if ok else "failed", *text)


def _is_floating(value: Any) -> bool:
    return isinstance(value, float) or (
        isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    )


def _described(kind: tuple[Any, ...]) -> str:
    shape, dtype, device, stride = kind
    return f"{dtype} of {tuple(shape)} on {device} with the strides {tuple(stride)}"
