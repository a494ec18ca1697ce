"""`opkit new`: what it writes passes its own tests, a package from its wheel; and which names it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import opkit
from opkit import _scaffold, cli
from opkit.cpp import compilers
from opkit.errors import OpkitError
from opkit.plugins import toml

ROOT = Path(opkit.__file__).parents[1]
WITHOUT_COMPILER = {"PATH": "", "CXX": "/nonexistent/g++", "CUDA_HOME": "/nonexistent"}
needs_compiler = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")


def new(*words) -> int:
    return cli.main(["new", *map(str, words)])


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def run(command, cwd, **variables) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OPKIT_", "PYTHON", "PYTEST_"))}
    environment = {
        **clean,
        "OPKIT_CACHE_DIR": os.environ["OPKIT_CACHE_DIR"],
        "OPKIT_NATIVE": "0",
        **variables,
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(printed: str) -> int:
    (count,) = re.findall(r"^(\d+) passed", printed.splitlines()[-1])
    return int(count)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The Python of an environment made with venv, which finds what is installed in this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    here = Path(torch.__file__).parent.parent
    site.joinpath("here.pth").write_text(f"import site; site.addsitedir({str(here)!r})\n{ROOT}\n")
    return folder / "bin" / "python"


# ---------------------------------------------------------------- what is written


@needs_compiler
def test_a_new_op_passes_its_own_tests(tmp_path, environment, capsys):
    assert new("op", "fresh::blend", "--into", tmp_path) == 0
    folder = tmp_path / "blend"
    assert files(tmp_path) == {"blend/blend.py", "blend/blend.cpp", "blend/test_blend.py"}
    written = [str(folder / name) for name in ("blend.cpp", "blend.py", "test_blend.py")]
    assert capsys.readouterr().out.splitlines() == [*written, f"to try it: cd {folder} && python -m pytest"]
    assert '@opkit.op("fresh::blend"' in (folder / "blend.py").read_text()
    printed = run([environment, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"], folder)
    assert passed(printed) == 3


def test_an_op_without_a_namespace_gets_one(tmp_path):
    assert new("op", "blend", "--into", tmp_path) == 0
    assert '@opkit.op("mylib::blend"' in (tmp_path / "blend" / "blend.py").read_text()


@needs_compiler
def test_a_new_package_passes_its_own_tests_from_its_wheel_where_there_is_no_compiler(
    tmp_path, environment, capsys
):
    assert new("package", "fresh-ops", "--into", tmp_path) == 0
    project = tmp_path / "fresh-ops"
    assert files(project) == {
        ".github/workflows/test.yml", ".gitignore", "README.md", "pyproject.toml", "setup.py", "tests/test_ops.py",
        *(f"fresh_ops/{name}" for name in ("__init__.py", "ops.py", "opkit-plugin.toml", "py.typed", "scale.cpp")),
    }  # fmt: skip
    assert "pip install --no-build-isolation -e '.[test]' && python -m pytest" in capsys.readouterr().out
    for name in files(project):
        text = (project / name).read_text()
        assert not re.search(r"yourname|\{\{ ?name|\{%|^\n", text), name
    assert toml.loads((project / "pyproject.toml").read_text())["project"]["name"] == "fresh-ops"

    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    run([environment, "-c", build, tmp_path], project)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"fresh_ops-0\.1\.0-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"fresh_ops/_opkit/fresh_ops-scale-cpp-\w+\.so", name) for name in names), names
    assert {"fresh_ops/scale.cpp", "fresh_ops/py.typed", "fresh_ops/opkit-plugin.toml"} <= set(names)
    pip = [sys.executable, "-m", "pip", "--python", environment, "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], tmp_path)

    elsewhere = {
        **WITHOUT_COMPILER,
        "OPKIT_CACHE_DIR": str(tmp_path / "cache"),
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    command = [environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", project / "tests"]
    printed = run(command, tmp_path, **elsewhere)
    assert passed(printed) == 4
    assert not (tmp_path / "cache" / "lib").exists()  # nothing was compiled
    listed = run([environment, "-m", "opkit", "ops", "fresh_ops::*"], tmp_path, **elsewhere)
    assert listed.split()[:5] == ["fresh_ops::scale", "cpu:", "cpp;", "reference", "fresh_ops"]
    told = run([environment, "-m", "opkit", "plugins", "validate", str(project)], tmp_path, **elsewhere)
    assert told.strip().endswith("the plugin is what it says")


def test_a_plugin_is_that_of_opkit_plugins_new(tmp_path, capsys):
    assert new("plugin", "quick", "--into", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert cli.main(["plugins", "new", "quick", "--kind", "kernel-cpp", "--into", str(tmp_path / "b")]) == 0
    assert said == capsys.readouterr().out.replace(str(tmp_path / "b"), str(tmp_path / "a"))
    assert files(tmp_path / "a") == files(tmp_path / "b") != set()
    assert new("plugin", "chip", "--kind", "device", "--into", tmp_path) == 0
    assert "opkit-chip/opkit_chip/csrc/device.cpp" in files(tmp_path)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kind", "name", "folder"),
    [("op", "a::blend", "blend"), ("package", "fast_ops", "fast-ops"), ("plugin", "fast", "opkit-fast")],
)
def test_what_exists_is_left_alone(tmp_path, capsys, kind, name, folder):
    (tmp_path / folder).write_text("mine")
    assert new(kind, name, "--into", tmp_path) == 1
    assert capsys.readouterr().err == (
        f"opkit: writing the {kind} {name}: {tmp_path / folder} exists; expected a folder that does not, as nothing "
        "is overwritten. Choose another name, or another folder by --into.\n"
    )
    assert files(tmp_path) == {folder}
    assert (tmp_path / folder).read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("Blend", "blend"),
        ("a::b-c", "b_c"),
        ("../blend", "blend"),
        ("1st", "st"),
        ("", "scale"),
        ("a__b", "a_b"),
    ],
)
def test_a_name_of_an_op_that_is_no_word(tmp_path, capsys, name, advice):
    assert new("op", name, "--into", tmp_path) == 1
    assert capsys.readouterr().err == (
        f"opkit: writing the op: found the name {name!r}; expected a lower-case word of letters, digits and single "
        f"underscores, for files and a C++ function of that name. Write {advice}.\n"
    )
    assert files(tmp_path) == set()


@pytest.mark.parametrize("name", ["double", "random", "lambda", "torch", "test_scale", "main", "x"])
def test_a_name_of_an_op_that_is_taken(tmp_path, capsys, name):
    assert new("op", f"a::{name}", "--into", tmp_path) == 1
    said = capsys.readouterr().err
    assert f"found the name 'a::{name}', which is taken by Python, C++ or pytest; expected" in said
    assert said.endswith(f"Write my_{name}.\n")


def test_a_namespace_that_will_not_do(tmp_path, capsys):
    assert new("op", "aten::blend", "--into", tmp_path) == 1
    assert (
        "a namespace of torch itself; expected one of your own. Write 'mylib::blend'"
        in capsys.readouterr().err
    )
    assert new("op", "my-lib::blend", "--into", tmp_path) == 1
    assert "the name 'my-lib::blend' is not an op's name; expected namespace::name" in capsys.readouterr().err
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Fast Ops", "found the name 'Fast Ops'; expected .* for a package of that name. Write fast_ops"),
        ("numpy", "found the name 'numpy', which is taken by Python, pytest or another package; .* Write my_numpy"),
        ("email", "found the name 'email', which is taken by Python, pytest or another package; .* Write my_email"),
        ("aten", "a namespace of torch itself"),
    ],
)  # fmt: skip
def test_a_name_of_a_package_that_will_not_do(tmp_path, capsys, name, said):
    assert new("package", name, "--into", tmp_path) == 1
    assert re.search(said, capsys.readouterr().err)
    assert files(tmp_path) == set()


def test_a_kind_that_there_is_not(capsys):
    assert new("kernel", "fast") == 2
    assert "invalid choice: 'kernel'" in (said := capsys.readouterr().err)
    assert all(kind in said for kind in ("op", "package", "plugin"))


def test_nothing_is_written_where_a_template_asks_for_more_than_there_is(tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.txt.in").write_text("{{ name }}")
    (tmp_path / "templates" / "b.txt.in").write_text("{{ nothing }}")
    with pytest.raises(Exception, match="'nothing' is undefined"):
        _scaffold.write("writing", [tmp_path / "templates"], tmp_path / "project", {"name": "a"})
    assert not (tmp_path / "project").exists()


def test_a_dangling_link_is_left_alone(tmp_path):
    (tmp_path / "blend").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OpkitError, match="blend exists"):
        _scaffold.write("writing", [], tmp_path / "blend", {"name": "a"})
