"""A report as tables: for a terminal with rich, as plain text of 80 columns, as Markdown and as HTML.

One table for each dtype and direction, one row for each size and candidate, warm and cold caches side by side.
"""

from __future__ import annotations

import html as escaping
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from opkit.bench import machine
from opkit.bench.report import Report, Row, sizes_of
from opkit.dispatch import measured

if TYPE_CHECKING:
    from rich.console import Group

WIDTH = 80
_GAP = "  "
_WORST = ("wrong", "failed")
_NONE = "-"
_UNSURE = 0.1  # doubt that a reader should know of


class Line(NamedTuple):
    """One row of a table. `style` is `best`, `wrong`, `limit` or empty; `first` whether a new call begins."""

    cells: tuple[str, ...]
    style: str
    first: bool


class Table(NamedTuple):
    """What is shown of one dtype and direction; the first `left` columns are texts, the others numbers."""

    title: str
    header: tuple[str, ...]
    lines: tuple[Line, ...]
    left: int


def tables(report: Report) -> Iterator[Table]:
    """Yield the tables of a report."""
    for dtype, direction in dict.fromkeys(row.group for row in report.rows):
        rows = [row for row in report.rows if row.group == (dtype, direction)]
        shown = [row for row in rows if row.status != "rejected"]
        states = list(dict.fromkeys(row.caches for row in rows))
        sizes = sizes_of(rows)
        columns = _columns(report, rows)
        header = (*sizes, "candidate", *(text for state in states for text in (state, *columns)))
        lines: list[Line] = []
        for call in dict.fromkeys(tuple(row.sizes.items()) for row in shown):
            own = [row for row in shown if tuple(row.sizes.items()) == call]
            best = _best(own)
            for name in dict.fromkeys(row.name for row in own):
                first = not lines or name == own[0].name
                cells = [str(value) if first else "" for _, value in call]
                parts = {row.caches: row for row in own if row.name == name}
                one = next(iter(parts.values()))
                style = "best" if name == best else "limit" if one.kind == "limit" else ""
                style = "wrong" if one.status in _WORST else style
                numbers = [text for state in states for text in _numbers(report, parts.get(state), columns)]
                lines.append(Line((*cells, name, *numbers), style, first))
        yield Table(f"{dtype}, {direction}", header, tuple(lines), len(sizes) + 1)


def notes(report: Report) -> Iterator[tuple[str, str]]:
    """Yield what stands below the tables, with its style."""
    standard = report.standard
    legend = f"faster: how many times as fast as {standard}, the median of rounds in turns."
    if any(row.kind == "limit" for row in report.rows):
        what = "a copy of as many bytes as the call must move"
        if any(row.peak for row in report.rows):
            what += ", or a product of matrices"
        legend += f" limit: the part of what the machine reaches with {what}."
    yield legend, "note"
    yield f"Measured on {machine.shown(dict(report.machine))}.", "note"
    walked, cache = (report.settings.get(name, 0) for name in ("flushed", "cache"))
    if walked < cache:
        text = f"Cold calls may find some of their arguments in the cache, which has {cache >> 20} MiB: memory was"
        yield f"{text} short, and only {walked >> 20} MiB were gone through to empty it.", "note"
    timed = [row for row in report.rows if row.times]
    if unsure := sum(row.doubt > _UNSURE for row in timed):
        text = f"Something else disturbed {unsure} of {len(timed)} measurements: their medians may be off by more than "
        yield f"{text}{_UNSURE:.0%}, so measure again when the machine is idle.", "note"
    wrong = report.wrong
    for name, status in dict.fromkeys((row.name, row.status) for row in wrong):
        own = [row for row in wrong if (row.name, row.status) == (name, status)]
        where = own[0].where.rpartition(", ")[0]
        more = f", and {len(own) - 1} more" if len(own) > 1 else ""
        yield f"{status}: {name} at {where}{more}, and not timed: {own[0].reason}", "wrong"
    rejected: dict[str, dict[str, None]] = {}
    for row in report.rows:
        if row.status == "rejected":
            rejected.setdefault(row.reason, {})[row.name] = None
    for reason, names in rejected.items():
        yield f"not measured: {', '.join(names)}: {reason}", "note"
    for text in dict.fromkeys(r.reason for r in report.rows if r.status == "timed" and r.reason):
        yield f"Results were not compared: {text}.", "wrong"
    if report.regression is not None:
        yield str(report.regression), "note" if report.regression.ok else "wrong"


