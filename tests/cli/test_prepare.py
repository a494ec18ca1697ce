from __future__ import annotations

import json
import sys

import pytest

from opkit import _config, cli
from opkit.cpp import compilers

pytestmark = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")

MODULE = '''
import opkit, torch
from torch import Tensor

@opkit.op("cliprep::plus", shapes="n -> n")
def plus(x: Tensor) -> Tensor:
    return x + 1

@opkit.op("cliprep::minus", shapes="n -> n")
def minus(x: Tensor) -> Tensor:
    return x - 1

plus.register_kernel("cpu", opkit.cpp.kernel("""
#include <opkit/kernel.h>
void plus(opkit::Tensor x, opkit::Tensor y) {
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = x.data<float>()[i] + 1;
}
"""), backend="cpp")
plus.register_kernel("xpu", opkit.cpp.kernel("void plus() {}"), backend="far")

def cases(device):
    return {plus: [(torch.ones(3, device=device),)], "cliprep::minus": [(torch.ones(4),)]}

def wrong():
    return [(torch.ones(3),)]

def broken():
    raise ValueError("no")
'''


@pytest.fixture
def script(tmp_path, registry, cache_dir, monkeypatch):
    (tmp_path / "cliprep_ops.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cliprep_ops", raising=False)
    return tmp_path / "cliprep_ops.py"


def prepare(*words: str) -> int:
    return cli.main(["prepare", *words])


def records(text):
    return [(r["op"], r["backend"], r["did"]) for r in json.loads(text)["records"]]


def test_prepare_builds_every_native_kernel_of_a_module(script, capsys):
    assert prepare("--import", "cliprep_ops.py") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" s: 1 built, 1 skipped")
    assert lines[1].split()[:3] == ["cliprep::plus", "cpp", "built"]
    assert lines[2].split(maxsplit=3) == ["cliprep::plus", "far", "skipped", "this machine has no device xpu"]
    assert lines[3] == (
        "What was built is in the cache for later processes. Each of them selects and loads for itself: it calls "
        "opkit.prepare with the same ops and cases, and then opkit.freeze()."
    )


def test_prepare_calls_cases_of_a_function(script, capsys):
    assert prepare("--cases", "cliprep_ops.py:cases", "--device", "cpu", "--json") == 0
    assert records(capsys.readouterr().out) == [
        ("cliprep::plus", "cpp", "built"),
        ("cliprep::minus", "reference", "selected"),
    ]


def test_prepare_takes_patterns_and_only_their_cases(script, capsys):
    assert prepare("cliprep::p*", "--cases", "cliprep_ops.py:cases", "--json") == 0
    assert records(capsys.readouterr().out) == [("cliprep::plus", "cpp", "built")]


def test_prepare_takes_a_device(script, capsys):
    assert prepare("--import", "cliprep_ops.py", "--device", "cpu", "--json") == 0
    assert records(capsys.readouterr().out) == [("cliprep::plus", "cpp", "built")]


@pytest.mark.parametrize("command", ["prepare", "build"])
def test_commands_build_also_where_later_processes_are_frozen(script, capsys, monkeypatch, command):
    monkeypatch.setenv("OPKIT_FROZEN", "1")
    _config.refresh()
    assert cli.main([command, "--import", "cliprep_ops.py"]) in (0, 1)  # the kernel for xpu is no kernel
    assert "cliprep::plus" in capsys.readouterr().out


def test_nothing_that_can_run_here_is_said_alone(script, capsys):
    assert prepare("--import", "cliprep_ops.py", "--device", "xpu") == 0
    assert "What was built" not in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_is_exit_code_1(script, capsys):
    script.write_text(MODULE.replace("+ 1;", "+ ;"))
    assert prepare("--import", "cliprep_ops.py") == 1
    error = capsys.readouterr().err
    assert "building cliprep::plus [cpp]: 1 error, at " in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            [],
            "preparing ops: none is named; expected namespace::name, --cases FILE.py:FUNCTION, or --import MODULE",
        ),
        (["no::op"], "preparing no::op: no op has that name; known are "),
        (["opkit::vector_ad"], "Did you mean 'opkit::vector_add'?"),
        (["--import", "nowhere.py"], "importing nowhere.py: there is no such module or file"),
        (
            ["--cases", "cases"],
            "reading --cases cases: found no function's name; expected a file or module, a colon",
        ),
        (["--cases", "nowhere.py:f"], "importing nowhere.py: there is no such module or file"),
        (
            ["--cases", "cliprep_ops.py:case"],
            "reading --cases cliprep_ops.py:case: cliprep_ops.py has no function 'case'; expected one of cases, wrong, "
            "broken. Did you mean 'cases'? Name the one that returns the cases.",
        ),
        (
            ["--cases", "cliprep_ops.py:wrong"],
            "reading --cases cliprep_ops.py:wrong: the function returned a list; expected a mapping from ops to lists "
            "of cases. Return {op: [(x, y)]}.",
        ),
        (
            ["--cases", "cliprep_ops.py:broken"],
            "reading --cases cliprep_ops.py:broken: the function failed with ValueError: no. Expected it to return "
            "cases; call it in Python to see where it fails.",
        ),
    ],
)
def test_what_cannot_be_prepared_is_one_text(script, capsys, words, text):
    assert prepare(*words) == 1
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_wrong_usage_is_exit_code_2(capsys):
    assert prepare("--nothing") == 2
    assert "unrecognized arguments: --nothing" in capsys.readouterr().err
