"""What is slower than in an earlier report, by more than noise.

A row counts as slower where the median of its rounds says so, and the fastest of them, which what else ran on the
machine disturbed least; and, so that a machine that is slower today accuses no kernel, its time relative to the copy
that took turns with it. Noise is what the rounds of both reports say of their medians, and in no case less than
`FLOOR`: two runs of one program differ by that.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from opkit.bench import machine
from opkit.bench.candidates import COPY
from opkit.bench.report import Report, Row, ratios
from opkit.dispatch import measured
from opkit.errors import ArgumentError

FLOOR = 0.10
_SIGMAS = 4
_UNSURE = 0.5  # noise from which on nothing is said: rounds that differ so much were disturbed, and not by chance alone


class Change(NamedTuple):
    """One row, then and now. `ratio` is the time now to that of then, and `noise` how far from 1 says nothing."""

    where: str
    name: str
    status: str  # slower, faster, same, unsure, wrong, gone
    before: float
    now: float | None = None
    ratio: float | None = None
    noise: float = FLOOR
    reason: str = ""

    def __str__(self) -> str:
        what = f"{self.name} at {self.where}"
        if self.now is None:
            return f"{self.status}: {what}: {self.reason}"
        before, now = measured.shown(self.before), measured.shown(self.now)
        return (
            f"{self.status}: {what}: {before} before, {now} now, {self.ratio:.2f}x (noise {self.noise:.0%})"
        )


@dataclass(frozen=True)
class Regression:
    """Every row that both reports have, or only the earlier one. Prints what changed."""

    op: str
    changes: tuple[Change, ...]

    @property
    def slower(self) -> tuple[Change, ...]:
        """What is slower, and what was timed then and is wrong, failing or not there now."""
        return tuple(c for c in self.changes if c.status in ("slower", "wrong", "gone"))

    @property
    def faster(self) -> tuple[Change, ...]:
        """What is faster."""
        return tuple(c for c in self.changes if c.status == "faster")

    @property
    def ok(self) -> bool:
        """Whether nothing is slower."""
        return not self.slower

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON has."""
        return {"ok": self.ok, "changes": [change._asdict() for change in self.changes]}

    def __str__(self) -> str:
        unsure = sum(change.status == "unsure" for change in self.changes)
        same = len(self.changes) - len(self.slower) - len(self.faster) - unsure
        head = f"{self.op} against the baseline: {len(self.slower)} slower, {len(self.faster)} faster, {same} the same"
        if unsure:
            head += f", {unsure} too disturbed to say: measure again when the machine is idle"
        return "\n  ".join([head, *map(str, (*self.slower, *self.faster))])


def between(before: Report, now: Report) -> Regression:
    """Return what changed from one report to another.

    Raises:
        ArgumentError: they are of different ops or machines, or have no row in common.
    """
    _check(before, now)
    there = {(row.call, row.name): row for row in now.rows}
    changes = tuple(
        _change(before, now, row, there.get((row.call, row.name)))
        for row in before.rows
        if row.times and row.kind != "limit" and _is_asked(now, row)
    )
    if not changes:
        raise ArgumentError(
            f"comparing {now.op} with a baseline: they have no call in common; expected the same sizes, dtypes and "
            "caches. Measure with those of the baseline, or write a new one with report.save.",
            op=now.op,
        )
    return Regression(now.op, changes)


def _check(before: Report, now: Report) -> None:
    if before.op != now.op:
        raise ArgumentError(
            f"comparing {now.op} with a baseline: that is of {before.op}; expected one of the same op. Name another "
            "file.",
            op=now.op,
        )
    other = [
        f"{name} {before.machine.get(name)!r} there and {now.machine.get(name)!r} here"
        for name in machine.MUST_AGREE
        if before.machine.get(name) != now.machine.get(name)
    ]
    if other:
        raise ArgumentError(
            f"comparing {now.op} with a baseline: it was measured on another machine, {', '.join(other)}; expected "
            "the same. Write a baseline of this one with report.save.",
            op=now.op,
        )


def _is_asked(now: Report, row: Row) -> bool:
    """Whether the later report is about that row at all: it may be about fewer sizes, backends and peers."""
    if not any(other.call == row.call for other in now.rows):
        return False
    everything = row.kind == "backend" and not now.settings.get("backends")
    return everything or any(other.name == row.name for other in now.rows)


def _change(before: Report, now: Report, then: Row, row: Row | None) -> Change:
    old = then.seconds or math.nan
    if row is None:
        return Change(then.where, then.name, "gone", old, reason="it is no candidate any more")
    if not row.times:
        status = "gone" if row.status == "rejected" else "wrong"
        return Change(then.where, then.name, status, old, reason=row.reason)
    new = row.seconds or math.nan
    noise = max(FLOOR, _SIGMAS * math.hypot(then.doubt, row.doubt))
    seen = [new / old, min(row.times) / min(then.times)]
    copies = before._beside(then, COPY), now._beside(row, COPY)
    if all(copy is not None and copy.times for copy in copies):
        left, right = (
            statistics.median(ratios(one.times, copy.times))  # type: ignore[union-attr]
            for one, copy in zip((then, row), copies, strict=True)
        )
        seen.append(right / left)
    if noise > _UNSURE:
        status = "unsure"
    elif all(s > 1 + noise for s in seen):
        status = "slower"
    elif all(s < 1 / (1 + noise) for s in seen):
        status = "faster"
    else:
        status = "same"
    return Change(then.where, then.name, status, old, new, new / old, noise)
