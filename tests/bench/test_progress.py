"""What is said on stderr while an op is measured."""

from __future__ import annotations

import io
import re
import sys

import pytest

from opkit.bench import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def say(monkeypatch, stream, *, wanted=True):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.shown("a::b", 2, wanted=wanted) as note:
        note("n=4, float32")
        note("n=8, float32")
    return stream.getvalue()


def test_lines_where_nobody_looks(monkeypatch):
    assert say(monkeypatch, io.StringIO()) == (
        "opkit: measuring a::b [1/2] n=4, float32\nopkit: measuring a::b [2/2] n=8, float32\n"
    )


def test_a_bar_on_a_terminal_that_goes_away(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", say(monkeypatch, Terminal()))
    assert "a::b" in shown
    assert "/2" in shown
    assert "n=8, float32" in shown
    assert "opkit: measuring" not in shown


def test_lines_on_a_terminal_without_rich(monkeypatch, without_rich):
    assert "opkit: measuring a::b [2/2] n=8, float32" in say(monkeypatch, Terminal())


@pytest.fixture
def without_rich(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)


def test_lines_on_a_terminal_that_is_dumb(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "opkit: measuring a::b [1/2]" in say(monkeypatch, Terminal())


def test_nothing_where_nothing_is_wanted_or_another_rank_speaks(monkeypatch):
    assert say(monkeypatch, io.StringIO(), wanted=False) == ""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert say(monkeypatch, io.StringIO()) == ""
    assert say(monkeypatch, Terminal()) == ""


def test_compare_says_what_it_measures(scale, compare, capsys):
    compare(scale, over={"n": [4, 8]}, progress=True, backends=["fast"])
    assert capsys.readouterr().err.splitlines() == [
        "opkit: measuring benched::scale [1/2] n=4, float32",
        "opkit: measuring benched::scale [2/2] n=8, float32",
    ]
