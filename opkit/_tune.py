"""`tune`: measure the kernels of an op, and have the fastest be chosen for calls of that size from now on.

Only the forward is measured, of arguments as kernels get them. What was measured is `dispatch.measured`'s to keep, and
choosing by it `dispatch.select`'s: here is asked, called, timed and told.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils import benchmark

from opkit import _cases, _frozen, _logs
from opkit._cases import Case
from opkit._op import Op
from opkit.cpp import _progress
from opkit.dispatch import frozen, measured, select
from opkit.dispatch.measured import Kind, Measurement
from opkit.dispatch.preference import use_backend
from opkit.errors import ArgumentError, OutputError
from opkit.spec.schema import tensors

_LOG = _logs.logger("tune")
_BLOCK = 0.005  # seconds of calls that are timed together
_LEAST = 3  # blocks of each kernel


class Timing(NamedTuple):
    """How long a kernel took for a case.

    `bucket` is the bit length of the number of elements of all tensors of the case, which calls are told apart by
    beside their `device` and `dtype`; `seconds` the median of a call; `chosen` says whether such calls run it from now
    on, unless another backend is preferred.
    """

    op: str
    arguments: str
    device: str
    dtype: str
    bucket: int
    backend: str
    seconds: float
    chosen: bool


@dataclass(frozen=True)
class Tuning:
    """All that was measured. Prints as a table."""

    records: tuple[Timing, ...]
    seconds: float

    def __str__(self) -> str:
        rows = [
            (r.op, r.arguments, measured.span(r.bucket), r.backend, measured.shown(r.seconds))
            for r in self.records
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
        lines = [f"tuned in {self.seconds:.2f} s: {len(self.records)} measured"]
        for record, row in zip(self.records, rows, strict=True):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            cells[-1] = row[-1].rjust(widths[-1])
            lines.append("  ".join(["", *cells, "chosen" if record.chosen else ""]).rstrip())
        return "\n".join(lines)


def tune(
    op: Op[..., Any] | str,
    cases: Iterable[Any] | None = None,
    *,
    min_run_time: float = 0.2,
    forget: bool = False,
) -> Tuning:
    """Measure the kernels that can take some calls, and choose the fastest for calls like them from now on.

    Calls are told apart by device, dtype (of the first tensor) and size: the number of elements of all tensors
    together, by powers of two. Of several cases of one size that kernel counts as the fastest with which all of them
    together take least. For sizes that were not measured, priorities decide as before.

    What is found is kept in the cache folder, for this processor or GPU, its number of threads and this torch, and
    used by every process that chooses a kernel of the op from then on: in this one at once, in others that run already
    not. Preferred backends (`use_backend`, `OPKIT_BACKEND`) still go first. It holds while the same kernels are
    registered for the device, with the same code; `explain` says what was measured, or why that is not used.

    Only forward is measured, without autocast. Results are only compared in shape: `opkit.testing.check` does the
    rest. Arguments that an op overwrites are copied, and random state is kept. Nothing tunes by itself, and several
    processes that tune at once disturb each other: tune in one, ahead.

    Args:
        op: an op, or its name.
        cases: tuples of arguments, or pairs (args, kwargs), as for `opkit.prepare`.
        min_run_time: seconds for which each kernel is called with each case, at least.
        forget: forget first what was measured of the op, on every machine that shares the cache folder; without
            cases that is all.

    Returns:
        A report, which prints as a table; `.records` has each kernel's time for each case.

    Raises:
        ArgumentError: there are no cases, or one is no tuple; or `opkit.require`, or torch's setting for
            deterministic algorithms, excludes kernels.
        OpNotFoundError: there is no op of the name.
        FrozenError: the process is frozen, or a CUDA graph is being captured.
        OutputError: two kernels return results of different shapes.
        BuildError: a kernel does not compile, or the cache folder cannot be written. What a call of a case raises is
            raised, too.

    Example:
        >>> import opkit, torch
        >>> @opkit.op("doc::tuned_sum", shapes="n -> ()")
        ... def tuned_sum(x: torch.Tensor) -> torch.Tensor:
        ...     return sum(x.unbind(), torch.zeros(()))
        >>> _ = tuned_sum.register_kernel("cpu", lambda x: x.sum(), backend="fast", priority=-1)
        >>> report = opkit.tune(tuned_sum, [(torch.ones(1000),)], min_run_time=0.01)
        >>> [record.backend for record in report.records if record.chosen]
        ['fast']
        >>> print(tuned_sum.explain(torch.ones(900)))  # doctest: +ELLIPSIS
        doc::tuned_sum on cpu:
          fast       selected   measured ... us (reference ...)  <lambda> ...
          reference  available ...
        >>> opkit.tune(tuned_sum, forget=True).records
        ()
    """
    begun = time.perf_counter()
    op = _cases.resolve(op, "tuning")
    _refuse(op)
    listed = [] if cases is None and forget else _cases.listed(op, cases, "tuning")
    if not listed and not forget:
        raise ArgumentError(
            f"tuning {op.name}: found no cases; expected calls to measure. Write opkit.tune(op, [(x, y)]), or "
            "forget=True to forget what was measured.",
            op=op.name,
        )
    measured.make_room(op.name)
    if forget:
        measured.forget(op.name)
        op._table.measure_anew()
    with _frozen.preparing([]):  # where that only warns, it has
        trials = [_Trial.of(op, case) for case in listed]
        for trial in _watched(trials, op.name):
            trial.run(min_run_time)
    report = Tuning(tuple(_choose(op, trials)), time.perf_counter() - begun)
    for record in report.records:
        _LOG.info(
            "%s: %s: %s takes %s%s",
            record.op, record.arguments, record.backend, measured.shown(record.seconds),
            ", and is chosen" if record.chosen else "",
        )  # fmt: skip
    return report


def _refuse(op: Op[..., Any]) -> None:
    held = _frozen.hold()
    if held is not None:
        when = "before the capture begins" if held.mode == "capture" else "in a process that is not frozen"
        text = (
            f"tuning {op.name}: {held.why}, and every kernel of the op would run and others be chosen afterwards; "
            f"expected a process that may do so. Tune {when}: what is measured is kept for later ones."
        )
        _frozen.refuse(held, text, would="tune", op=op.name)
    required = select.wanted_now().required
    if required:
        said = f"opkit.require({', '.join(map(repr, required))})"
        if torch.are_deterministic_algorithms_enabled():
            said = "torch.use_deterministic_algorithms(True)"
        raise ArgumentError(
            f"tuning {op.name}: {said} is in force and excludes kernels; expected all of them to be measured, as what "
            "is found holds for every call. Tune without it.",
            op=op.name,
        )


def _watched(trials: list[_Trial], name: str) -> Iterable[_Trial]:
    """Show on stderr how far it is, where somebody looks and rich is."""
    if not (_progress.speaks() and sys.stderr.isatty() and importlib.util.find_spec("rich")):
        return trials
    from rich.console import Console
    from rich.progress import track

    return track(trials, description=f"tuning {name}", console=Console(stderr=True), transient=True)


# ---------------------------------------------------------------- one case


@dataclass
class _Trial:
    """A case, and the time that each kernel took for it."""

    op: Op[..., Any]
    values: tuple[Any, ...]  # as the caller gave them
    arguments: str
    device: str
    kind: Kind
    backends: list[str]  # which can take it, as they would be chosen without being measured
    times: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, op: Op[..., Any], case: Case) -> _Trial:
        values = _cases.fill(op, case, "tuning")
        carried = op.schema.fill(*op.schema.carry(*case))
        device = select.device_of(op.schema, carried)
        kind = measured.short(select.first_dtype(carried)), measured.bucket_of(carried)
        backends = []
        _ = op.kernels  # asks plugins for theirs
        for kernel in op._table.for_device(device):
            with use_backend(kernel.backend, strict=True):
                if select.explain(op._table, carried).selected:
                    backends.append(kernel.backend)
        return cls(op, values, frozen.describe(op.schema, values), device, kind, backends)

    def run(self, min_run_time: float) -> None:
        """Time the kernels in turns, so that what else the machine does disturbs all of them alike."""
        devices = sorted({t.get_device() for t in tensors(self.values) if t.is_cuda})
        there = torch.cuda.device(devices[0]) if devices else contextlib.nullcontext()  # the one to wait for
        with there, torch.no_grad(), torch.random.fork_rng(devices=devices), _without_autocast(self.device):
            if not self.backends:
                self._call()()  # raises what is in the way
            self._warm_up()
            numbers = {name: self._number(name) for name in self.backends}
            blocks: dict[str, list[float]] = {name: [] for name in self.backends}
            waiting = list(self.backends)
            while waiting:
                for name in waiting:
                    blocks[name].append(self._time(name, numbers[name]))
                waiting = [
                    name
                    for name in waiting
                    if len(blocks[name]) < _LEAST or sum(blocks[name]) * numbers[name] < min_run_time
                ]
        self.times = {name: statistics.median(blocks[name]) for name in self.backends}

    def _call(self) -> Callable[[], Any]:
        """Return a call of the op with arguments of its own."""
        args, kwargs = self.op.schema.split(_cases.own(self.op, self.values))
        return lambda: self.op(*args, **kwargs)

    def _warm_up(self) -> None:
        """Call each kernel, which builds and loads it, and compare what they return."""
        first: list[tuple[int, ...]] | None = None
        for name in self.backends:
            with use_backend(name, strict=True):
                returned = self._call()()
            shapes = [tuple(t.shape) for t in tensors(self.op.schema.flatten(returned))]
            if first is not None and shapes != first:
                raise OutputError(
                    f"tuning {self.op.name} with {self.arguments}: {name} returned results of the shapes {shapes}; "
                    f"expected {first}, as {self.backends[0]} returned. Find the wrong one with opkit.testing.check.",
                    op=self.op.name,
                )
            first = shapes

    def _number(self, name: str) -> int:
        """Return how many calls of a kernel make a block."""
        number = 1
        while number < 10_000 and (taken := self._time(name, number) * number) < _BLOCK / 2:
            number = min(10 * number, math.ceil(number * _BLOCK / max(taken, 1e-9)))
        return number

    def _time(self, name: str, number: int) -> float:
        """Return the seconds of a call, out of some in a row."""
        with use_backend(name, strict=True):
            return timeit.Timer(self._call(), timer=benchmark.timer).timeit(number) / number


@contextlib.contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


# ---------------------------------------------------------------- all of them


def _choose(op: Op[..., Any], trials: list[_Trial]) -> list[Timing]:
    """Keep what was measured, have calls be chosen by it, and return it."""
    records: list[Timing] = []
    found: dict[str, dict[Kind, Measurement]] = {}
    for device, kind in dict.fromkeys((trial.device, trial.kind) for trial in trials):
        same = [trial for trial in trials if (trial.device, trial.kind) == (device, kind)]
        winner = _fastest(same)
        kernels = {kernel.backend: kernel.identity for kernel in op._table.for_device(device)}
        cases = tuple(trial.arguments for trial in same)
        found.setdefault(device, {})[kind] = Measurement(winner, _typical(same), kernels, cases)
        records += [
            Timing(op.name, trial.arguments, device, *kind, name, seconds, name == winner)
            for trial in same
            for name, seconds in trial.times.items()
        ]
    for device, kinds in found.items():
        measured.keep(op.name, device, kinds)
    op._table.measure_anew()
    return records


def _fastest(same: list[_Trial]) -> str:
    """Return the backend with which the cases of one size take least, as those that it cannot take go by priority."""
    names = dict.fromkeys(name for trial in same for name in trial.backends)

    def cost(name: str) -> float:
        return sum(t.times[name if name in t.times else t.backends[0]] for t in same)

    return min(names, key=cost)


def _typical(same: list[_Trial]) -> dict[str, float]:
    """Return the time of each kernel over the cases of one size that it can take."""
    names = dict.fromkeys(name for trial in same for name in trial.backends)
    return {name: statistics.fmean(t.times[name] for t in same if name in t.times) for name in names}
