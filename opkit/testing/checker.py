"""`check`: one call of an op, with every kernel that can take it, held to what the op declares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opkit._op import Op
from opkit.dispatch.preference import use_backend
from opkit.errors import ArgumentError, OutputError
from opkit.spec.plan import OpenSize, OutputMeta
from opkit.testing import gradients, properties
from opkit.testing.arguments import copied, mapped, named, outcome, outputs, reason, reference, widened
from opkit.testing.difference import difference, tolerance, usual
from opkit.testing.report import CheckError, Record, Report

_OWN = 4  # times what the reference is off itself: a kernel may add up in another order


def check(op: Op[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Check an op for one call: every kernel, the meta function, the gradients and the stated properties.

    - Each kernel that can take the call gives the results of the reference in float64, to the tolerance of the
      coarsest dtype: 1e-9 for float64, 1e-5 for float32, 4e-3 for float16, 3e-2 for bfloat16; or, where large
      terms cancel, to a few times what the reference itself is off in the dtypes of the call. Shapes, dtypes, devices
      and strides are those that the shape line or the meta function says.
    - The formula gives the gradients of the reference in float64, in each of these dtypes that the arguments can
      be cast to (those whose dtype the shape line fixes stay as they are); so do the jvp, and second derivatives.
    - Kernels are deterministic and batch-invariant where they state it.

    What cannot be checked is in the report as skipped, with the reason. The arguments are not changed.

    Args:
        op: what is checked.
        *args: of the call, of any shapes, strides and device.
        **kwargs: of the call.

    Returns:
        The report; it prints as text.

    Raises:
        CheckError: an AssertionError; something is not as declared. Its `report` has all records.
        ArgumentError: there are no arguments.

    Example:
        >>> import opkit, torch
        >>> @opkit.op("doc::third", shapes="*b -> *b")
        ... def third(x: torch.Tensor) -> torch.Tensor:
        ...     return x / 3
        >>> third.register_autograd(lambda ctx, grad: grad / 3)
        <function ...>
        >>> opkit.testing.check(third, torch.ones(2, 4)).ok
        True
    """
    if not isinstance(op, Op):
        raise ArgumentError(
            f"checking {op!r}: found a {type(op).__name__}; expected an opkit.Op. Pass what @opkit.op made, or "
            "opkit.get(name)."
        )
    if not args and not kwargs and op.schema.params:
        raise ArgumentError(
            f"checking {op.name}: found no arguments; expected those of a call, {op.schema}. Pass some: "
            f"opkit.testing.check({op.schema.opname}, ...).",
            op=op.name,
        )
    values = op.schema.fill(*op.schema.carry(args, kwargs))
    before, op._table.quiet = op._table.quiet, True  # that it runs its reference here concerns nobody
    try:
        records = (*kernels(op, values), *gradients.records(op, values), *properties.records(op, values))
    finally:
        op._table.quiet = before
        op._table.reconsider()  # what was decided unsaid is said at the next call
    report = Report(op.name, records)
    if not report.ok:
        raise CheckError(report)
    return report


def kernels(
    op: Op[..., Any], values: Sequence[Any], *, only: str | None = None, slack: float = 0.0
) -> Iterator[Record]:
    """Yield what each kernel that can take the call gives, or only those of the backend `only`.

    Results may be off by `slack` beyond the tolerance.
    """
    args, kwargs = op.schema.split(op.schema.restore(values))
    right, off, missing = _expected(op, values)
    part = tolerance(named([p.name for p in op.schema.params], values).values())
    for candidate in op.explain(*args, **kwargs).candidates:
        backend = candidate.backend
        if only not in (None, backend):
            continue
        if candidate.status == "rejected":
            yield Record(op.name, backend, "kernel", "skipped", candidate.reason)
            continue
        try:
            with use_backend(backend, strict=True), torch.no_grad():
                found = outcome(op, values)
        except Exception as err:
            what = "meta" if isinstance(err, OutputError) else "call"
            expected = "what is declared" if isinstance(err, OutputError) else "a result"
            yield Record(op.name, backend, what, "failed", reason(err), expected)
            continue
        yield from _against_meta(op, backend, values, found)
        if missing is not None:
            yield Record(op.name, backend, "results", "skipped", missing)
            continue
        for name, value in found.items():
            wrong = difference(value, right.get(name), part, slack + _OWN * off.get(name, 0.0))
            yield Record(op.name, backend, f"result {name}", "failed" if wrong else "passed", *(wrong or ()))


def _expected(op: Op[..., Any], values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, float], str | None]:
    """Return the reference's results in float64 and how far it is off in the call's dtypes, or why there are none."""
    if op._table.declared:
        return {}, {}, "the op is declared without a reference"
    if torch.Tag.nondeterministic_seeded in op.overload.tags:
        return {}, {}, "the op draws random numbers"
    try:
        with torch.no_grad():
            wide = outputs(op, reference(op), mapped(op, values, lambda _, t: widened(t)))
            # What is rounded to an int is rounded from the dtype of the call.
            plain = outputs(op, reference(op), mapped(op, values, lambda _, t: copied(t)))
        off = {name: usual(value, wide[name]) for name, value in plain.items()}
        return {n: wide[n] if _is_floating(v) else v for n, v in plain.items()}, off, None
    except Exception as err:
        return {}, {}, f"the reference does not run in float64, {reason(err)}"


def _against_meta(
    op: Op[..., Any], backend: str, values: Sequence[Any], found: dict[str, Any]
) -> Iterator[Record]:
    metas, device = op._meta.expect(values)
    if metas is None:
        yield Record(
            op.name, backend, "meta", "skipped", "nothing says what the outputs are without their data"
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
