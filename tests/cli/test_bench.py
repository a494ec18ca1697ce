"""`opkit bench`: what it measures, prints, writes, and answers with its exit code."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

import opkit
from opkit import cli
from opkit.bench import caches

MODULE = """
import opkit, torch
from torch import Tensor

@opkit.op("clibench::scale", shapes="*b n, n -> *b n")
def scale(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight

scale.register_autograd(opkit.from_reference)
scale.register_kernel("cpu", lambda x, w: torch.mul(x, w), backend="fast")
scale.register_kernel("cpu", lambda x, w: x + w, backend="broken", priority=-1)

def case(n, rows=2, dtype=torch.float32):
    return (torch.ones(rows, n, dtype=dtype) + 2, torch.ones(n, dtype=dtype) + 1), {}

def eager(x, weight):
    return x * weight

def broken_case(n):
    return None
"""


@pytest.fixture(autouse=True)
def script(tmp_path, registry, monkeypatch):
    (tmp_path / "clibench_ops.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "clibench_ops", raising=False)
    monkeypatch.setattr(caches, "last_cache", lambda device: 1024)


WORDS = ("clibench::scale", "--case", "clibench_ops.py:case", "--seconds", "0.001", "--over", "n=4,8")
IMPORT = ("--import", "clibench_ops.py")
RIGHT = ("--backend", "fast", "--backend", "reference")


def bench(*words):
    return cli.main(["bench", *WORDS, *IMPORT, *words])


def rows(capsys, *words):
    code = bench("--json", *words)
    return code, [
        (r["name"], r["status"], r["sizes"]["n"], r["dtype"], r["direction"], r["caches"])
        for r in json.loads(capsys.readouterr().out)["rows"]
    ]


def test_what_was_measured_is_printed(capsys):
    assert bench(*RIGHT) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "clibench::scale"
    assert lines[2] == "float32, forward"
    assert lines[3].split() == ["n", "candidate", "warm", "faster", "limit", "cold", "faster", "limit"]
    assert lines[4].split()[:2] == ["4", "fast"]
    assert max(map(len, lines)) <= 80
    assert err.splitlines()[0] == "opkit: measuring clibench::scale [1/2] n=4, float32"


def test_a_wrong_backend_is_exit_code_1(capsys):
    assert bench("--forward", "--caches", "warm") == 1
    assert "wrong: broken at n=4, float32, forward, and 1 more, and not timed" in " ".join(
        capsys.readouterr().out.split()
    )


def test_options_say_what_is_measured(capsys):
    code, found = rows(
        capsys, "--backend", "fast", "--dtype", "float64", "--dtype", "bfloat16", "--caches", "warm", "--forward",
        "--against", "eager=clibench_ops.py:eager", "--over", "n=16", "--over", "rows=1,2", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    once = [
        (name, "timed", 16, dtype, "forward", "warm")
        for dtype in ("float64", "bfloat16")
        for _ in (1, 2)
        for name in ("fast", "eager", "copy")
    ]
    assert found == once


def test_gradients_and_both_caches_are_measured_unless_it_is_said(capsys):
    _, found = rows(capsys, "--backend", "fast", "--over", "n=4")
    assert [row[4:] for row in found if row[0] == "fast"] == [
        ("forward", "warm"), ("forward", "cold"), ("forward + backward", "warm"), ("forward + backward", "cold"),
    ]  # fmt: skip


def test_markdown_is_printed(capsys):
    assert bench(*RIGHT, "--markdown", "--caches", "warm") == 0
    assert capsys.readouterr().out.startswith(
        "### clibench::scale\n\n**float32, forward**\n\n| n   | candidate |"
    )


def test_markdown_and_json_exclude_each_other(capsys):
    assert bench("--markdown", "--json") == 2


def test_a_terminal_gets_a_table_with_colours(terminal):
    pytest.importorskip("rich")
    assert terminal("bench", *WORDS, *IMPORT) == 1
    assert terminal.lines[0] == "clibench::scale"
    assert max(map(len, terminal.lines)) <= 80
    assert "\x1b[31m" in terminal.getvalue()  # what is wrong


def test_a_terminal_without_colours(terminal, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal("bench", *WORDS, *IMPORT)
    assert terminal.colours == set()


def test_a_terminal_without_rich_gets_lines(terminal, without):
    without("rich")
    assert terminal("bench", *WORDS, *IMPORT, *RIGHT) == 0
    assert "\x1b" not in terminal.getvalue()
    assert terminal.lines[2] == "float32, forward"


@pytest.fixture
def steady(monkeypatch):
    """Every call takes as long, whatever else runs here."""
    ticks = itertools.count()
    monkeypatch.setattr("opkit.bench.timing.clock", lambda: next(ticks) * 0.5)


def test_reports_are_saved_and_compared_with(capsys, steady):
    quick = (*RIGHT, "--caches", "warm", "--forward")
    assert bench(*quick, "--save", "saved.json") == 0
    saved = opkit.bench.load("saved.json")
    assert saved.op == "clibench::scale"
    assert bench(*quick, "--baseline", "saved.json") == 0
    assert "clibench::scale against the baseline: 0 slower, 0 faster, 4 the same" in capsys.readouterr().out


def test_what_is_slower_is_exit_code_1(capsys, steady):
    quick = (*RIGHT, "--caches", "warm", "--forward")
    assert bench(*quick, "--save", "saved.json") == 0
    content = json.loads(Path("saved.json").read_text())
    for row in content["rows"]:
        if row["name"] == "fast":
            row["times"] = [1e-9] * len(row["times"])
    Path("saved.json").write_text(json.dumps(content))
    assert bench(*quick, "--baseline", "saved.json") == 1
    assert "slower: fast at n=4, float32, forward, warm: 1 ns before, " in " ".join(
        capsys.readouterr().out.split()
    )


def test_pictures_are_drawn():
    pytest.importorskip("matplotlib")
    bench(*RIGHT, "--caches", "warm", "--plot", "light.svg")
    assert "#ffffff" in Path("light.svg").read_text()
    bench(*RIGHT, "--caches", "warm", "--plot", "dark.svg", "--theme", "dark")
    assert "#0d1117" in Path("dark.svg").read_text()


def test_a_picture_without_matplotlib_is_one_sentence(capsys, without):
    without("matplotlib")
    assert bench(*RIGHT, "--caches", "warm", "--plot", "p.svg") == 1
    assert "pip install 'torch-opkit[bench]'" in capsys.readouterr().err


def test_a_file_that_also_has_the_case_is_imported_once(tmp_path, capsys):
    (tmp_path / "clibench_ops.py").write_text(MODULE + "\nprint('imported')\n")
    bench(*RIGHT, "--caches", "warm", "--forward")
    assert capsys.readouterr().out.count("imported") == 1


def test_without_a_case_the_names_of_the_shape_line_are_sizes(capsys):
    words = [
        "bench",
        "clibench::scale",
        *IMPORT,
        *RIGHT,
        "--over",
        "n=4",
        "--over",
        "b=2",
        "--seconds",
        "0.001",
    ]
    assert cli.main([*words, "--caches", "warm", "--forward", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["sizes"] == {"n": 4, "b": 2}


def test_without_a_case_and_sizes_some_are_chosen(capsys, monkeypatch):
    monkeypatch.setattr("opkit.bench.derived.ELEMENTS", (1024, 2048))
    words = [
        "bench",
        "clibench::scale",
        *IMPORT,
        "--backend",
        "fast",
        "--seconds",
        "0.001",
        "--caches",
        "warm",
    ]
    assert cli.main([*words, "--forward", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["sizes"] for row in rows if row["name"] == "fast"] == [{"b": 1}, {"b": 2}]


def test_ops_of_the_file_of_the_case_are_known(capsys):
    assert cli.main(["bench", *WORDS, *RIGHT, "--caches", "warm"]) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--over", "n"],
            "reading --over n: found no sizes; expected a name, = and sizes. Write for instance: --over n=",
        ),
        (["--over", "n="], "reading --over n=: found no sizes"),
        (["--over", "m=1"], "over= names 'm', which the case does not take; it takes n, rows."),
        (["--over", "n=a"], "the case called with n='a' failed with TypeError: "),
        (
            ["--case", "case"],
            "reading --case case: found no function's name; expected a file or module, a colon and",
        ),
        (
            ["--case", "clibench_ops.py:cases"],
            "reading --case clibench_ops.py:cases: clibench_ops.py has no function 'cases'; expected one of case, "
            "eager, broken_case. Did you mean 'case'? Name the one that returns (args, kwargs).",
        ),
        (["--case", "clibench_ops.py:broken_case"], "the case returned a NoneType; expected (args, kwargs)."),
        (["--case", "nowhere.py:f"], "importing nowhere.py: there is no such module or file"),
        (
            ["--against", "clibench_ops.py:eager"],
            "reading --against clibench_ops.py:eager: found no name; expected a name, = and a function. Write for "
            "instance: --against eager=peers.py:function.",
        ),
        (["--dtype", "float31"], "dtypes= has 'float31'; expected dtypes of torch"),
        (["--backend", "fats"], "backends= names 'fats'; expected some of "),
        (["--baseline", "nowhere.json"], "reading the report nowhere.json: No such file or directory"),
    ],
)
def test_what_cannot_be_measured_is_one_text(capsys, words, text):
    assert bench(*words) == 1
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error


def test_ops_that_cannot_be_measured_are_said(capsys):
    assert cli.main(["bench", "no::op"]) == 1
    assert "benchmarking no::op: no op has that name; known are " in capsys.readouterr().err
    assert cli.main(["bench", "opkit::*norm"]) == 1
    assert "benchmarking opkit::*norm: it means " in capsys.readouterr().err
