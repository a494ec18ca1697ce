"""`opkit ops`: which ops it lists, and what it says of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from opkit import cli
from opkit.cpp import compilers

MODULE = """
import opkit
from torch import Tensor

@opkit.op("cliops::plus", shapes="n -> n")
def plus(x: Tensor, amount: float = 1.0) -> Tensor:
    return x + amount

@opkit.op("cliops::unplanned")
def unplanned(x: Tensor, many_words_that_need_room: int = 12345678, others: float = 0.5) -> tuple[Tensor, Tensor]:
    return x, x

plus.register_kernel("cpu", opkit.cpp.kernel("void plus() {}"))
plus.register_kernel("cpu", lambda x, amount: x + amount, backend="fast")
"""


@pytest.fixture
def script(tmp_path, registry, monkeypatch):
    (tmp_path / "cliops_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cliops_module", raising=False)
    return "cliops_module.py"


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(compilers, "find_cxx", lambda: None)
    monkeypatch.delenv("CXX", raising=False)


def test_json_has_what_is_declared_and_every_kernel(script, no_compiler, capsys):
    assert cli.main(["ops", "--json", "--import", script, "cliops::*"]) == 0
    plus, unplanned = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in plus.items() if k != "kernels"} == {
        "name": "cliops::plus",
        "schema": "cliops::plus(Tensor x, float amount=1.0) -> (Tensor)",
        "shapes": "n -> n",
        "module": "cliops_module",
        "error": None,
    }
    assert [(k["backend"], k["device"], k["status"], k["reason"]) for k in plus["kernels"]] == [
        ("cpp", "cpu", "rejected", "no C++ compiler was found (install g++ or set CXX)"),
        ("fast", "cpu", "available", ""),
        ("reference", "any", "available", ""),
    ]
    assert unplanned["shapes"] is None


def test_a_pipe_gets_one_line_for_each_op(script, no_compiler, capsys):
    assert cli.main(["ops", "--import", script, "cliops::*"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "cliops::plus       cpu: (cpp), fast; reference  cliops_module  (Tensor x, float amount=1.0) -> (Tensor)",
        "cliops::unplanned  reference                    cliops_module  (Tensor x, SymInt many_words_that_need_room="
        "12345678, float others=0.5) -> (Tensor, Tensor)",
    ]


def test_all_ops_are_listed_where_none_is_named(script, capsys):
    assert cli.main(["ops", "--import", script]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(names)
    assert {"cliops::plus", "cliops::unplanned", "opkit::rms_norm", "opkit::vector_add"} <= set(names)


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_gets_a_table_of_80_columns(script, no_compiler, terminal, monkeypatch, colour):
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    assert terminal("ops", "--import", script, "cliops::*") == 0
    assert max(map(len, terminal.lines)) <= 80
    text = "\n".join(terminal.lines)
    assert terminal.lines[0].split() == ["op", "backends", "from"]
    assert "\ncliops::plus " in text
    assert "cpu: (cpp), fast" in text
    assert "many_words_that_need_room=12345678" in text
    assert terminal.lines[-1] == "In parentheses: cannot be built here. opkit info NAME says why."
    assert not terminal.colours


def test_a_terminal_without_rich_gets_lines(script, terminal, without):
    without("rich")
    assert terminal("ops", "--import", script, "cliops::plus") == 0
    assert terminal.lines[0].startswith("cliops::plus  cpu: cpp, fast; reference  cliops_module  (Tensor x")


def test_an_unknown_name_is_one_text(script, capsys):
    assert cli.main(["ops", "--import", script, "cliops::pls"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("opkit: listing cliops::pls: no op has that name; known are ")
    assert "Did you mean 'cliops::plus'? Name the module that defines it with --import." in error


def test_an_op_that_its_plugin_does_not_define_is_listed_with_the_reason(tmp_path):
    package, info = tmp_path / "site" / "promising", tmp_path / "site" / "promising-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("def register(registry): raise ValueError('no such chip')\n")
    (package / "opkit-plugin.toml").write_text(
        "schema = 1\nname = 'promising'\nversion = '1.0'\nops = ['promising::mine']\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: promising\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[opkit.plugins]\npromising = promising:register\n")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "opkit", "ops", "--json", "opkit::swiglu", "promising::*"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    swiglu, mine = json.loads(done.stdout)
    assert swiglu["module"].startswith("opkit_kernels.")
    assert (mine["name"], mine["schema"], mine["kernels"]) == ("promising::mine", None, [])
    assert "promising" in mine["error"]
    assert "no such chip" in mine["error"]
