"""`compare`: every backend of an op beside its peers, first held to the reference, then timed in turns."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from opkit import _cases
from opkit._op import Op
from opkit.bench import caches as cache
from opkit.bench import candidates, derived, machine, progress, timing, work
from opkit.bench.candidates import COPY, Candidate
from opkit.bench.report import FORWARD, TRAINING, Report, Row, load
from opkit.bench.sweep import Call, Sweep
from opkit.bench.timing import Contestant, Timed
from opkit.bench.trial import Trial
from opkit.errors import ArgumentError
from opkit.spec.schema import tensors
from opkit.testing.arguments import FLOATING, mapped
from opkit.transforms.formula import NoFormula, differentiable_arguments

CACHES = ("warm", "cold")


def compare(
    op: Op[..., Any] | str,
    case: Callable[..., Any] | None = None,
    *,
    over: Mapping[str, Sequence[Any]] | None = None,
    dtypes: Sequence[torch.dtype | str] | None = None,
    backends: Sequence[str] | None = None,
    against: Mapping[str, Callable[..., Any]] | None = None,
    compiled: bool = False,
    backward: bool | None = None,
    caches: Sequence[str] | None = None,
    device: str | None = None,
    min_run_time: float = 0.1,
    rounds: int = 9,
    baseline: Report | str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Report:
    """Measure the backends of an op, and its peers, for calls of several sizes and dtypes.

    Before anything is timed, every candidate's results, and gradients, are compared with those of the reference in
    float64, to the tolerance of `opkit.testing.check`; what is wrong is shown as wrong and not timed. Then all that are
    right take turns, forwards and backwards through the list, and so does a copy of as many bytes as the call must
    read and write, which is the machine's limit for it. Ratios are medians of what each round says.

    - Warm: calls in a row, whose arguments stay in the caches where they fit. Cold: one call after the caches were
      emptied.
    - `forward` runs without gradients. `forward + backward` is a call and the gradients of its floating arguments, or
      of those that the case marks with `requires_grad`; it is there where the op has a formula.
    - Bytes are those of the arguments and results, each tensor once; for a gradient, where another op is the formula,
      also those of that call. FLOPs are known where the op has `flops=`.

    The copy writes into memory that is there. Where an op returns much, new memory costs it time that no kernel saves.

    Argument tensors are the same for all candidates; those that the op overwrites are copied for each block of calls.
    Autocast is off. Where a peer may be a compiled function, `torch.compiler.reset` is called before each call, so that
    it is compiled for that alone.

    Args:
        op: an op, or its name.
        case: a function of sizes that returns `(args, kwargs)`, or a tuple of arguments. If it has an argument `dtype`
            or `device`, it is given them; else floating arguments are cast where the shape line lets them, and moved.
            Default: calls made from the shape line, whose names are then those of sizes, or of `register_samples`.
        over: values by the names of the case's arguments: every combination is measured. Without a case some sizes
            are chosen, from the first cache to memory.
        dtypes: such as `torch.bfloat16` or `"bfloat16"`. Default: what the case makes, in float32 if it is asked.
        backends: only these. Default: all that are registered.
        against: other functions of the same arguments, by name. One may return only the first of several results.
        compiled: whether `torch.compile` of the reference is a peer, too.
        backward: whether to measure gradients. Default: if the op has a formula and floating arguments.
        caches: `warm`, `cold` or both, which is the default where opkit can empty the caches: on CPU and CUDA.
        device: for the case, such as `cuda`. Default: the CPU.
        min_run_time: seconds for which each candidate is called with each call, at least, with warm caches.
        rounds: how often each takes its turn; fewer, but three, where one call takes long.
        baseline: a report, or the path of a saved one; the regression from it is in the report.
        progress: whether to say on stderr what is being measured.

    Returns:
        The report. It prints as tables; `.plot(path)` draws it, `.save(path)` keeps it, `.ok` says whether nothing is
        wrong or slower.

    Raises:
        ArgumentError: the case needs sizes that `over` does not have, or returns no call; or a dtype, a backend or a
            peer is none.
        ShapeError: a call does not fit the shape line.
        OpNotFoundError: there is no op of the name.

    Example:
        >>> import opkit, torch
        >>> @opkit.op("doc::cubed", shapes="n -> n")
        ... def cubed(x: torch.Tensor) -> torch.Tensor:
        ...     return x**3
        >>> _ = cubed.register_kernel("cpu", lambda x: x * x * x, backend="fast")
        >>> _ = cubed.register_kernel("cpu", lambda x: x * x, backend="broken", priority=-1)
        >>> def case(n):
        ...     return (torch.randn(n),), {}
        >>> report = opkit.bench.compare(cubed, case, over={"n": [8, 64]}, caches=["warm"], min_run_time=0.01)
        >>> [(row.name, row.status) for row in report.find(n=64)]
        [('fast', 'timed'), ('broken', 'wrong'), ('reference', 'timed'), ('copy', 'timed')]
        >>> report.ok
        False
    """
    op = _cases.resolve(op, "benchmarking")
    then = None if baseline is None else load(baseline)
    if case is None:
        case, over = derived.case_of(op, over, device)
    sweep = Sweep(op, case, over, dtypes, device)
    known = candidates.all_of(op, backends, against, compiled=compiled)
    run = _Run(
        op=op,
        known=known,
        backends=None if backends is None else [one.name for one in known if one.backend is not None],
        backward=backward,
        caches=_caches(op, caches),
        is_default=caches is None,
        rounds=_at_least(op, "rounds", rounds, timing.LEAST),
        min_run_time=_at_least(op, "min_run_time", min_run_time, 0.0),
        resets=compiled or bool(against),
    )
    report = run.report(sweep, wanted=progress)
    if then is None:
        return report
    from opkit.bench import regression

    return Report(report.op, report.machine, report.settings, report.rows, regression.between(then, report))


def _caches(op: Op[..., Any], caches: Any) -> tuple[str, ...]:
    if caches is None:
        return CACHES
    found = (caches,) if isinstance(caches, str) else tuple(caches)
    if not found or not set(found) <= set(CACHES):
        raise ArgumentError(
            f"benchmarking {op.name}: caches= is {caches!r}; expected some of {', '.join(CACHES)}. Write "
            'caches=["warm"].',
            op=op.name,
        )
    return tuple(name for name in CACHES if name in found)


def _at_least(op: Op[..., Any], name: str, value: Any, least: int | float) -> Any:
    """Return a number that is as large as `least`, and whole where that is."""
    kinds = int if isinstance(least, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value < least:
        raise ArgumentError(
            f"benchmarking {op.name}: {name}= is {value!r}; expected a {'whole ' if kinds is int else ''}number from "
            f"{least:g}. Write {name}={max(least, 0.1):g}.",
            op=op.name,
        )
    return value


@dataclass
class _Run:
    """What is asked of all calls."""

    op: Op[..., Any]
    known: list[Candidate]
    backends: list[str] | None  # as somebody named them
    backward: bool | None
    caches: tuple[str, ...]
    is_default: bool  # caches as nobody said otherwise
    rounds: int
    min_run_time: float
    resets: bool
    rows: list[Row] = field(default_factory=list)

    def report(self, sweep: Sweep, *, wanted: bool) -> Report:
        device = "cpu"
        machine.settle()
        with progress.shown(self.op.name, len(sweep), wanted=wanted) as say:
            before, self.op._table.quiet = self.op._table.quiet, True  # the reference is meant to run here
            try:
                for call in sweep:
                    device = call.device
                    say(", ".join([*(f"{n}={v}" for n, v in call.sizes.items()), call.dtype]))
                    self._measure(call)
            finally:
                self.op._table.quiet = before
                self.op._table.reconsider()
        settings: dict[str, Any] = {
            "over": sweep.over,
            "rounds": self.rounds,
            "min_run_time": self.min_run_time,
            "caches": list(self._caches_on(device)),
            "backends": self.backends,
        }
        if "cold" in settings["caches"]:
            flush = self._flush(device)
            settings.update(flushed=flush.size, cache=flush.cache)
        return Report(self.op.name, machine.described(device), settings, tuple(self.rows))

    def _caches_on(self, device: str) -> tuple[str, ...]:
        if "cold" not in self.caches or cache.can_flush(device):
            return self.caches
        if self.is_default:
            return tuple(name for name in self.caches if name != "cold")
        raise ArgumentError(
            f"benchmarking {self.op.name}: caches= has cold, and opkit does not know how to empty those of {device}; "
            "expected the device cpu or cuda. Write caches=['warm'].",
            op=self.op.name,
        )

    @functools.cached_property
    def _flushes(self) -> dict[str, cache.Flush]:
        return {}

    def _flush(self, device: str) -> cache.Flush:
        if device not in self._flushes:
            self._flushes[device] = cache.Flush(device)
        return self._flushes[device]

    def _measure(self, call: Call) -> None:
        """Verify all candidates for a call, and time those that are right."""
        if self.resets and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # a size is compiled for itself, and no limit of recompilations is reached
        devices = sorted({t.get_device() for t in tensors(call.values) if t.is_cuda})
        caches = self._caches_on(call.device)
        with contextlib.ExitStack() as stack:
            if devices:
                stack.enter_context(torch.cuda.device(devices[0]))
            stack.enter_context(torch.random.fork_rng(devices=devices))
            if torch.is_autocast_enabled(call.device):
                stack.enter_context(torch.autocast(call.device, enabled=False))
            trial = Trial(self.op, call, self.known, self._leaves(call))
            for direction in (FORWARD, TRAINING) if trial.leaves else (FORWARD,):
                trial.verify(direction)
                for state in caches:
                    self.rows += self._rows(trial, direction, state)

    def _leaves(self, call: Call) -> frozenset[str]:
        """Return the names of arguments whose gradients are measured; none where they are not."""
        op = self.op
        has_formula = not isinstance(op._formula, NoFormula)
        if self.backward and not has_formula:
            raise ArgumentError(
                f"benchmarking {op.name}: backward=True, and the op has no gradient formula; expected one. Register it "
                "with register_autograd, or leave backward= out.",
                op=op.name,
            )
        if self.backward is False or not has_formula:
            return frozenset()
        params = differentiable_arguments(op.schema, op._meta.plan, op._formula.non_differentiable)
        able = {p.name for p in params}
        floats: dict[str, bool] = {}

        def note(name: str, tensor: torch.Tensor) -> None:
            if name.split("[")[0] in able and (tensor.dtype in FLOATING or tensor.is_complex()):
                floats[name] = tensor.requires_grad

        mapped(op, call.values, note)
        marked = frozenset(name for name, is_marked in floats.items() if is_marked)
        if self.backward and not floats:
            raise ArgumentError(
                f"benchmarking {op.name}: backward=True, and no argument of the case is floating; expected one that "
                "has a gradient. Pass one, or leave backward= out.",
                op=op.name,
            )
        return marked or frozenset(floats)

    def _rows(self, trial: Trial, direction: str, state: str) -> Iterator[Row]:
        call, load = trial.call, trial.work[direction]
        contestants = trial.contestants(direction)
        if load.bytes is not None and contestants:
            copy = work.copying(load.bytes, call.device)
            contestants[COPY] = Contestant(lambda: copy, contextlib.nullcontext)
        timed: dict[str, Timed] = {}
        peak = self._peak(call) if load.flops and contestants else None
        with torch.no_grad() if direction == FORWARD else torch.enable_grad():
            if state == "warm":
                timed = timing.warm(contestants, rounds=self.rounds, min_run_time=self.min_run_time)
            elif contestants:
                timed = timing.cold(
                    contestants, self._flush(call.device), rounds=self.rounds, min_run_time=self.min_run_time
                )
        row = functools.partial(Row, call.sizes, call.dtype, direction, state)
        for name, kind, status, why in trial.outcomes():
            if name not in timed:
                yield row(name, kind, status, why)
            else:
                times, number = timed[name]
                yield row(name, kind, status, why, times, number, load.bytes, load.flops, peak)
        if COPY in timed:
            yield row(COPY, "limit", "timed", "", *timed[COPY], load.bytes, load.flops)

    def _peak(self, call: Call) -> float | None:
        """Return the floating-point operations a second of a product of matrices, measured once for each dtype."""
        key = call.dtype, call.device
        if key not in self._peaks:
            try:
                multiply, flops = work.multiplying(getattr(torch, call.dtype), call.device)
                one = {"product": Contestant(lambda: multiply, torch.no_grad)}
                timed = timing.warm(one, rounds=timing.LEAST, min_run_time=self.min_run_time)
                self._peaks[key] = flops / min(timed["product"].times)
            except (RuntimeError, TypeError):  # torch multiplies no matrices of that dtype
                self._peaks[key] = None
        return self._peaks[key]

    @functools.cached_property
    def _peaks(self) -> dict[tuple[str, str], float | None]:
        return {}
