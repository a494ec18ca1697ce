"""`opkit check`: the report of each op, as text, JSON or Markdown, and the exit code."""

from __future__ import annotations

import json
import sys

import pytest

from opkit import cli

MODULE = """
import opkit
from torch import Tensor

@opkit.op("clicheck::plus", shapes="n -> n")
def plus(x: Tensor, amount: float = 1.0) -> Tensor:
    return x + amount

@opkit.op("clicheck::times", shapes="n -> n")
def times(x: Tensor) -> Tensor:
    return x * 2

times.register_kernel("cpu", lambda x: x * 3, backend="wrong")

@opkit.op("clicheck::take", shapes="n, m:int64 -> m:x")
def take(x: Tensor, index: Tensor) -> Tensor:
    return x[index]
"""
ONLY = ("--only", "results", "--only", "schema")


@pytest.fixture
def script(tmp_path, registry, monkeypatch):
    (tmp_path / "clicheck_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "clicheck_module", raising=False)
    return ("--import", "clicheck_module.py")


def test_a_right_op_exits_with_0_and_a_wrong_one_with_1(script, capsys):
    assert cli.main(["check", "clicheck::plus", *script, *ONLY]) == 0
    assert capsys.readouterr().out.startswith("clicheck::plus: ")
    assert cli.main(["check", "clicheck::times", *script, *ONLY]) == 1
    out = capsys.readouterr().out
    assert "What failed" in out
    assert max(map(len, out.splitlines())) <= 80
    assert cli.main(["check", "clicheck::times", "--backend", "reference", *script, *ONLY]) == 0


def test_json_has_all_records_and_what_could_not_be_checked(script, capsys):
    assert cli.main(["check", "--json", *script, *ONLY]) == 1
    captured = capsys.readouterr()
    plus, times, take = json.loads(captured.out)
    assert (plus["op"], plus["ok"], times["ok"], take["ok"]) == ("clicheck::plus", True, False, False)
    assert {r["check"] for r in plus["records"]} == {"results", "schema"}
    assert "nothing says which values it may have" in take["error"]
    assert captured.err.startswith("opkit: making a call of clicheck::take from its declaration: ")


def test_markdown(script, capsys):
    assert cli.main(["check", "clicheck::plus", "--markdown", *script, *ONLY]) == 0
    assert "| schema | passed | A call changes only" in capsys.readouterr().out


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_gets_80_columns_in_colour_or_without(script, terminal, monkeypatch, colour):
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    assert terminal("check", "clicheck::times", *script, *ONLY) == 1
    assert max(map(len, terminal.lines)) <= 80
    assert terminal.lines[0].startswith("clicheck::times: ")
    assert any(line.startswith("FAILED") for line in terminal.lines)
    assert bool(terminal.colours) == colour


def test_a_terminal_without_rich_gets_the_same_text(script, terminal, without):
    without("rich")
    assert terminal("check", "clicheck::plus", *script, *ONLY) == 0
    assert terminal.lines[0].startswith("clicheck::plus: ")
    assert not terminal.colours


def test_what_cannot_be_checked_is_one_text(script, capsys):
    assert cli.main(["check", "clicheck::take", *script]) == 1
    assert capsys.readouterr().err.startswith("opkit: making a call of clicheck::take from its declaration: ")
    assert cli.main(["check"]) == 1
    assert (
        "checking ops: none is named; expected namespace::name, or --import MODULE" in capsys.readouterr().err
    )
    assert cli.main(["check", "clicheck::nothing", *script]) == 1
    assert "opkit: checking clicheck::nothing: no op has that name" in capsys.readouterr().err
    assert cli.main(["check", "clicheck::plus", "--only", "result", *script]) == 1
    assert "Did you mean 'results'?" in capsys.readouterr().err
