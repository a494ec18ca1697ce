"""`prepare`: build, load and select now what calls would build, load and select later.

A case is called once, as a user would call it, so that whatever stands between the call and its kernels has its say:
autocast, layouts, gradients, ops within ops. It changes nothing that a caller can see: arguments that an op overwrites
are copied, gradients are not accumulated, and random numbers drawn meanwhile are drawn again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from opkit import _cases, _frozen
from opkit._cases import Case
from opkit._frozen import Event
from opkit._op import Op
from opkit.cpp.light import Source
from opkit.dispatch import frozen, select
from opkit.errors import ArgumentError, FrozenError
from opkit.spec.schema import tensors
from opkit.transforms.formula import NoFormula


class Prepared(NamedTuple):
    """A kernel that calls may run now, and what had to be done for it.

    `did` is `built` (and loaded), `loaded`, `selected`, `ready` (nothing had to be done) or `skipped`: it cannot run
    on this machine, for the `reason`. `arguments` are those of the call, empty where there was none.
    """

    op: str
    backend: str
    did: str
    seconds: float = 0.0
    arguments: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Preparation:
    """All that was prepared. Prints as one line per kernel."""

    records: tuple[Prepared, ...]
    seconds: float

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for record in self.records:
            counts[record.did] = counts.get(record.did, 0) + 1
        said = ", ".join(f"{count} {did}" for did, count in counts.items()) or "nothing"
        rows = [(r.op, r.backend, r.did) for r in self.records]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [f"prepared in {self.seconds:.2f} s: {said}"]
        for r, row in zip(self.records, rows, strict=True):
            took = f"{r.seconds:.2f} s" if r.did in ("built", "loaded") else ""
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(["", *cells, took.rjust(7), r.reason or r.arguments]).rstrip())
        return "\n".join(lines)


def prepare(
    ops: Op[..., Any] | str | Iterable[Op[..., Any] | str],
    cases: Iterable[Any] | Mapping[Any, Iterable[Any]] | None = None,
    *,
    device: str | None = None,
) -> Preparation:
    """Build, load and select kernels now, so that later calls need not, and after `opkit.freeze()` may go on.

    Each case is called once, in the context that is in force (`use_backend`, `require`, autocast, `no_grad`, ...), and
    differentiated where an argument requires grad. That also compiles Python kernels that compile as they run, and
    prepares the ops that others call. Arguments that an op overwrites are copied, nothing is accumulated in `.grad`,
    and random state is kept. Plugins that the selection asks are loaded.

    Without cases, every native kernel of the op, and of the op that is its formula, is built and loaded if this
    machine can run it, and any later call may select it; Python kernels are not prepared.

    It works in a frozen process, and prepares for that process: others find what was built in the cache, and load
    and select themselves.

    Args:
        ops: an op, its name, or several of these.
        cases: for one op an iterable of cases: tuples of arguments, or pairs (args, kwargs). For several ops, a
            mapping from ops or names to such iterables; those that it leaves out are prepared without cases.
        device: without cases, only kernels for this device type.

    Returns:
        A report, which prints; `.records` has what was done.

    Raises:
        ArgumentError: a case is no tuple, or the cases do not belong to the ops.
        OpNotFoundError: there is no op of a name.
        FrozenError: a CUDA graph is being captured.
        BuildError: a kernel does not compile. What a call of a case raises is raised, too.

    Example:
        >>> import opkit, torch
        >>> from opkit_kernels import vector_add
        >>> x = torch.zeros(1024)
        >>> report = opkit.prepare(vector_add, [(x, x), (x.double(), x.double())])
        >>> [record.backend for record in report.records]
        ['cpp', 'cpp']
        >>> with opkit.freeze():
        ...     vector_add(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """
    if _frozen.is_capturing():
        raise FrozenError(
            "preparing ops: a CUDA graph is being captured; expected a call before that, as kernels are loaded and "
            "called. Prepare before the capture begins."
        )
    begun = time.perf_counter()
    with _frozen.preparing([]):  # also looking up names may load plugins
        wanted = _wanted(ops, cases)
        records: list[Prepared] = []
        for op, own in wanted:
            if own is None:
                records += [_load(owner, kernel) for owner, kernel in _natives(op, device)]
            else:
                for case in own:
                    records += _call(op, case)
    return Preparation(tuple(dict.fromkeys(records)), time.perf_counter() - begun)


# ---------------------------------------------------------------- what is asked for


def _wanted(ops: Any, cases: Any) -> list[tuple[Op[..., Any], list[Case] | None]]:
    one = isinstance(ops, (Op, str))
    found = [_cases.resolve(op, "preparing") for op in ((ops,) if one else ops)]
    if cases is None:
        return [(op, None) for op in found]
    if not isinstance(cases, Mapping):
        if len(found) != 1:
            raise ArgumentError(
                f"preparing {', '.join(op.name for op in found) or 'no op'}: found {len(found)} ops, and cases that "
                "do not say whose they are; expected a mapping from ops to cases. Write {op: [(x, y)]}."
            )
        return [(found[0], _cases.listed(found[0], cases, "preparing"))]
    by_op = {_cases.resolve(op, "preparing"): own for op, own in cases.items()}
    for op in by_op:
        if op not in found:
            raise ArgumentError(
                f"preparing {', '.join(o.name for o in found) or 'no op'}: found cases for {op.name}; expected some "
                "for the ops that are named. Name it in ops, too, or leave its cases out.",
                op=op.name,
            )
    return [(op, _cases.listed(op, by_op[op], "preparing") if op in by_op else None) for op in found]


# ---------------------------------------------------------------- doing it


def _natives(op: Op[..., Any], device: str | None) -> Iterator[tuple[Op[..., Any], Any]]:
    """Yield the native kernels of an op and of its formulas, with the op that each belongs to."""
    seen: list[Op[..., Any]] = []
    owner: Any = op
    while isinstance(owner, Op) and owner not in seen:
        seen.append(owner)
        _ = owner.kernels  # asks plugins for theirs
        yield from ((owner, k) for k in owner.native_kernels() if device in (None, k.device))
        owner = getattr(owner._formula, "formula", None)


def _load(op: Op[..., Any], kernel: Any) -> Prepared:
    """Build and load a native kernel, if this machine can run it."""
    reason = _why_not(op, kernel)
    if reason:
        return Prepared(op.name, kernel.backend, "skipped", reason=reason)
    events: list[Event] = []
    if not kernel.slot():
        with _frozen.preparing(events):
            op._runner.load(kernel)
    op._table.prepared.add(kernel)
    done = next((e for e in events if e.what != "selected"), None)
    return Prepared(op.name, kernel.backend, done.what if done else "ready", done.seconds if done else 0.0)


def _why_not(op: Op[..., Any], kernel: Any) -> str:
    """Return why a native kernel cannot run here, or nothing."""
    assert isinstance(kernel.function, Source)
    if not _is_here(kernel.device):
        return f"this machine has no device {kernel.device}"
    missing = kernel.function.unavailable()
    if missing and not kernel.function.is_carried(op.schema, op._runner.native_plan, kernel.backend):
        return missing
    return ""


def _is_here(device: str) -> bool:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # torch without CUDA asserts
        return False
    return True


def _call(op: Op[..., Any], case: Case) -> list[Prepared]:
    """Call an op with copies of what it overwrites, and differentiate it where that is asked for."""
    schema = op.schema
    values = _cases.fill(op, case, "preparing")
    arguments = frozen.describe(schema, values)
    runs = select.explain(op._table, schema.fill(*schema.carry(*case))).selected or ""
    given = _cases.own(op, values)
    positional, named = schema.split(given)
    events: list[Event] = []
    devices = sorted({t.get_device() for t in tensors(values) if t.is_cuda})
    with torch.random.fork_rng(devices=devices), _frozen.preparing(events):
        result = op(*positional, **named)
        leaves = [t for t in tensors(given) if t.requires_grad]
        if torch.is_grad_enabled() and not isinstance(op._formula, NoFormula):
            outputs = [o for o in tensors(schema.flatten(result)) if o.requires_grad]
            if leaves and outputs:
                grads = [torch.zeros_like(o) for o in outputs]
                torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return _records(op.name, runs, arguments, events)


def _records(name: str, runs: str, arguments: str, events: list[Event]) -> list[Prepared]:
    """Return what a call did, the op's own kernel first."""
    done: dict[tuple[str, str], Prepared] = {}
    for event in events:
        if event.what == "built" and not event.backend:  # the library, which loading it tells again
            continue
        key = event.op, event.backend
        if event.what == "selected":
            done.setdefault(key, Prepared(*key, "selected", arguments=event.arguments))
        else:
            done[key] = Prepared(*key, event.what, event.seconds, event.arguments)
    if not any(op == name for op, _ in done):
        return [Prepared(name, runs, "ready", arguments=arguments), *done.values()]
    return sorted(done.values(), key=lambda record: record.op != name)
