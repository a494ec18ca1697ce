"""A report as a picture: one panel for each dtype, direction and state of the caches, lines labelled where they end.

matplotlib draws it, which is an extra. Nothing of its global state is used or changed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from opkit.bench import machine
from opkit.bench.report import REFERENCE, Report, Row
from opkit.errors import ArgumentError, OpkitError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Theme(NamedTuple):
    """The colours of a picture; `lines` are told apart by people who see no red or green, too."""

    paper: str
    ink: str
    faint: str
    grid: str
    wrong: str
    lines: tuple[str, ...]


THEMES = {
    "light": Theme(
        "#ffffff", "#1f2328", "#6e7781", "#e5e8eb", "#b42318",
        ("#0067b1", "#d55e00", "#008a5e", "#a63d8f", "#8a6d00", "#0d8fa8"),
    ),
    "dark": Theme(
        "#0d1117", "#e6edf3", "#8d96a0", "#272d36", "#ff8a80",
        ("#58a6ff", "#ff9d4d", "#3fcf8e", "#e38bd0", "#e3c04d", "#4fd1e0"),
    ),
}  # fmt: skip
_WIDTH, _HEIGHT = 4.6, 3.0  # inches of a panel
_APART = 0.07  # of a panel's height, between two labels
_LOG = 8  # from how many times the smallest size on sizes are drawn as powers


def draw(report: Report, path: Path, theme: str = "light") -> Path:
    """Draw a report and return the path.

    Raises:
        OpkitError: matplotlib is not installed, or cannot write that format.
        ArgumentError: nothing was timed, or there is no such theme.
    """
    doing = f"drawing what was measured of {report.op}"
    if importlib.util.find_spec("matplotlib") is None:
        raise OpkitError(
            f"{doing}: matplotlib is not installed, which draws it. Install it: pip install 'torch-opkit[bench]'."
        )
    if theme not in THEMES:
        raise ArgumentError(
            f"{doing}: theme= is {theme!r}; expected {' or '.join(THEMES)}.{did_you_mean(theme, THEMES)} Name one."
        )
    if not any(row.times for row in report.rows):
        raise ArgumentError(
            f"{doing}: nothing was timed; expected a candidate that is right. Print the report, which says why."
        )
    import matplotlib
    from matplotlib.figure import Figure

    look = THEMES[theme]
    with matplotlib.rc_context(_style(look)):
        panels = _panels(report)
        height, width = len(panels), max(map(len, panels))
        figure = Figure(figsize=(_WIDTH * width + 0.6, _HEIGHT * height + 0.7), layout="constrained")
        known = figure.canvas.get_supported_filetypes()
        if path.suffix.removeprefix(".") not in known:
            raise OpkitError(
                f"{doing}: found the path {path}; expected one that ends in a format which matplotlib writes: "
                f"{', '.join(f'.{name}' for name in sorted(known))}. Name it {path.stem}.svg."
            )
        grid = figure.subplots(height, width, squeeze=False)
        colours = _colours(report, look)
        for row, line in zip(grid, panels, strict=True):
            for axes, rows in zip(row, line, strict=True):
                _panel(axes, report, rows, colours, look)
        figure.suptitle(
            f"{report.op}", x=0.01, horizontalalignment="left", fontweight="bold", color=look.ink, fontsize=13
        )
        figure.supxlabel(
            machine.shown(dict(report.machine)),
            x=0.01,
            horizontalalignment="left",
            color=look.faint,
            fontsize=8,
        )
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _style(look: Theme) -> Any:
    return {
        "figure.facecolor": look.paper,
        "savefig.facecolor": look.paper,
        "axes.facecolor": look.paper,
        "axes.edgecolor": look.faint,
        "axes.labelcolor": look.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlecolor": look.ink,
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": look.grid,
        "text.color": look.ink,
        "xtick.color": look.faint,
        "ytick.color": look.faint,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "font.size": 9,
        "svg.fonttype": "none",  # text that can be read, searched and selected
        "svg.hashsalt": "opkit",  # the same picture gives the same file
    }


def _panels(report: Report) -> list[list[list[Row]]]:
    """Return the rows of each panel: a line for each dtype, direction and what does not stand on the x axis."""
    varying = _varying(report)
    across = varying[-1] if varying else None

    def place(row: Row) -> tuple[Any, ...]:
        return *row.group, *((n, v) for n, v in row.sizes.items() if n in varying and n != across)

    states = list(dict.fromkeys(row.caches for row in report.rows))
    return [
        [[row for row in report.rows if place(row) == line and row.caches == state] for state in states]
        for line in dict.fromkeys(map(place, report.rows))
    ]


def _varying(report: Report) -> list[str]:
    """Return the names of sizes that have more than one value, that with most values last."""
    values: dict[str, dict[Any, None]] = {}
    for row in report.rows:
        for name, value in row.sizes.items():
            values.setdefault(name, {})[value] = None
    return sorted((name for name, own in values.items() if len(own) > 1), key=lambda name: len(values[name]))


def _colours(report: Report, look: Theme) -> dict[str, str]:
    """Return the colour of each candidate: grey for the reference and the limit."""
    names = dict.fromkeys(row.name for row in report.rows if row.times and row.kind != "limit")
    others = [name for name in names if name != REFERENCE]
    found = {name: look.lines[i % len(look.lines)] for i, name in enumerate(others)}
    return {**dict.fromkeys(names, look.faint), **found}


def _panel(axes: Axes, report: Report, rows: Sequence[Row], colours: Mapping[str, str], look: Theme) -> None:
    """Draw one panel."""
    varying = _varying(report)
    fixed = [f"{n} = {v}" for n, v in rows[0].sizes.items() if n in varying[:-1]]
    axes.set_title(", ".join([rows[0].dtype, rows[0].direction, f"{rows[0].caches} caches", *fixed]))
    timed = [row for row in rows if row.times]
    if not timed:
        axes.set_axis_off()
    elif not varying:
        _bars(axes, timed, colours, look)
    else:
        _lines(axes, timed, varying[-1], colours, look)
    wrong = dict.fromkeys(f"{row.name} is wrong" for row in rows if row.status in ("wrong", "failed"))
    if wrong:
        axes.text(
            0.02, 0.97, "\n".join(wrong), transform=axes.transAxes, color=look.wrong, verticalalignment="top",
            fontsize=8,
        )  # fmt: skip


def _lines(axes: Axes, rows: Sequence[Row], across: str, colours: Mapping[str, str], look: Theme) -> None:
    """Draw what depends on a size: bytes by the second where they are known, else times."""
    places = list(dict.fromkeys(row.sizes[across] for row in rows))
    numeric = all(isinstance(place, (int, float)) for place in places)
    position = {place: place if numeric else at for at, place in enumerate(places)}
    by_bytes = all(row.bandwidth for row in rows)
    unit, factor, label = _unit(rows, by_bytes)
    ends: list[tuple[float, str, str]] = []
    for name in dict.fromkeys(row.name for row in rows):
        own = sorted((row for row in rows if row.name == name), key=lambda row: position[row.sizes[across]])
        x = [position[row.sizes[across]] for row in own]
        y = [(row.bandwidth if by_bytes else row.seconds) or 0.0 for row in own]
        y = [value * factor for value in y]
        if own[0].kind == "limit":
            axes.fill_between(x, y, color=look.grid, alpha=0.55, linewidth=0)
            axes.plot(x, y, color=look.faint, linewidth=1, linestyle=":")
            ends.append((y[-1], f"{name} (limit)", look.faint))
            continue
        dashes = "--" if own[0].kind == "peer" else "-"
        axes.plot(x, y, color=colours[name], linestyle=dashes, marker="o", markersize=3.5, linewidth=1.8)
        ends.append((y[-1], name, colours[name]))
    if numeric and min(places) > 0 and max(places) >= _LOG * min(places):
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(position.values()), [str(place) for place in places])
    axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylabel(f"{label}, {unit}")
    if by_bytes:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", visible=False)
    _label(axes, ends)


def _unit(rows: Sequence[Row], by_bytes: bool) -> tuple[str, float, str]:
    """Return the unit of the y axis, what one of it is, and what the axis shows."""
    if by_bytes:
        return "GB/s", 1e-9, "memory moved"
    least = min(row.seconds or 0.0 for row in rows)
    return ("ms", 1e3, "time of a call") if least > 1e-3 else ("µs", 1e6, "time of a call")


def _label(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the names of lines at their right ends, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    last = axes.get_xlim()[1]
    wanted = sorted((float(to_axes.transform((last, y))[1]), name, colour) for y, name, colour in ends)
    groups: list[list[float]] = []  # of labels that would overlap; each is centred where its lines end
    for at, _, _ in wanted:
        groups.append([at])
        while len(groups) > 1 and _low(groups[-1]) < _low(groups[-2]) + _APART * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = [_low(group) + _APART * i for group in groups for i in range(len(group))]
    for low, (_, name, colour) in zip(placed, wanted, strict=True):
        axes.annotate(
            name, (1.0, low), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points", color=colour,
            verticalalignment="center", fontsize=8.5, annotation_clip=False,
        )  # fmt: skip


def _low(group: Sequence[float]) -> float:
    """Return where the lowest label of a group stands."""
    room = _APART * (len(group) - 1)
    return max(0.0, min(sum(group) / len(group) - room / 2, 1.0 - room))


def _bars(axes: Axes, rows: Sequence[Row], colours: Mapping[str, str], look: Theme) -> None:
    """Draw the times at one size."""
    unit, factor, label = _unit(rows, by_bytes=False)
    names = [row.name + (" (limit)" if row.kind == "limit" else "") for row in rows]
    times = [(row.seconds or 0.0) * factor for row in rows]
    shown = [look.grid if row.kind == "limit" else colours[row.name] for row in rows]
    drawn = axes.barh(names, times, color=shown, height=0.62)
    axes.bar_label(drawn, [f"{time:.3g}" for time in times], padding=4, color=look.ink, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, max(times) * 1.15)
    axes.set_xlabel(f"{label}, {unit}")
    axes.tick_params(axis="y", length=0, labelcolor=look.ink, labelsize=9)
    axes.grid(axis="y", visible=False)
