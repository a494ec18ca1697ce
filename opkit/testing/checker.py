"""`check`: an op held to what it declares, with every kernel, in calls that are given or made from the declaration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opkit._op import Op
from opkit.dispatch.select import device_of
from opkit.errors import ArgumentError, BackendError, BuildError, did_you_mean
from opkit.spec.schema import tensors
from opkit.testing import batching, gradients, mutation, numeric, opchecks, properties, repetition, tracing
from opkit.testing import samples as samples_of
from opkit.testing.arguments import (
    count,
    reason,
    shown,
)
from opkit.testing.devices import is_there
from opkit.testing.difference import tolerance
from opkit.testing.report import CHECKS, CheckError, Record, Report, check_names
from opkit.testing.results import kernels
from opkit.testing.samples import Missing, Sample

_VARIED = ("gradients", "second derivatives", "forward mode")


def check(
    op: Op[..., Any],
    /,
    *args: Any,
    samples: Iterable[Any] | None = None,
    backends: Iterable[str] | None = None,
    checks: Iterable[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Check an op: every kernel, the meta function, gradients, and what torch does with it. One report of all.

    With the arguments of a call it is that call that is made. Without any, calls are made from what the op declares:
    sizes 0, 1, odd and large, dtypes, memory layouts, optional tensors present and absent; see
    `opkit.testing.samples.derived`. Where a declaration cannot say it all, `samples=` gives calls, or
    `op.register_samples` once and for all.

    Each kernel that can take a call must give the results of the reference in float64, to the tolerance of the
    coarsest dtype: 1e-9 for float64, 1e-5 for float32, 4e-3 for float16, 3e-2 for bfloat16; or, where large terms
    cancel, to a few times what the reference itself is off in the dtypes of the call. Beyond that, with each backend:
    the names in `opkit.testing.report.CHECKS` say what else is checked, and what it proves.

    What a backend or the op cannot do is in the report as not applicable, with the reason. The arguments are not
    changed.

    Args:
        op: what is checked.
        *args: of a call, of any shapes, strides and device.
        samples: calls instead, each a tuple of arguments or a pair (args, kwargs). The first one is made in other
            dtypes and layouts too.
        backends: only these.
        checks: only these, of the names in `opkit.testing.report.CHECKS`.
        **kwargs: of the call. An argument of the op named as one of these options is meant as the argument.

    Returns:
        The report; it prints as text.

    Raises:
        CheckError: an AssertionError; something is not as declared. Its `report` has all records.
        ArgumentError: the declaration does not say enough to make calls.
        BackendError: the op has no kernel of a backend.

    Example:
        >>> import opkit, torch
        >>> @opkit.op("doc::third", shapes="*b -> *b")
        ... def third(x: torch.Tensor) -> torch.Tensor:
        ...     return x / 3
        >>> third.register_autograd(lambda ctx, grad: grad / 3)
        <function ...>
        >>> report = opkit.testing.check(third)
        >>> report.ok, report.of("results")[0].status, len(report.inputs) > 10
        (True, 'passed', True)
        >>> opkit.testing.check(third, torch.ones(2, 4), checks=["results"]).ok
        True
    """
    report = examine(op, *args, samples=samples, backends=backends, checks=checks, **kwargs)
    if not report.ok:
        raise CheckError(report)
    return report


