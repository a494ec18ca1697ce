"""New plugins: each kind is written, installed, and passes its own tests; what will not do is refused."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import opkit
from opkit import cli
from opkit.errors import PluginError
from opkit.plugins import manifest, scaffold, toml
from opkit.testing.plugin import command

ROOT = Path(opkit.__file__).parents[1]


@pytest.mark.parametrize("kind", scaffold.KINDS)
def test_a_project_holds_together(tmp_path, kind):
    files = {
        path.relative_to(tmp_path / "opkit-fast").as_posix()
        for path in scaffold.write("fast", kind, tmp_path)
    }
    assert {
        "pyproject.toml", "README.md", ".gitignore", ".github/workflows/test.yml", "opkit_fast/py.typed",
        "opkit_fast/__init__.py", "opkit_fast/opkit-plugin.toml", "tests/test_opkit_fast.py",
    } <= files  # fmt: skip
    project = tmp_path / "opkit-fast"
    for file in files:
        text = (project / file).read_text()
        assert not re.search(r"yourname|\{\{ ?(name|entry)|\{%", text), file
        if file.endswith(".py"):
            compile(text, file, "exec")
    told = toml.loads((project / "pyproject.toml").read_text())["project"]
    said = manifest.parse((project / "opkit_fast" / "opkit-plugin.toml").read_text(), "here")
    assert (told["name"], told["version"], list(told["entry-points"]["opkit.plugins"])) == (
        "opkit-fast", said.version, [said.name],
    )  # fmt: skip
    assert (said.device is not None) == (kind == "device")


@pytest.mark.parametrize(
    "kind",  # one in Python is tested from its wheel, in test_wheels.py
    [
        pytest.param(kind, marks=pytest.mark.soak if kind == "kernel-python" else ())
        for kind in scaffold.KINDS
    ],
)
@pytest.mark.slow
def test_a_new_plugin_passes_its_own_tests(tmp_path, kind):
    """The device's library takes half a minute to compile, with the compiler to itself."""
    scaffold.write("fresh_one", kind, tmp_path)
    project, site = tmp_path / "opkit-fresh_one", tmp_path / "site"
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", site, project], check=True)
    boot = (
        site / "opkit_boot_of_tests-1.0.dist-info"
    )  # where opkit was installed before it had the entry point
    boot.mkdir()
    (boot / "METADATA").write_text("Metadata-Version: 2.1\nName: opkit-boot-of-tests\nVersion: 1.0\n")
    (boot / "entry_points.txt").write_text("[torch.backends]\nopkit = opkit_boot:boot\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OPKIT_") or k == "OPKIT_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        env={
            **clean,
            "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
            "XDG_CONFIG_HOME": str(tmp_path),
        },
        cwd=project,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 16


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("Fast", "Write fast"),
        ("fast-one", "Write fast_one"),
        ("opkit-fast", "Write fast"),
        ("../fast", "Write fast"),
        ("1st", "Write st"),
        ("", "Write fast"),
        ("import", "Write my_import"),
        ("torch", "Write my_torch"),
        ("a__b", "Write a_b"),
    ],
)
def test_a_name_that_will_not_do(tmp_path, name, advice):
    with pytest.raises(
        PluginError, match=rf"found the name '{name}'.*expected a lower-case word.*{advice}\."
    ):
        scaffold.write(name, "kernel-python", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_device_does_not_take_a_name_of_torchs(tmp_path):
    with pytest.raises(PluginError, match=r"found the name 'cuda', which Python, torch or opkit has taken"):
        scaffold.write("cuda", "device", tmp_path)


def test_an_unknown_kind(tmp_path):
    with pytest.raises(
        PluginError, match="its kind is 'kernel'; expected one of kernel-python, kernel-cpp, device"
    ):
        scaffold.write("fast", "kernel", tmp_path)


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "opkit-fast").mkdir()
    with pytest.raises(
        opkit.OpkitError, match=r"opkit-fast exists; expected a folder that does not.*by --into"
    ):
        scaffold.write("fast", "device", tmp_path)
    assert list((tmp_path / "opkit-fast").iterdir()) == []


def test_the_command_writes_and_says_what_to_do(tmp_path, capsys):
    assert cli.main(["plugins", "new", "fast", "--kind", "kernel-cpp", "--into", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "opkit-fast" / "opkit_fast" / "scale.cpp") in said
    assert f"cd {tmp_path / 'opkit-fast'} && pip install -e '.[test]' && python -m pytest" in said
    assert cli.main(["plugins", "new", "fast", "--kind", "kernel-cpp", "--into", str(tmp_path)]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err


def test_the_command_knows_the_kinds(capsys):
    assert cli.main(["plugins", "new", "fast", "--kind", "else"]) == 2
    said = capsys.readouterr().err
    assert all(kind in said for kind in scaffold.KINDS)


def test_the_command_that_tests_chooses_the_device_and_returns_what_pytest_does(fresh, monkeypatch):
    device = "[device]\nname = 'own'\nstub = 'own.stub'\nloader = 'own.library:load'\n"
    fresh.install("own", "def register(registry): pass", manifest=device)
    ran = {}

    def call(words, env):
        ran.update(command=words, device=env["OPKIT_DEVICE"], module=Path(words[-1]).read_text())
        return 5

    monkeypatch.setattr(command.subprocess, "call", call)
    assert cli.main(["plugins", "test", "own"]) == 5
    assert ran["command"][:3] == [sys.executable, "-m", "pytest"]
    assert ran["device"] == "own"
    assert "name = 'own'" in ran["module"]


def test_the_command_that_tests_needs_pytest(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plugins", "test", "fast"]) == 1
    assert "pytest is not installed" in (said := capsys.readouterr().err)
    assert "pip install 'torch-opkit[test]'" in said


def test_the_command_that_tests_refuses_what_is_not_installed(capsys):
    assert cli.main(["plugins", "test", "no-such-plugin"]) == 1
    assert "no-such-plugin: it is not installed" in capsys.readouterr().err
