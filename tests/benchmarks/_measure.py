"""Side-by-side timing: every candidate in one process, in turns, medians and ratios to the first."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

_console = Console(highlight=False)
REPEATS = 15


def machine() -> str:
    """Say what was measured on."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def seconds(call: Callable[[], object], *, at_least: float = 0.01) -> float:
    """Time one call, repeated until it takes `at_least` seconds."""
    number = 1
    while True:
        start = time.perf_counter()
        for _ in range(number):
            call()
        passed = time.perf_counter() - start
        if passed >= at_least:
            return passed / number
        number *= 2 if passed < at_least / 4 else int(at_least / passed) + 1


def medians(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each candidate; they take turns, so that noise hits all alike."""
    for call in candidates.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(REPEATS):
        for name, call in candidates.items():
            found[name].append(seconds(call))
    return {name: statistics.median(times) for name, times in found.items()}


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of texts, the numbers aligned."""
    shown = Table(title=title, caption=machine(), min_width=72)
    for column in header:
        shown.add_column(column, justify="right" if column else "left")
    for row in rows:
        shown.add_row(*row)
    _console.print(shown)


def report(
    title: str, rows: Mapping[str, Mapping[str, float]], *, unit: float = 1e6, name: str = "us"
) -> None:
    """Print a table: the first column in `name`, the others as ratios to it."""
    columns = list(next(iter(rows.values())))
    table = Table(title=title, caption=f"ratios to the first column; {machine()}", min_width=72)
    table.add_column("")
    table.add_column(f"{columns[0]}, {name}", justify="right")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row, times in rows.items():
        first = times[columns[0]]
        table.add_row(row, f"{first * unit:.2f}", *(f"{times[c] / first:.2f}x" for c in columns[1:]))
    _console.print(table)
