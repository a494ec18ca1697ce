"""The choice of a kernel for one call, as a value that says why.

`explain` walks every candidate and compiles nothing; `choose` stops at the first that fits. Both ask
`_reject`, so that what is explained is what happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from opkit import _html, _logs
from opkit import _sources as sources
from opkit.cpp.light import Source
from opkit.dispatch import frozen, measured, preference
from opkit.dispatch.measured import Verdict
from opkit.dispatch.preference import Preference
from opkit.dispatch.table import REFERENCE, Kernel, KernelTable
from opkit.errors import NoKernelError, warn
from opkit.spec.schema import Schema, tensors

_LOG = _logs.logger("select")


class Candidate(NamedTuple):
    """One kernel and what the selection made of it: selected, available, or rejected and why."""

    backend: str
    device: str
    source: str
    status: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Which kernel a call would run, and why not the others. Prints as a table."""

    op: str
    device: str
    candidates: tuple[Candidate, ...]

    @property
    def selected(self) -> str | None:
        """The backend of the selected candidate, or None where no kernel can take the call."""
        return next((c.backend for c in self.candidates if c.status == "selected"), None)

    def __str__(self) -> str:
        rows = [(c.backend, c.status, c.reason, c.source) for c in self.candidates]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [f"{self.op} on {self.device}:"]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join(["", *cells, row[3]]).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [(c.backend, c.status, c.reason, c.source) for c in self.candidates]
        shown = _html.table(("backend", "status", "reason", "source"), rows)
        return f"{_html.titled(self.op, f' on {self.device}')}{shown}"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:  # IPython in a terminal
        printer.text(str(self))


def device_of(schema: Schema, values: Sequence[Any]) -> str:
    """Return the device type that a call is for: that of its first tensor, or of a device argument."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.device.type
        if isinstance(value, (list, tuple)):
            for element in value:
                if isinstance(element, torch.Tensor):
                    return element.device.type
    for param, value in zip(schema.params, values, strict=True):
        if param.type.base == "Device" and value is not None:
            return torch.device(value).type
    return torch.get_default_device().type


def ranked(
    table: KernelTable, device: str, wanted: Preference, verdict: Verdict = measured.UNKNOWN
) -> list[Kernel]:
    """Return the kernels for a device: preferred backends, then the one measured fastest, then by priority and name."""
    kernels = table.for_device(device)
    if verdict.winner is not None:
        kernels.sort(key=lambda k: k.backend != verdict.winner)
    if wanted.names:
        place = {name: i for i, name in enumerate(wanted.names)}
        kernels.sort(key=lambda k: place.get(k.backend, len(place)))
    return kernels


def wanted_now() -> Preference:
    """Return what is asked of the choice in this thread, torch's own setting for determinism included."""
    wanted = preference.current()
    return wanted.requiring("deterministic") if torch.are_deterministic_algorithms_enabled() else wanted


def choose(table: KernelTable, values: Sequence[Any]) -> Kernel:
    """Return the kernel for a call whose arguments are all given, in schema order.

    Raises:
        NoKernelError: what is required excludes every kernel that could take the call.
        FrozenError: the call was not prepared, and only what was may run.
    """
    if sources.waiting():
        frozen.consult(table.schema, values)
    wanted = wanted_now()
    key = _kind(table, values, wanted)
    choices = table.decided
    decided = choices.get(key)
    if decided is not None:
        return decided
    kind, device = key, key[0]
    verdict = measured.UNKNOWN
    if known := table.measured(device):
        key = (*kind, measured.bucket_of(values))
        if (decided := choices.get(key)) is not None:
            return decided
        verdict = known.verdict(kind[1], key[3], table.for_device(device))
    rejected: list[tuple[Kernel, str]] = []
    lasting = True  # until a kernel is asked whose answer depends on more than the key
    for kernel in ranked(table, device, wanted, verdict):
        lasting = lasting and kernel.when is None
        reason = _reject(kernel, table, values, wanted, ask=True)
        if reason is None:
            if kernel.fetch is not None:
                frozen.fetch(table.schema, values, kernel.fetch)
                return choose(table, values)
            if wanted.inline:
                kind = (*kind[:2], wanted._replace(inline=()))
            if kernel not in table.selected.get(kind, ()):
                frozen.select(table, kind, kernel, values, rejected)
                if _LOG.isEnabledFor(_logs.INFO):
                    _tell(table, kernel, values, wanted, verdict, rejected)
            if kernel.backend == REFERENCE and REFERENCE not in (*(wanted.names or ()), verdict.winner):
                dtype = (
                    None if wanted.required else first_dtype(values)
                )  # what is stated of others is unknown
                _warn_of_fallback(table, device, dtype, rejected)
            if lasting:
                choices[key] = kernel
            return kernel
        rejected.append((kernel, reason))
    lines = "".join(f"\n    {k.backend}: {reason}" for k, reason in rejected)
    if table.declared and not (wanted.strict or wanted.required):
        others = ", ".join(sorted({k.device for k in table.all()} - {device}))
        found = lines or f" It has {f'kernels for {others}' if others else 'no kernel'}."
        raise NoKernelError(
            f"calling {table.schema.name} on {device}: the op is declared without a reference, and no kernel takes "
            f"this call.{found}\nRegister one with register_kernel({device!r}, ...) on "
            f"opkit.get({table.schema.name!r}), or install a plugin that brings one.",
            op=table.schema.name,
        )
    raise NoKernelError(
        f"calling {table.schema.name} on {device}: no kernel can take this call; {_in_force(wanted)}.{lines}\n"
        f"{_way_out(wanted)}.",
        op=table.schema.name,
    )


