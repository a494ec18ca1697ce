"""`opkit doctor`: its report, and what it says of variables, imported ops and plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from opkit import cli
from opkit.cli import _health
from opkit.cpp import compilers

CHECKS = [
    "opkit",
    "variables",
    "torch",
    "GPU",
    "C++ compiler",
    "nvcc",
    "ninja",
    "cache folder",
    "native core",
    "plugins",
]


def test_json_has_every_check_and_a_remedy_for_each_that_is_not_ok(capsys):
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert list(dict.fromkeys(finding["check"] for finding in report["checks"])) == CHECKS
    for finding in report["checks"]:
        assert sorted(finding) == ["check", "found", "remedy", "status"]
        assert finding["found"]
        assert bool(finding["remedy"]) == (finding["status"] != "ok"), finding
    worst = max((f["status"] for f in report["checks"]), key=["ok", "warning", "failure"].index)
    assert (report["status"], code) == (worst, int(worst == "failure"))


FOUND = [
    _health.Finding("torch", "ok", "2.13.0"),
    _health.Finding("native core", "warning", "calls go through Python, " * 5 + "and so on",
                    "Run opkit build --native."),
    _health.Finding("cache folder", "failure", "/a" * 40 + " cannot be written", "Set OPKIT_CACHE_DIR to one."),
]  # fmt: skip


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(_health, "findings", lambda imports: iter(FOUND))


def test_a_pipe_gets_plain_text_in_80_columns(found, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out == textwrap.dedent("""\
        ok       torch         2.13.0
        warning  native core   calls go through Python, calls go through Python, calls
                               go through Python, calls go through Python, calls go
                               through Python, and so on
                               Run opkit build --native.
        failure  cache folder  PATH
                               cannot be written
                               Set OPKIT_CACHE_DIR to one.

        1 failure and 1 warning in 3 checks
        """).replace("PATH", "/a" * 40)


def test_a_terminal_gets_a_table_of_80_columns_in_colour(found, terminal):
    assert terminal("doctor") == 1
    assert terminal.lines[0].split() == ["check", "found"]
    assert any(line.split() == ["ok", "torch", "2.13.0"] for line in terminal.lines)
    assert any(line.endswith("  Set OPKIT_CACHE_DIR to one.") for line in terminal.lines)
    assert terminal.lines[-1] == "1 failure and 1 warning in 3 checks"
    assert max(map(len, terminal.lines)) <= 80
    assert terminal.colours


def test_a_terminal_without_colour_gets_the_same_table(found, terminal, monkeypatch):
    terminal("doctor")
    coloured = terminal.lines
    monkeypatch.setenv("NO_COLOR", "1")
    terminal("doctor")
    assert terminal.lines == coloured
    assert not terminal.colours


def test_a_terminal_without_rich_gets_plain_text(found, terminal, without):
    without("rich")
    assert terminal("doctor") == 1
    assert "\x1b" not in terminal.getvalue()
    assert terminal.lines[0] == "ok       torch         2.13.0"


def test_all_ok_is_exit_code_0_and_so_is_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(_health, "findings", lambda imports: iter(FOUND[:1]))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\n1 checks, all ok\n")
    monkeypatch.setattr(_health, "findings", lambda imports: iter(FOUND[:2]))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\n1 warning in 2 checks\n")


def test_a_check_that_breaks_is_a_failure_and_the_next_one_runs(doctor, monkeypatch):
    def fail(path):
        raise ValueError("odd\nmore")

    monkeypatch.setattr(_health.shutil, "disk_usage", fail)
    remedy = "Report it to opkit's authors, with what opkit doctor --json prints."
    assert doctor("cache folder") == [("failure", "looking at it failed with ValueError: odd", remedy)]
    assert doctor("plugins")


def test_a_process_of_its_own_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from opkit import cli; code = cli.main(['doctor']); heavy = ('opkit_kernels', 'torch._dynamo', "
        "'torch._inductor', 'torch.utils.cpp_extension', 'setuptools', 'rich'); "
        "print([name for name in heavy if name in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.stdout.splitlines()[-1] in ("[] 0", "[] 1"), done.stdout + done.stderr
    assert done.stderr == ""


def test_a_misspelt_variable_is_a_warning(doctor, monkeypatch):
    monkeypatch.setenv("OPKIT_BACKENDS", "cpp")
    assert doctor("variables") == [
        (
            "warning",
            "OPKIT_BACKENDS is set, and opkit knows no such variable",
            "Correct or unset it. Did you mean 'OPKIT_BACKEND'?",
        )
    ]


def test_a_wrong_value_is_a_failure(doctor, monkeypatch):
    monkeypatch.setenv("OPKIT_VALIDATE", "maybe")
    ((status, found, remedy),) = doctor("variables")
    assert status == "failure"
    assert found.startswith("reading OPKIT_VALIDATE: found 'maybe'; expected one of 1, true")
    assert remedy == "Unset it or use a legal value."


def test_variables_are_shown_without_passwords(doctor, monkeypatch):
    monkeypatch.setenv("OPKIT_CACHE_REMOTE", "ftp://me:secret@host/kernels")
    ((_, found, _),) = doctor("variables")
    assert "OPKIT_CACHE_REMOTE=ftp://***@host/kernels" in found


MODULE = """
import opkit
from torch import Tensor

