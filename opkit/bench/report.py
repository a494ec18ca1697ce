"""What `compare` found, as values: one row for each candidate, call, direction and state of the caches."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils import benchmark

from opkit.bench.candidates import COPY
from opkit.errors import ArgumentError

if TYPE_CHECKING:
    from opkit.bench.regression import Regression

FORMAT = 1
FORWARD, TRAINING = "forward", "forward + backward"
REFERENCE = "reference"


@dataclass(frozen=True)
class Row:
    """One candidate at one call.

    Attributes:
        sizes: of the call, as `over=` has them.
        dtype: of the first tensor.
        direction: `forward`, or `forward + backward`.
        caches: `warm` or `cold`.
        name: the backend, the peer, or `copy` for the limit.
        kind: `backend`, `peer` or `limit`.
        status: `timed`, `wrong`, `failed`, or `rejected` where a backend cannot take the call.
        reason: why it was not timed; of one that was timed, why its results could not be compared.
        times: seconds of a call, one for each round; row by row those of one call belong together.
        number: calls in a row that were timed for each.
        bytes: that the call must read and write, None where nothing says it.
        flops: floating-point operations of the call, None where nothing says it.
        peak: floating-point operations a second of a product of matrices in this dtype, where `flops` is known.
    """

    sizes: Mapping[str, Any]
    dtype: str
    direction: str
    caches: str
    name: str
    kind: str
    status: str
    reason: str = ""
    times: tuple[float, ...] = ()
    number: int = 0
    bytes: int | None = None
    flops: float | None = None
    peak: float | None = None

    @property
    def seconds(self) -> float | None:
        """The median of the times, None where it was not timed."""
        return statistics.median(self.times) if self.times else None

    @property
    def doubt(self) -> float:
        """How far the median may be off, as a part of it: one standard deviation, by how the rounds differ."""
        if len(self.times) < 3:
            return 0.0
        first, middle, third = statistics.quantiles(self.times, n=4)
        return 1.2533 * (third - first) / 1.349 / math.sqrt(len(self.times)) / middle

    @property
    def bandwidth(self) -> float | None:
        """Bytes that the call must move, by the second."""
        return self.bytes / self.seconds if self.bytes and self.seconds else None

    @property
    def throughput(self) -> float | None:
        """Floating-point operations by the second."""
        return self.flops / self.seconds if self.flops and self.seconds else None

    @property
    def group(self) -> tuple[str, str]:
        """What a table is about: dtype and direction."""
        return self.dtype, self.direction

    @property
    def call(self) -> tuple[Any, ...]:
        """What rows have in common that were timed in turns."""
        return tuple(sorted(self.sizes.items())), self.dtype, self.direction, self.caches

    @property
    def where(self) -> str:
        """The call as text: `n=256, float32, forward, warm`."""
        sizes = [f"{name}={value}" for name, value in self.sizes.items()]
        return ", ".join([*sizes, self.dtype, self.direction, self.caches])


@dataclass(frozen=True, repr=False)
class Report:
    """All that was measured. Prints as tables, and is shown as such in a notebook.

    Attributes:
        op: the name of the op.
        machine: what it was measured on: processor, threads, versions.
        settings: how it was measured.
        rows: one for each candidate, call, direction and state of the caches.
        regression: the comparison with `baseline=`, if one was given.
    """

    op: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    regression: Regression | None = None

    @property
    def wrong(self) -> tuple[Row, ...]:
        """The rows of candidates that give wrong results or fail, one for each call and direction."""
        found = {(r.call[:3], r.name): r for r in reversed(self.rows) if r.status in ("wrong", "failed")}
        return tuple(reversed(found.values()))

    @property
    def ok(self) -> bool:
        """Whether no candidate is wrong, and none slower than the baseline."""
        return not self.wrong and (self.regression is None or self.regression.ok)

    def find(self, **wanted: Any) -> tuple[Row, ...]:
        """Return the rows with these values of their attributes, or of sizes.

        Example:
            `report.find(name="cpp", caches="warm", n=256)`
        """

        def has(row: Row, name: str, value: Any) -> bool:
            return bool((row.sizes[name] if name in row.sizes else getattr(row, name, None)) == value)

        return tuple(row for row in self.rows if all(has(row, n, v) for n, v in wanted.items()))

    @property
    def standard(self) -> str:
        """The candidate that speed-ups are relative to: the reference, or the first one that was timed."""
        names = [row.name for row in self.rows if row.times and row.kind != "limit"]
        return REFERENCE if REFERENCE in names or not names else names[0]

    def speedup(self, row: Row, to: str | None = None) -> float | None:
        """Return how many times as fast a row is as the candidate `to` in the same call: the median of all rounds."""
        return _ratio(self._beside(row, to or self.standard), row)

    def of_limit(self, row: Row) -> float | None:
        """Return the part of the machine's measured limit that a row reaches.

        The limit is a copy of as many bytes, in turns with the candidates; of an op with `flops=`, the product of
        matrices if that leaves it more time.
        """
        part = _ratio(self._beside(row, COPY), row)
        if row.throughput is not None and row.peak:
            part = max(part or 0.0, row.throughput / row.peak)
        return part

    def _beside(self, row: Row, name: str) -> Row | None:
        return next((r for r in self.rows if r.name == name and r.call == row.call), None)

    # ---------------------------------------------------------------- as text and pictures

    def __repr__(self) -> str:
        return f"<opkit.bench.Report of {self.op}: {len(self.rows)} rows, {'ok' if self.ok else 'not ok'}>"

    def __str__(self) -> str:
        from opkit.bench import tables

        return tables.plain(self)

    def __rich__(self) -> Any:
        from opkit.bench import tables

        return tables.rich(self)

    def _repr_html_(self) -> str:
        from opkit.bench import tables

        return tables.html(self)

    def to_markdown(self) -> str:
        """Return the tables as Markdown."""
        from opkit.bench import tables

        return tables.markdown(self)

    def plot(self, path: str | os.PathLike[str], *, theme: str = "light") -> Path:
        """Draw what was measured, over the sizes, and return the path of the picture.

        Where bytes are known, it shows how many the op must move a second, beside the copy that is the limit;
        elsewhere times. One size alone is drawn as bars.

        Args:
            path: of the picture; its suffix says the format: `.svg`, `.png`, `.pdf`.
            theme: `light` or `dark`.

        Raises:
            OpkitError: matplotlib is not installed, or cannot write that format.
            ArgumentError: nothing was timed, or there is no such theme.
        """
        from opkit.bench import plots

        return plots.draw(self, Path(path), theme)

    # ---------------------------------------------------------------- to keep, and to compare with

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON has."""
        return {
            "format": FORMAT,
            "op": self.op,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "rows": [{**asdict(row), "times": list(row.times), "seconds": row.seconds} for row in self.rows],
            **({} if self.regression is None else {"regression": self.regression.to_dict()}),
        }

    def to_json(self) -> str:
        """Return all of it as JSON, which `opkit.bench.load` reads."""
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON, and return the path."""
        path = Path(path)
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    def compare_to(self, baseline: Report | str | os.PathLike[str]) -> Regression:
        """Return what is slower or faster than in an earlier report, by more than noise.

        Args:
            baseline: a report, or the path of a saved one.

        Raises:
            ArgumentError: it is of another op or machine, or no report.
        """
        from opkit.bench import regression

        return regression.between(load(baseline), self)

    def measurements(self) -> list[benchmark.Measurement]:
        """Return the rows as torch's own, for `torch.utils.benchmark.Compare`."""
        threads = int(self.machine.get("threads", 1))
        return [
            benchmark.Measurement(
                1,
                list(row.times),
                benchmark.TaskSpec(
                    stmt=self.op,
                    setup="",
                    label=f"{self.op}, {row.direction}, {row.caches}",
                    sub_label=", ".join([*(f"{n}={v}" for n, v in row.sizes.items()), row.dtype]),
                    description=row.name,
                    num_threads=threads,
                ),
            )
            for row in self.rows
            if row.times
        ]


