"""The choice of a kernel for one call, as a value that says why.

`explain` walks every candidate and compiles nothing; `choose` stops at the first that fits. Both ask
`_reject`, so that what is explained is what happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from opkit import _sources as sources
from opkit.cpp.light import Source
from opkit.dispatch import preference
from opkit.dispatch.preference import Preference
from opkit.dispatch.table import REFERENCE, Kernel, KernelTable
from opkit.errors import NoKernelError, warn
from opkit.spec.schema import Schema


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
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{self.op} on {self.device}:"]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join(["", *cells, row[3]]).rstrip())
        return "\n".join(lines)


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


def ranked(table: KernelTable, device: str, wanted: Preference) -> list[Kernel]:
    """Return the kernels for a device: preferred backends first, then by priority, then by name."""
    kernels = table.for_device(device)
    if wanted.names:
        place = {name: i for i, name in enumerate(wanted.names)}
        kernels.sort(key=lambda k: place.get(k.backend, len(place)))
    return kernels


def choose(table: KernelTable, values: Sequence[Any]) -> Kernel:
    """Return the kernel for a call whose arguments are all given, in schema order.

    Raises:
        NoKernelError: a strict preference excludes every kernel that could take the call.
    """
    sources.consult_for_kernels()
    wanted = preference.current()
    first = values[0] if values else None
    if isinstance(first, torch.Tensor):  # nearly always; the rest is the general case
        key: Any = (first.device.type, first.dtype, wanted)
    else:
        key = (device_of(table.schema, values), _first_dtype(values), wanted)
    choices = table.decided
    decided = choices.get(key)
    if decided is not None:
        return decided
    device = key[0]
    rejected: list[tuple[Kernel, str]] = []
    lasting = True  # until a kernel is asked whose answer depends on more than the key
    for kernel in ranked(table, device, wanted):
        lasting = lasting and kernel.when is None
        reason = _reject(kernel, table, values, wanted, ask=True)
        if reason is None:
            if kernel.backend == REFERENCE and REFERENCE not in wanted.names:
                _warn_of_fallback(table, device, rejected)
            if lasting:
                choices[key] = kernel
            return kernel
        rejected.append((kernel, reason))
    lines = "".join(f"\n    {k.backend}: {reason}" for k, reason in rejected)
    raise NoKernelError(
        f"calling {table.schema.name} on {device}: no kernel can take this call; use_backend"
        f"({', '.join(map(repr, wanted.names))}, strict=True) is in force.{lines}\n"
        "Leave strict=True out, name another backend, or register a kernel.",
        op=table.schema.name,
    )


def explain(table: KernelTable, values: Sequence[Any]) -> Explanation:
    """Return what `choose` would do with a call, for every candidate; builds nothing."""
    sources.consult_for_kernels()
    device = device_of(table.schema, values)
    wanted = preference.current()
    candidates: list[Candidate] = []
    selected = False
    for kernel in ranked(table, device, wanted):
        reason = _reject(kernel, table, values, wanted, ask=True)
        if reason is not None:
            status = "rejected"
        elif selected:
            status, reason = "available", ""
        else:
            selected, status, reason = True, "selected", _why(kernel, wanted)
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


def _why(kernel: Kernel, wanted: Preference) -> str:
    if kernel.backend in wanted.names:
        return f"preferred ({', '.join(wanted.names)})"
    return "last fallback" if kernel.backend == REFERENCE else f"priority {kernel.priority}"


def _reject(
    kernel: Kernel, table: KernelTable, values: Sequence[Any], wanted: Preference, *, ask: bool
) -> str | None:
    """Return why a kernel cannot take a call, or None; `ask` false leaves out what needs the call."""
    if wanted.strict and kernel.backend not in wanted.names:
        return f"only {', '.join(wanted.names)} allowed (strict)"
    if isinstance(kernel.function, Source):
        missing = kernel.function.unavailable()
        if missing and not kernel.function.is_carried(table.schema, table.plan(), kernel.backend):
            return missing
    if not ask:
        return None
    if kernel.dtypes is not None:
        dtype = _first_dtype(values)
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


def _first_dtype(values: Sequence[Any]) -> torch.dtype | None:
    for value in values:
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, torch.Tensor):
                return one.dtype
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_warned: set[str] = set()


def _warn_of_fallback(table: KernelTable, device: str, rejected: list[tuple[Kernel, str]]) -> None:
    """Say once per op that its reference runs although it has kernels."""
    name = table.schema.name
    if name in _warned or len(table.all()) == 1:
        return
    _warned.add(name)
    if rejected:
        reasons = "; ".join(f"{k.backend}: {reason}" for k, reason in rejected)
    else:
        devices = ", ".join(sorted({k.device for k in table.all() if k.device != "any"}))
        reasons = f"its kernels are for {devices}"
    warn(
        f"{name} runs its reference on {device}, which may be slow: {reasons}. Register a kernel for this "
        'case, or accept it with opkit.use_backend("reference").'
    )
