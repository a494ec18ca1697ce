"""What a reader sees on stderr while it is measured: a bar on a terminal with rich, a line for each call elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

from opkit.cpp import _progress

Say = Callable[[str], None]
"""Takes what is measured next."""


@contextlib.contextmanager
def shown(op: str, steps: int, *, wanted: bool) -> Iterator[Say]:
    """Yield a function to be called before each of so many steps."""
    if not wanted or not _progress.speaks():
        yield lambda text: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and importlib.util.find_spec("rich"):
        with _bar(op, steps) as say:
            yield say
    else:
        yield _lines(op, steps)


@contextlib.contextmanager
def _bar(op: str, steps: int) -> Iterator[Say]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(op, total=steps, now="")
        begun = [0]

        def say(text: str) -> None:
            bar.update(task, completed=begun[0], now=text)
            begun[0] += 1

        yield say


def _lines(op: str, steps: int) -> Say:
    begun = [0]

    def say(text: str) -> None:
        begun[0] += 1
        _progress.say(f"opkit: measuring {op} [{begun[0]}/{steps}] {text}")

    return say