@opkit.op("doctored::plus", shapes="n -> n")
def plus(x: Tensor) -> Tensor:
    return x + 1

plus.register_kernel("cpu", opkit.cpp.kernel("void plus() {}"))
"""


@pytest.fixture
def script(tmp_path, registry, monkeypatch):
    (tmp_path / "doctored.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "doctored", raising=False)
    return "doctored.py"


@pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")
def test_imported_ops_are_ok_where_their_kernels_can_be_built(doctor, script):
    assert doctor(script, "--import", script) == [("ok", "it defines doctored::plus", "")]


def test_imported_ops_whose_kernels_cannot_be_built_are_a_warning(doctor, script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor(script, "--import", script) == [
        (
            "warning",
            "doctored::plus [cpp] cannot be built here: no C++ compiler was found (install g++ or set CXX)",
            "Other kernels or the reference run in their place; what is said in parentheses helps.",
        )
    ]


def test_an_import_that_fails_is_a_failure(doctor):
    assert doctor("nowhere.py", "--import", "nowhere.py") == [
        (
            "failure",
            "importing nowhere.py: there is no such module or file; expected a module that Python finds, or a path to "
            "a .py file.",
            "Correct it, or start in the folder that has it.",
        )
    ]


def _install(site, name, code, manifest=""):
    package, info = site / name, site / f"{name}-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text(code)
    if manifest:
        head = f"schema = 1\nname = {name!r}\nversion = '1.0'\n"
        (package / "opkit-plugin.toml").write_text(head + manifest)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[opkit.plugins]\n{name} = {name}:register\n")


def test_plugins_that_fail_or_do_not_fit_are_failures(tmp_path):
    _install(tmp_path / "site", "broken", "def register(registry):\n    raise ValueError('no such chip')\n")
    _install(tmp_path / "site", "old", "", '[requires]\ntorch = "<2"\n')
    _install(tmp_path / "site", "good", "def register(registry): ...\n")
    (tmp_path / "doctored.py").write_text(MODULE)  # whose kernels are looked at, which has plugins called
    done = subprocess.run(
        [sys.executable, "-m", "opkit", "doctor", "--json", "--import", "doctored.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    broken, old = (finding for finding in checks if finding["check"] == "plugins")
    assert broken["status"] == old["status"] == "failure"
    assert broken["found"].startswith("broken of broken 1.0 is failed: ")
    assert "ValueError: no such chip" in broken["found"]
    assert broken["remedy"].endswith("opkit plugins why broken says more.")
    assert old["found"].startswith("old of old 1.0 is rejected (version): it requires torch <2")
    assert old["remedy"].startswith("Install torch <2, or a version of old for torch ")