def load(source: Report | str | os.PathLike[str]) -> Report:
    """Return a report that was saved.

    Args:
        source: a path; a report is returned as it is.

    Raises:
        ArgumentError: there is no such file, or it is no report.
    """
    if isinstance(source, Report):
        return source
    try:
        return parsed(json.loads(Path(source).read_text(encoding="utf-8")))
    except OSError as error:
        raise ArgumentError(
            f"reading the report {os.fspath(source)}: {error.strerror}; expected a file that report.save or opkit "
            "bench --save wrote. Write one first."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"reading the report {os.fspath(source)}: it is none ({type(error).__name__}: {error}); expected what "
            "report.save or opkit bench --save wrote. Write it again."
        ) from None


def parsed(content: Mapping[str, Any]) -> Report:
    """Return what `to_dict` gave; raises what `load` expects where it is something else."""
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, this opkit reads {FORMAT}")
    names = {field.name for field in fields(Row)}
    rows = []
    for row in content["rows"]:
        given = {name: value for name, value in row.items() if name in names}
        rows.append(Row(**{**given, "times": tuple(map(float, row["times"]))}))
    rounds: dict[Any, int] = {}
    for one in (row for row in rows if row.times):
        if not all(0 < time < math.inf for time in one.times):
            raise ValueError(f"{one.name} at {one.where} has the times {one.times}")
        if rounds.setdefault(one.call, len(one.times)) != len(one.times):
            raise ValueError(f"{one.name} at {one.where} has not as many rounds as the others")
    return Report(str(content["op"]), dict(content["machine"]), dict(content["settings"]), tuple(rows))


def ratios(left: Iterable[float], right: Iterable[float]) -> list[float]:
    """Return what each round says of two candidates that took turns."""
    return [a / b for a, b in zip(left, right, strict=True)]


def _ratio(slow: Row | None, fast: Row) -> float | None:
    """Return how many times as long `slow` took; medians of rounds."""
    if slow is None or not slow.times or not fast.times:
        return None
    return statistics.median(ratios(slow.times, fast.times))


def sizes_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of sizes, in order."""
    return list(dict.fromkeys(name for row in rows for name in row.sizes))
