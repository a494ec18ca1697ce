"""What commands print to, what they find installed, and what `opkit doctor` finds."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re

import pytest

from opkit import _config, cli

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    """Stands for a terminal, and remembers what was printed."""

    def __call__(self, *words: str) -> int:
        """Run a command here, after what was printed before is gone; return its exit code."""
        self.truncate(0)
        self.seek(0)
        with contextlib.redirect_stdout(self):
            return cli.main(words)

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What one reads."""
        return [line.rstrip() for line in _ESCAPE.sub("", self.getvalue()).splitlines()]

    @property
    def colours(self) -> set[str]:
        return {code for code in _ESCAPE.findall(self.getvalue()) if re.search(r"\b[39][0-7][;m]", code)}


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


@pytest.fixture
def without(monkeypatch):
    """A function that has distributions seem not to be installed."""
    find = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n in names else find(n, *a))

    return hide


@pytest.fixture
def doctor(capsys):
    """The findings of a check, after the environment was changed."""

    def run(check, *words):
        _config.refresh()
        code = cli.main(["doctor", "--json", *words])
        report = json.loads(capsys.readouterr().out)
        assert code == int(report["status"] == "failure")
        return [(f["status"], f["found"], f["remedy"]) for f in report["checks"] if f["check"] == check]

    return run
