from __future__ import annotations

import io
import re
import sys
import threading

import pytest

from opkit.cpp import _progress
from opkit.cpp._progress import building


class Terminal(io.StringIO):
    """What is written to a terminal, and what its lines show in the end."""

    def __init__(self):
        super().__init__()
        self.drawn = threading.Semaphore(0)

    def isatty(self):
        return True

    def write(self, text):
        self.drawn.release()
        return super().write(text)

    def wait_for_pictures(self, count):
        for _ in range(count):
            assert self.drawn.acquire(timeout=10)

    def lines(self):
        shown = []
        for line in self.getvalue().split("\n"):
            screen = ""
            for text in line.split("\r"):
                screen = text + screen[len(text) :]
            shown.append(screen.rstrip())
        return shown


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*_progress._RANKS, "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(_progress, "_REDRAWN", 0.001)


@pytest.fixture
def terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(_progress, "_stream", lambda: stream)  # pytest sets sys.stderr after fixtures
    return stream


def test_a_short_build_says_only_that_it_is_done(capsys):
    with building("f [cpp]"):
        pass
    assert re.fullmatch(r"opkit: built f \[cpp\] in \d+\.\d s\n", capsys.readouterr().err)


def test_a_long_build_says_so_in_plain_lines(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(stream, "isatty", lambda: False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(_progress, "_QUIET", 0.001)
    with building("f", steps=3) as progress:
        stream.wait_for_pictures(1)
        progress.step(2)
    assert re.fullmatch(r"opkit: building f \.\.\.\nopkit: built f in \d+\.\d s\n", stream.getvalue())


def test_a_terminal_has_one_live_line_that_the_result_replaces(terminal):
    with building("f", steps=3) as progress:
        terminal.wait_for_pictures(2)
        progress.step(2)
        terminal.wait_for_pictures(2)
        progress.step(3, of=4)
        terminal.wait_for_pictures(2)
    text = terminal.getvalue()
    for steps in ("[0/3]", "[2/3]", "[3/4]"):
        assert re.search(rf"\ropkit: building f {re.escape(steps)} \d+\.\d s", text)
    assert "\x1b" not in text
    assert re.fullmatch(r"opkit: built f in \d+\.\d s", terminal.lines()[0])
    assert terminal.lines()[1:] == [""]


def test_a_failure_ends_the_live_line_before_its_text(terminal):
    with pytest.raises(ValueError, match="wrong"), building("f"):
        terminal.wait_for_pictures(2)
        raise ValueError("wrong")
    terminal.write("Traceback")
    assert re.fullmatch(r"opkit: failed to build f after \d+\.\d s", terminal.lines()[0])
    assert terminal.lines()[1:] == ["Traceback"]


def test_what_a_build_prints_stands_above_the_live_line(terminal):
    with building("f") as progress:
        terminal.wait_for_pictures(2)
        progress.say("g++ -c f.cpp")
        terminal.wait_for_pictures(2)
    assert terminal.lines()[0] == "g++ -c f.cpp"
    assert terminal.lines()[1].startswith("opkit: built f in")


def test_a_line_fits_the_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    with building("f" * 100):
        terminal.wait_for_pictures(2)
        assert {len(picture) for picture in terminal.getvalue().split("\r")[1:]} == {19}
        monkeypatch.setenv("COLUMNS", "15")
        terminal.wait_for_pictures(3)
        assert terminal.lines()[0] == "opkit: buildin"


def test_of_two_builds_at_once_one_has_the_live_line(terminal):
    with building("first"):
        terminal.wait_for_pictures(2)
        with building("second"):
            pass
        terminal.wait_for_pictures(2)
    text = terminal.getvalue()
    assert "building second" not in text
    assert text.count("built second") == text.count("built first") == 1


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with building("f"):
        pass
    assert "\r" not in terminal.getvalue()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_only_the_first_rank_speaks(name, monkeypatch, capsys):
    for rank, speaks in (("1", False), ("0", True)):
        monkeypatch.setenv(name, rank)
        with building("f"):
            pass
        assert bool(capsys.readouterr().err) == speaks


def test_a_build_needs_no_stderr(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        with building("f") as progress:
            progress.say("text")
            progress.step(1)
