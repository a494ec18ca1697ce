"""How commands print what they found: a table where somebody looks, plain lines in pipes, JSON for programs.

Tables are rich's, which is an extra: without it a terminal gets the plain lines.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 80
_GAP = "  "


def console() -> Console | None:
    """Return where to print tables, or None where nobody looks or rich is not installed."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    return Console(highlight=False)


def table(*columns: str, **options: Any) -> Table:
    """Return an empty table of rich."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", **options)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def lines(rows: Iterable[Sequence[str]], *, width: int | None = None) -> Iterator[str]:
    """Yield rows as text, in columns; the last one is wrapped where there is a width."""
    listed = list(rows)
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)][:-1]
    indent = sum(widths) + len(_GAP) * len(widths)
    for row in listed:
        cells = [cell.ljust(length) for cell, length in zip(row, widths, strict=False)]
        parts = wrapped(row[-1], width - indent) if width else [row[-1]]
        yield _GAP.join([*cells, *parts[:1]]).rstrip()
        yield from (" " * indent + part for part in parts[1:])


def wrapped(text: str, width: int) -> list[str]:
    """Return a text in lines; what is longer than one, such as a path, is left whole."""
    return [
        line
        for part in text.splitlines() or [""]
        for line in textwrap.wrap(part, width, break_long_words=False, break_on_hyphens=False) or [""]
    ]


def terminal_width() -> int | None:
    """Return the width to wrap at, or None in a pipe, where a line is a record."""
    return shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else None


def print_json(content: Any) -> None:
    """Print for a program."""
    print(json.dumps(content, indent=2))