def _tell(
    table: KernelTable,
    kernel: Kernel,
    values: Sequence[Any],
    wanted: Preference,
    verdict: Verdict,
    rejected: Sequence[tuple[Kernel, str]],
) -> None:
    """Log a choice that is new: of a kernel that no call of the kind ran before."""
    name = table.schema.name
    _LOG.info(
        "%s: %s runs %s (%s)",
        name, frozen.describe(table.schema, values), kernel.backend, _why(kernel, wanted, verdict),
    )  # fmt: skip
    for other, reason in rejected:
        _LOG.debug("%s: not %s: %s", name, other.backend, reason)


def _in_force(wanted: Preference) -> str:
    """Return the contexts that exclude kernels, as they are written."""
    parts = []
    if wanted.strict:
        parts.append(f"use_backend({', '.join(map(repr, wanted.names or ()))}, strict=True)")
    if wanted.required:
        named = f"require({', '.join(map(repr, wanted.required))})"
        from_torch = wanted.required == ("deterministic",) and torch.are_deterministic_algorithms_enabled()
        parts.append("torch.use_deterministic_algorithms(True)" if from_torch else named)
    return f"{' and '.join(parts)} {'is' if len(parts) == 1 else 'are'} in force"


def _way_out(wanted: Preference) -> str:
    if not wanted.required:
        return "Leave strict=True out, name another backend, or register a kernel"
    return "Require less, or register a kernel with properties=[...] that states what it is"


def _kind(table: KernelTable, values: Sequence[Any], wanted: Preference) -> tuple[Any, ...]:
    """Return what a choice depends on, where no kernel is asked."""
    first = values[0] if values else None
    if isinstance(first, torch.Tensor):  # nearly always; the rest is the general case
        return first.device.type, first.dtype, wanted
    return device_of(table.schema, values), first_dtype(values), wanted


def is_decided(table: KernelTable, values: Sequence[Any]) -> bool:
    """Whether all calls of this kind run the kernel that `choose` has returned for one."""
    kind = _kind(table, values, wanted_now())
    return ((*kind, measured.bucket_of(values)) if table.measured(kind[0]) else kind) in table.decided


def foreseen(table: KernelTable, device: str, dtype: torch.dtype | None) -> Kernel:
    """Return the kernel that a call will run which is being traced.

    Conditions (`when=`) are taken to hold, and nothing to be measured: both depend on what is not known then.
    """
    sources.consult_for_kernels()
    wanted = wanted_now()
    for kernel in ranked(table, device, wanted):
        takes = kernel.dtypes is None or dtype in kernel.dtypes
        if takes and _reject(kernel, table, (), wanted, ask=False) is None:
            return kernel
    return table.reference


