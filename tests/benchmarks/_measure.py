"""Side-by-side timing: every candidate in one process, in turns, medians and ratios to the first."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import timeit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

_console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
REPEATS = 15
FOLDER = Path(__file__).parents[2] / "build" / "benchmarks"

Run = Callable[[int], float]
"""Runs what is measured a number of times and returns the seconds that all of them took."""


def machine() -> str:
    """Say what was measured on."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def calling(call: Callable[[], object]) -> Run:
    return timeit.Timer(call).timeit


def running(statement: str, names: Mapping[str, Any]) -> Run:
    """Time a statement as it stands in a user's code: no lambda around it, which would count too."""
    return timeit.Timer(statement, globals=dict(names)).timeit


def _number(run: Run, at_least: float) -> int:
    """Return how often to run for `at_least` seconds, whatever else the machine does meanwhile."""
    number = 1
    while (passed := min(run(number) for _ in range(3))) < at_least:
        number *= 2 if passed < at_least / 4 else int(at_least / passed) + 1
    return number


def rounds(
    candidates: Mapping[str, Run], *, repeats: int = REPEATS, at_least: float = 0.01
) -> dict[str, list[float]]:
    """Return the seconds of each candidate in each round.

    They take turns, so that noise hits all alike, and every other round goes backwards, so that none always
    runs after the same one.
    """
    numbers = {name: _number(run, at_least) for name, run in candidates.items()}
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats):
        for name in list(candidates)[:: -1 if turn % 2 else 1]:
            found[name].append(candidates[name](numbers[name]) / numbers[name])
    return found


def ratio(found: Mapping[str, Sequence[float]], name: str, to: str) -> float:
    """Return how many times as long `name` takes as `to`: the median of what each round says."""
    return statistics.median(a / b for a, b in zip(found[name], found[to], strict=True))


def medians(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each candidate."""
    found = rounds({name: calling(call) for name, call in candidates.items()})
    return {name: statistics.median(times) for name, times in found.items()}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "") -> None:
    """Print a table of texts, the numbers aligned."""
    shown = Table(title=title, caption=note + machine(), min_width=72)
    for column in header:
        shown.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for row in rows:
        shown.add_row(*row)
    _console.print(shown)


def report(
    title: str, rows: Mapping[str, Mapping[str, float]], *, unit: float = 1e6, name: str = "us"
) -> None:
    """Print a table: the first column in `name`, the others as ratios to it."""
    columns = list(next(iter(rows.values())))
    texts = [
        (
            row,
            f"{times[columns[0]] * unit:.2f}",
            *(f"{times[c] / times[columns[0]]:.2f}x" for c in columns[1:]),
        )
        for row, times in rows.items()
    ]
    header = ("", f"{columns[0]}, {name}", *columns[1:])
    table(title, header, texts, note="ratios to the first column; ")


def save(name: str, content: Mapping[str, Any]) -> None:
    """Write what was measured beside the printed tables: one file for each benchmark and torch."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}-torch-{torch.__version__.partition('+')[0]}.json"
    about = {"machine": machine(), "python": platform.python_version(), "torch": torch.__version__}
    path.write_text(json.dumps({**about, **content}, indent=1) + "\n")
    print(f"also as {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
