"""The picture of a report: what it shows, its formats and themes, and what it says where it cannot be drawn."""

from __future__ import annotations

import re

import pytest

from opkit.bench import plots
from opkit.errors import ArgumentError, OpkitError
from tests.bench.reports import report, row

pytest.importorskip("matplotlib")


def series(name, *, factor=1.0, across=(64, 256, 1024), **other):
    return [row(name, (factor * n * 1e-8,) * 3, n=n, **{"bytes": n * 1000, **other}) for n in across]


LINES = report(
    *series("fast"), *series("reference", factor=4), *series("eager", factor=2, kind="peer"),
    *series("copy", factor=0.5, kind="limit"),
)  # fmt: skip


def texts(path):
    """The texts of an SVG, in order."""
    return [
        re.sub(r"<[^>]*>", "", text) for text in re.findall(r"<text.*?</text>", path.read_text(), re.DOTALL)
    ]


def test_lines_are_labelled_and_axes_have_units(tmp_path):
    path = LINES.plot(tmp_path / "picture.svg")
    found = texts(path)
    assert {"64", "256", "1024", "n", "memory moved, GB/s", "float32, forward, warm caches", "a::b"} <= set(
        found
    )
    assert {"fast", "reference", "eager", "copy (limit)"} <= set(found)
    assert "A processor, 2 threads, torch 2.13.0" in found


def test_times_are_drawn_where_bytes_are_unknown(tmp_path):
    found = texts(report(*series("fast", bytes=None)).plot(tmp_path / "picture.svg"))
    assert "time of a call, µs" in found
    assert texts(report(*series("slow", factor=1e6, bytes=None)).plot(tmp_path / "slow.svg")).count(
        "time of a call, ms"
    )


def test_one_size_is_drawn_as_bars_with_their_times(tmp_path):
    found = texts(
        report(row("fast", (2e-6,) * 3), row("copy", (1e-6,) * 3, kind="limit")).plot(tmp_path / "p.svg")
    )
    assert {"fast", "copy (limit)", "2", "1", "time of a call, µs"} <= set(found)


def test_there_is_a_panel_for_each_state_and_direction_and_other_size(tmp_path):
    rows = [
        row("fast", (1e-6,) * 3, sizes={"rows": r, "n": n}, caches=c, direction=d)
        for r in (1, 2) for n in (4, 8, 16) for c in ("warm", "cold") for d in ("forward", "forward + backward")
    ]  # fmt: skip
    found = [t for t in texts(report(*rows).plot(tmp_path / "p.svg")) if t.startswith("float32")]
    assert len(found) == 8
    assert "float32, forward + backward, cold caches, rows = 2" in found


def test_sizes_that_are_texts_are_drawn_in_their_order(tmp_path):
    rows = [row("fast", (1e-6,) * 3, sizes={"kind": kind}) for kind in ("small", "huge")]
    found = texts(report(*rows).plot(tmp_path / "p.svg"))
    assert found.index("small") < found.index("huge")


def test_what_is_wrong_is_in_the_picture(tmp_path):
    rows = [*LINES.rows, row("broken", status="wrong", reason="off", n=64)]
    assert "broken is wrong" in texts(report(*rows).plot(tmp_path / "p.svg"))


def test_a_panel_in_which_nothing_was_timed_says_what_is_wrong(tmp_path):
    rows = [
        *LINES.rows,
        *(row("fast", status="wrong", n=n, direction="forward + backward") for n in (64, 256)),
    ]
    assert "fast is wrong" in texts(report(*rows).plot(tmp_path / "p.svg"))


@pytest.mark.parametrize(("theme", "paper"), [("light", (255, 255, 255)), ("dark", (13, 17, 23))])
def test_themes_are_light_and_dark(tmp_path, theme, paper):
    from matplotlib import image

    path = LINES.plot(tmp_path / "picture.png", theme=theme)
    corner = image.imread(path)[0, 0, :3]
    assert tuple(int(round(255 * float(c))) for c in corner) == paper


def test_the_same_report_gives_the_same_file(tmp_path):
    first, second = (LINES.plot(tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second


def test_drawing_leaves_matplotlib_as_it_is(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    LINES.plot(tmp_path / "p.svg", theme="dark")
    assert dict(matplotlib.rcParams) == before


def test_labels_do_not_overlap():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_ylim(0, 1)
    plots._label(
        axes, [(0.5, "a", "k"), (0.5, "b", "k"), (0.51, "c", "k"), (0.99, "d", "k"), (1.0, "e", "k")]
    )
    at = sorted(text.xy[1] for text in axes.texts)
    assert all(b - a >= plots._APART - 1e-9 for a, b in zip(at, at[1:], strict=False))
    assert at[0] >= 0
    assert at[-1] <= 1 + 1e-9
    assert [t.get_text() for t in sorted(axes.texts, key=lambda t: t.xy[1])] == ["a", "b", "c", "d", "e"]


def test_without_matplotlib_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(OpkitError) as caught:
        LINES.plot(tmp_path / "p.svg")
    assert str(caught.value) == (
        "drawing what was measured of a::b: matplotlib is not installed, which draws it. Install it: "
        "pip install 'torch-opkit[bench]'."
    )


@pytest.mark.parametrize(
    ("report", "name", "options", "text"),
    [
        (
            LINES,
            "p.svg",
            {"theme": "drak"},
            "theme= is 'drak'; expected light or dark. Did you mean 'dark'? Name one.",
        ),
        (LINES, "p.doc", {}, "p.doc; expected one that ends in a format which matplotlib writes: "),
        (LINES, "p", {}, "Name it p.svg."),
        (
            report(row("far")),
            "p.svg",
            {},
            "nothing was timed; expected a candidate that is right. Print the report",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, report, name, options, text):
    with pytest.raises(OpkitError) as caught:
        report.plot(tmp_path / name, **options)
    assert text in str(caught.value)
    assert str(caught.value).startswith("drawing what was measured of a::b: ")
    assert isinstance(caught.value, ArgumentError) == (name == "p.svg")