def examine(op: Op[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Do what `check` does, and return the report whatever it says."""
    if not isinstance(op, Op):
        raise ArgumentError(
            f"checking {op!r}: found a {type(op).__name__}; expected an opkit.Op. Pass what @opkit.op made, or "
            "opkit.get(name)."
        )
    options = {name: _option(op, kwargs, name) for name in ("samples", "backends", "checks")}
    wanted = check_names(options["checks"] or tuple(CHECKS), f"checking {op.name}")
    only = _known(op, options["backends"])
    inputs, missing = _inputs(op, args, kwargs, options["samples"])
    before, op._table.quiet = op._table.quiet, True  # that it runs its reference here concerns nobody
    try:
        records = [*_examined(op, inputs, only, wanted)]
    finally:
        op._table.quiet = before
        op._table.reconsider()  # what was decided unsaid is said at the next call
    for one in missing:
        text = f"{one.name}: {one.reason}"
        records.append(Record(op.name, "", one.name, "not applicable", text, check="inputs"))
    return Report(op.name, tuple(records), tuple(one.text for one in inputs), _tolerances(inputs))


def _tolerances(inputs: Sequence[_Input]) -> tuple[tuple[str, float], ...]:
    """Return by how much results may be off, for each dtype among the inputs."""
    dtypes = dict.fromkeys(t.dtype for one in inputs for t in tensors(one.values))
    real = (d for d in dtypes if d.is_floating_point or d.is_complex)
    return tuple((str(d).removeprefix("torch."), tolerance([torch.empty(0, dtype=d)])) for d in real)


class _Input(NamedTuple):
    """A call with its arguments in schema order, and how it is shown."""

    name: str
    values: tuple[Any, ...]
    text: str


def _option(op: Op[..., Any], kwargs: dict[str, Any], name: str) -> Any:
    """Return an option of `check`; what is named as an argument of the op stays with those."""
    if any(p.name == name for p in op.schema.params):
        if kwargs.get(name) is None:
            kwargs.pop(name, None)
        return None
    return kwargs.pop(name, None)


def _known(op: Op[..., Any], backends: Iterable[str] | None) -> tuple[str, ...] | None:
    if backends is None:
        return None
    names = (backends,) if isinstance(backends, str) else tuple(backends)
    known = list(dict.fromkeys(kernel.backend for kernel in op.kernels))
    for name in names:
        if name not in known:
            raise BackendError(
                f"checking {op.name}: it has no kernel of the backend {name!r}; expected some of {', '.join(known)}."
                f"{did_you_mean(name, known)} Register one with register_kernel, or name one of these.",
                op=op.name,
            )
    return names


def _inputs(
    op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Any
) -> tuple[list[_Input], list[Missing]]:
    """Return the calls to make on each device, and those that cannot be made."""
    missing: list[Missing] = []
    if args or kwargs:
        if given is not None:
            raise ArgumentError(
                f"checking {op.name}: found the arguments of a call and samples; expected one of them. Put the "
                "arguments among the samples.",
                op=op.name,
            )
        made = [Sample("as given", args, kwargs)]
    elif not op.schema.params:
        made = [Sample("without arguments", (), {})]
    else:
        made = []
        for device in _devices(op):
            own = samples_of.listed(op, given) if given is not None else samples_of.registered(op, device)
            more, lack = samples_of.derived(op, device, given=own)
            made += more
            missing += [one for one in lack if one not in missing]
            if given is not None:
                break
    found = []
    for one in made:
        values = op.schema.fill(*op.schema.carry(one.args, one.kwargs))
        found.append(_Input(one.name, values, f"{one.name}: {shown(op, values)}"))
    return found, missing


def _devices(op: Op[..., Any]) -> list[str]:
    """Return the device types here that the op has kernels for, the CPU first."""
    devices = dict.fromkeys(k.device for k in op.kernels if k.device not in ("any", "cpu"))
    return ["cpu", *(d for d in devices if is_there(d))]


def _examined(
    op: Op[..., Any], inputs: Sequence[_Input], only: tuple[str, ...] | None, wanted: Sequence[str]
) -> Iterator[Record]:
    able: dict[tuple[str, str], list[_Input]] = {}  # by backend and device
    unbuilt: set[str] = set()  # backends whose kernel has no library: building it again would fail again
    for one in inputs:
        device = device_of(op.schema, one.values)
        for record in kernels(op, one.values, only=only, without=unbuilt):
            check = "meta" if record.what.startswith("meta") else "results"
            check = "schema" if record.what == "aliasing" else check
            calls = able.setdefault((record.backend, device), []) if record.what != "kernel" else []
            if record.what == "kernel" and len(inputs) > 1:
                record = record._replace(found=f"{record.found} ({one.name})")
            elif (
                record.what in ("call", "meta", "aliasing") and record.status == "failed"
            ):  # it gives no result
                if record.found.startswith(BuildError.__name__):
                    unbuilt.add(record.backend)
            elif record.what != "kernel" and one not in calls:
                calls.append(one)
            if check in wanted:
                yield record._replace(check=check, input=one.text)
    here = {device_of(op.schema, one.values) for one in inputs}
    for kernel in op.kernels:
        if kernel.device not in (*here, "any") and (only is None or kernel.backend in only):
            why = kernel.reason or f"it is for {kernel.device}, and the call is on {', '.join(sorted(here))}"
            yield Record(op.name, kernel.backend, "kernel", "not applicable", why, check="results")
    for (backend, _), calls in able.items():
        if not calls:
            for check in wanted:
                if check not in ("meta", "results"):
                    text = "none of its calls runs"
                    yield Record(op.name, backend, check, "not applicable", text, check=check)
            continue
        for call, record in _of_backend(op, backend, calls, wanted):
            yield record._replace(input=call.text) if record.check in wanted else record


def _of_backend(
    op: Op[..., Any], backend: str, calls: Sequence[_Input], wanted: Sequence[str]
) -> Iterator[tuple[_Input, Record]]:
    """Yield what is found of one backend beside its results, each with the call that it is about."""

    def each(
        check: str, function: Callable[[], Iterator[Record]], call: _Input
    ) -> Iterator[tuple[_Input, Record]]:
        if check and check not in wanted:
            return
        try:
            for record in function():
                record = record._replace(check=record.check or check)
                if record.check in wanted:
                    yield call, record
        except Exception as err:  # a test that cannot be carried out is no pass
            yield call, Record(op.name, backend, check, "failed", reason(err), "a result", check=check)

    first = calls[0]
    for call in calls:
        yield from each("schema", lambda: mutation.records(op, backend, call.values), call)  # noqa: B023
    yield from each("", lambda: opchecks.records(op, backend, first.values, wanted), first)
    if any(check in wanted for check in _VARIED):
        for call in _different(calls):
            yield from each("", lambda: gradients.records(op, call.values, backend), call)  # noqa: B023
    for call in _different(calls):
        yield from each("", lambda: numeric.records(op, backend, call.values, wanted), call)  # noqa: B023
    yield from each("vmap", lambda: batching.records(op, backend, first.values), first)
    yield from each("compile", lambda: tracing.compiled(op, backend, [c.values for c in calls]), first)
    yield from each("export", lambda: tracing.exported(op, backend, first.values), first)
    largest = max(calls, key=lambda call: count(call.values))
    for one in (first, largest) if largest is not first else (first,):
        yield from each("determinism", lambda: repetition.determinism(op, backend, one.values), one)  # noqa: B023
    together = [c.values for c in calls if count(c.values) <= _SMALL][: repetition.THREADS] or [first.values]
    yield from each("thread safety", lambda: repetition.thread_safety(op, backend, together), first)
    yield from each("properties", lambda: properties.records(op, first.values, only=backend), first)


_SMALL = 10_000  # elements of a call that threads repeat


def _different(calls: Sequence[_Input]) -> list[_Input]:
    """Return the first call, and those of its sizes that take another way through a formula."""
    first = calls[0]
    sizes = [t.shape for t in tensors(first.values)]
    found = {tracing.kind(first.values): first}
    for call in calls[1:]:
        few = [t.shape for t in tensors(call.values)]
        if len(few) != len(sizes) or (few == sizes and _scalars(call.values) != _scalars(first.values)):
            found.setdefault(tracing.kind(call.values), call)
    return list(found.values())


def _scalars(values: Sequence[Any]) -> list[Any]:
    return [None if isinstance(v, Tensor) else repr(v) for v in values if not isinstance(v, (list, tuple))]
