"""A report as text, for people: on 80 columns, with and without colours, as Markdown and as HTML."""

from __future__ import annotations

import builtins
import io
import re

import pytest

from tests.bench.reports import report, row

COPY = {"kind": "limit"}
COLD = {"caches": "cold"}
BOTH = report(
    row("fast", (2e-6, 2e-6, 2e-6)), row("reference", (8e-6, 8e-6, 8e-6)),
    row("broken", status="wrong", reason="out is 2"),
    row("far", reason="it has no kernel for cpu"), row("copy", (1e-6,) * 3, **COPY),
    row("fast", (4e-6,) * 3, **COLD), row("reference", (8e-6,) * 3, **COLD),
    row("broken", status="wrong", reason="out is 2", **COLD), row("far", reason="it has no kernel for cpu", **COLD),
    row("copy", (4e-6,) * 3, **COPY, **COLD),
)  # fmt: skip
TEXT = """\
a::b

float32, forward
n  candidate   warm  faster  limit   cold  faster  limit
4  fast        2 us   4.00x    50%   4 us   2.00x   100%
   reference   8 us   1.00x    12%   8 us   1.00x    50%
   broken     wrong                 wrong
   copy        1 us           100%   4 us           100%

faster: how many times as fast as reference, the median of rounds in turns.
  limit: the part of what the machine reaches with a copy of as many bytes as
  the call must move.
Measured on A processor, 2 threads, torch 2.13.0.
wrong: broken at n=4, float32, forward, and not timed: out is 2
not measured: far: it has no kernel for cpu"""


def test_a_report_prints_as_tables():
    assert str(BOTH) == TEXT


def test_no_line_is_longer_than_80_columns():
    long = "x" * 30 + " " + "y" * 30 + " " + "z" * 40
    text = str(report(*BOTH.rows, row("other", status="failed", reason=long)))
    assert max(map(len, text.splitlines())) <= 80


def test_each_dtype_and_direction_has_a_table_and_each_size_its_rows():
    rows = [row("a", (1,) * 3, n=n, dtype=d) for d in ("float32", "bfloat16") for n in (4, 8)]
    lines = str(report(*rows)).splitlines()
    assert lines[2:5] == ["float32, forward", "n  candidate  warm", "4  a           1 s"]
    assert lines[5] == "8  a           1 s"
    assert lines[7] == "bfloat16, forward"


def test_columns_that_say_nothing_are_left_out():
    assert "faster" not in str(report(row("a", (1,) * 3))).splitlines()[3]
    assert "limit" not in str(report(row("a", (1,) * 3), row("b", (1,) * 3))).split("faster:")[0]


def test_measurements_that_were_disturbed_are_said():
    text = " ".join(str(report(row("a", (1, 5, 9)), row("b", (1,) * 3))).split())
    assert (
        "Something else disturbed 1 of 2 measurements: their medians may be off by more than 10%, so measure again "
        "when the machine is idle."
    ) in text


def test_caches_that_were_not_emptied_are_said():
    rows = row("a", (1,) * 3), row("b", (1,) * 3)
    short = report(*rows, settings={"flushed": 100 << 20, "cache": 480 << 20})
    assert (
        "Cold calls may find some of their arguments in the cache, which has 480 MiB: memory was short, and only 100 "
        "MiB were gone through to empty it."
    ) in " ".join(str(short).split())
    assert "memory was short" not in str(report(*rows, settings={"flushed": 600 << 20, "cache": 480 << 20}))


def test_who_runs_the_ops_is_said_where_it_is_python():
    slow = report(
        row("a", (1,) * 3), machine={"processor": "P", "threads": 1, "torch": "2", "calls": "Python"}
    )
    assert "Measured on P, 1 thread, torch 2, ops run by Python." in str(slow)


def test_markdown_is_a_table():
    lines = BOTH.to_markdown().splitlines()
    assert lines[0] == "### a::b"
    assert lines[4] == "| n   | candidate | warm  | faster | limit | cold  | faster | limit |"
    assert lines[5] == "| --: | --------- | ----: | -----: | ----: | ----: | -----: | ----: |"
    assert lines[6] == "| 4   | fast      | 2 us  | 4.00x  | 50%   | 4 us  | 2.00x  | 100%  |"
    assert lines[-1] == "- not measured: far: it has no kernel for cpu"


def test_html_is_escaped():
    page = report(row("<b>", (1,) * 3), row("broken", status="wrong", reason="1 < 2"))._repr_html_()
    assert '<td style="text-align:left">&lt;b&gt;</td>' in page
    assert "1 &lt; 2" in page
    assert page.count("<table>") == page.count("</table>") == 1


def printed(**options):
    console = pytest.importorskip("rich.console")
    stream = io.StringIO()
    console.Console(file=stream, width=80, highlight=False, **options).print(BOTH)
    return stream.getvalue()


def test_rich_prints_the_same_words_with_and_without_colour():
    plain = printed(color_system=None)
    assert "\x1b" not in plain
    coloured = printed(force_terminal=True, color_system="standard")
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert re.search(r"\x1b\[1;32m *2 us", coloured)  # the fastest
    assert re.search(r"\x1b\[31mbroken", coloured)
    words = plain.replace("─", "").split()
    assert words == TEXT.split()


def test_rich_fits_80_columns():
    wide = [row("a_long_backend_name", (1.234e-6,) * 3, **{"sizes": {"batch": 128, "heads": 16, "n": 65536}}, **o)
            for o in ({}, COLD)]  # fmt: skip
    wide += [row("copy", (1e-6,) * 3, sizes=wide[0].sizes, **COPY, **o) for o in ({}, COLD)]
    console = pytest.importorskip("rich.console")
    stream = io.StringIO()
    console.Console(file=stream, width=80, color_system=None).print(report(*wide))
    assert "…" not in stream.getvalue()


def test_text_needs_no_rich(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "rich":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert str(BOTH) == TEXT