def explain(table: KernelTable, values: Sequence[Any]) -> Explanation:
    """Return what `choose` would do with a call, for every candidate; builds nothing."""
    sources.consult_for_kernels()
    device = device_of(table.schema, values)
    wanted = wanted_now()
    found = table.measured(device)
    verdict = found.verdict(first_dtype(values), measured.bucket_of(values), table.for_device(device))
    candidates: list[Candidate] = []
    selected = False
    for kernel in ranked(table, device, wanted, verdict):
        reason = _reject(kernel, table, values, wanted, ask=True)
        if reason is not None:
            status = "rejected"
        elif selected:
            status, reason = "available", ""
        elif kernel.fetch is not None:  # what it is like, only the kernel itself can tell
            frozen.fetch(table.schema, values, kernel.fetch)
            return explain(table, values)
        else:
            selected, status, reason = True, "selected", _why(kernel, wanted, verdict)
        candidates.append(Candidate(kernel.backend, kernel.device, kernel.source, status, reason))
    return Explanation(table.schema.name, device, tuple(candidates))


def listing(table: KernelTable) -> tuple[Candidate, ...]:
    """Return the records of all kernels of an op, on every device, without a call."""
    sources.consult_for_kernels()
    found = []
    for kernel in table.all():
        reason = _reject(kernel, table, (), Preference(), ask=False)
        status = "available" if reason is None else "rejected"
        found.append(Candidate(kernel.backend, kernel.device, kernel.source, status, reason or ""))
    return tuple(found)


def _why(kernel: Kernel, wanted: Preference, verdict: Verdict) -> str:
    if wanted.names and kernel.backend in wanted.names:
        why = f"preferred ({', '.join(wanted.names)})"
    elif kernel.backend == verdict.winner:
        why = verdict.reason
    else:
        why = "last fallback" if kernel.backend == REFERENCE else f"priority {kernel.priority}"
        said = f"{verdict.winner} was measured fastest" if verdict.winner else verdict.reason
        why += f" ({said})" if said else ""
    return f"{why}, {', '.join(wanted.required)}" if wanted.required else why


def _reject(
    kernel: Kernel, table: KernelTable, values: Sequence[Any], wanted: Preference, *, ask: bool
) -> str | None:
    """Return why a kernel cannot take a call, or None; `ask` false leaves out what needs the call."""
    names = wanted.names or ()
    if wanted.strict and kernel.backend not in names:
        return f"only {', '.join(names)} allowed (strict)"
    if wanted.required:
        stated = _OF_A_REFERENCE if kernel is table.reference else kernel.properties
        lacks = [name for name in wanted.required if name not in stated]
        if lacks:
            return f"does not state that it is {' or '.join(lacks)}"
    if kernel.fetch is not None and ask and kernel.fetch.busy:
        return "it is being loaded"
    if isinstance(kernel.function, Source):
        missing = kernel.function.unavailable()
        if missing and not kernel.function.is_carried(table.schema, table.plan(), kernel.backend):
            return missing
    if not ask:
        return None
    if kernel.dtypes is not None:
        dtype = first_dtype(values)
        if dtype is not None and dtype not in kernel.dtypes:
            return f"dtype {_short(dtype)} is not among {', '.join(map(_short, kernel.dtypes))}"
    if kernel.when is not None:
        args, kwargs = table.schema.split(values)
        answer = kernel.when(*args, **kwargs)
        if isinstance(answer, str) and answer:
            return answer
        if not answer:  # False, None, or a reason without words
            return "its condition (when=) is not met"
    return None


def first_dtype(values: Sequence[Any]) -> torch.dtype | None:
    return next((t.dtype for t in tensors(values)), None)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_OF_A_REFERENCE = ("deterministic",)  # as it runs under torch's setting then; see `run`

_warned: set[str] = set()


def _warn_of_fallback(
    table: KernelTable, device: str, dtype: torch.dtype | None, rejected: list[tuple[Kernel, str]]
) -> None:
    """Say once per op that its reference runs although it has kernels, or somebody has one for it."""
    name = table.schema.name
    if name in _warned or table.quiet:
        return
    lone = len(table.all()) == 1
    advice = sources.advice(name, device, None if dtype is None else _short(dtype), lone=lone)
    if lone and not advice:
        return
    _warned.add(name)
    if lone:
        reasons = "it has no kernel"
    elif rejected:
        reasons = "; ".join(f"{k.backend}: {reason}" for k, reason in rejected)
    else:
        devices = ", ".join(sorted({k.device for k in table.all() if k.device != "any"}))
        reasons = f"its kernels are for {devices}"
    warn(
        f"{name} runs its reference on {device}, which may be slow: {reasons}. "
        f"{advice + ' Or register' if advice else 'Register'} a kernel for this "
        'case, or accept it with opkit.use_backend("reference").'
    )