def plain(report: Report) -> str:
    """Return a report as text without colours."""
    parts = [report.op]
    for table in tables(report):
        rows = [table.header, *(line.cells for line in table.lines)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [table.title, _aligned(table.header, widths, table.left)]
        for line in table.lines:
            lines.append(_aligned(line.cells, widths, table.left))
        parts.append("\n".join(lines))
    parts.append("\n".join(wrapped for text, _ in notes(report) for wrapped in _wrapped(text)))
    return "\n\n".join(parts)


def rich(report: Report) -> Group:
    """Return a report as what rich prints."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    styles = {"best": "bold green", "wrong": "red", "limit": "dim", "": "", "note": "dim"}
    parts: list[Any] = [Text(report.op, style="bold")]
    for table in tables(report):
        made = RichTable(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", title=table.title,
            title_justify="left", title_style="italic", padding=(0, 1, 0, 0),
        )  # fmt: skip
        for place, column in enumerate(table.header):
            made.add_column(column, justify="left" if place == table.left - 1 else "right", no_wrap=True)
        for place, line in enumerate(table.lines):
            ends = place + 1 < len(table.lines) and table.lines[place + 1].first
            cells = [
                Text(cell, style=styles[line.style] if at >= table.left - 1 else "")
                for at, cell in enumerate(line.cells)
            ]
            made.add_row(*cells, end_section=ends and len(table.lines) > 8)
        parts.append(Padding(made, (1, 0, 0, 0)))
    parts.append(Text(""))
    parts += [Text(text, style=styles[style]) for text, style in notes(report)]
    return Group(*parts)


def markdown(report: Report) -> str:
    """Return a report as Markdown."""
    parts = [f"### {report.op}"]
    for table in tables(report):
        rows = [table.header, *(line.cells for line in table.lines)]
        widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
        ruler = [
            "-" * width if at == table.left - 1 else "-" * (width - 1) + ":"
            for at, width in enumerate(widths)
        ]
        lines = [f"**{table.title}**", "", _piped(table.header, widths), _piped(ruler, widths)]
        lines += [_piped(line.cells, widths) for line in table.lines]
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {text}" for text, _ in notes(report)))
    return "\n\n".join(parts) + "\n"


def html(report: Report) -> str:
    """Return a report as HTML, for a notebook."""
    styles = {"best": "font-weight:bold", "wrong": "color:#dc2626", "limit": "opacity:.6", "": "", "note": ""}

    def cell(text: str, tag: str, left: bool) -> str:
        return f'<{tag} style="text-align:{"left" if left else "right"}">{escaping.escape(text)}</{tag}>'

    parts = [f"<p><b>{escaping.escape(report.op)}</b></p>"]
    for table in tables(report):
        head = "".join(cell(text, "th", at == table.left - 1) for at, text in enumerate(table.header))
        rows = "".join(
            f'<tr style="{styles[line.style]}">'
            + "".join(cell(text, "td", at == table.left - 1) for at, text in enumerate(line.cells))
            + "</tr>"
            for line in table.lines
        )
        parts.append(
            f"<table><caption>{escaping.escape(table.title)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
    parts += [f'<div style="{styles[style]}">{escaping.escape(text)}</div>' for text, style in notes(report)]
    return "\n".join(parts)


# ---------------------------------------------------------------- cells


def _columns(report: Report, rows: Sequence[Row]) -> list[str]:
    """Return which columns follow a time."""
    columns = []
    if len({row.name for row in rows if row.times and row.kind != "limit"}) > 1:
        columns.append("faster")
    if any(row.kind == "limit" for row in rows):
        columns.append("limit")
    return columns


def _numbers(report: Report, row: Row | None, columns: Sequence[str]) -> Iterator[str]:
    if row is None:
        yield from ("",) * (1 + len(columns))
        return
    yield measured.shown(row.seconds) if row.seconds else row.status
    for column in columns:
        number = report.speedup(row) if column == "faster" else report.of_limit(row)
        if number is None or (row.kind == "limit" and column == "faster"):
            yield _NONE if row.times and row.kind != "limit" else ""
        elif column == "faster":
            yield f"{number:.2f}x"
        else:
            yield f"{number:.0%}"


def _best(rows: Sequence[Row]) -> str | None:
    """Return the name of the fastest, with warm caches where they were measured, if there is a choice."""
    timed = [row for row in rows if row.times and row.kind != "limit" and row.caches == rows[0].caches]
    return min(timed, key=lambda row: row.seconds or 0.0).name if len(timed) > 1 else None


def _aligned(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    shown = (
        cell.ljust(width) if at == left - 1 else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return _GAP.join(shown).rstrip()


def _piped(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def _wrapped(text: str) -> Iterator[str]:
    for line in text.splitlines():
        indent = "  " * (len(line) - len(line.lstrip()) > 0)
        yield from textwrap.wrap(
            line.strip(), WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False,
            break_long_words=False,
        )  # fmt: skip
