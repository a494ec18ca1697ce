"""What mypy and pyright see of ops: those of decorated functions, and with stubs those that are reached by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
USAGES = ("usage.py", "usage_reached.py")


def plain(text: str) -> str:
    """A revealed type without the modules of its names."""
    text = re.sub(r"(?:builtins|usage|reached\.\w+|tests\.typing\.usage|torch(?:\._tensor)?)\.", "", text)
    text = re.sub(r"tuple\[.*fallback=(\w+)\]", r"\1", text)
    return re.sub(r"(?:Union\[(\w+), None\])", r"\1 | None", text)


def expected(name: str) -> tuple[dict[int, str], set[int]]:
    """What the comments of a file say: the types that lines reveal, and the lines that are errors."""
    lines = list(enumerate((HERE / name).read_text().splitlines(), 1))
    revealed = {i: m.group(1) for i, line in lines if (m := re.search(r"# reveal: (.+)$", line))}
    return revealed, {i for i, line in lines if line.rstrip().endswith("# error")}


@pytest.fixture(scope="module")
def project(tmp_path_factory, session_cache):
    """A folder with the package `reached`, its stubs, and the files that use it."""
    folder = tmp_path_factory.mktemp("typing")
    shutil.copytree(
        HERE / "reached", folder / "reached", ignore=shutil.ignore_patterns("*.ref", "__pycache__")
    )
    for name in USAGES:
        shutil.copy(HERE / name, folder)
    # Of an editable install pyright finds nothing.
    (folder / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"})
    )
    environment = {**os.environ, "OPKIT_CACHE_DIR": str(session_cache), "OPKIT_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "opkit", "stubs", "reached"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        str(folder / "reached" / f"{name}.pyi") for name in ("names", "_opkit_ops")
    ]
    return folder


@pytest.mark.parametrize("name", ["names", "_opkit_ops"])
def test_stubs_are_as_they_were(project, name):
    written = project / "reached" / f"{name}.pyi"
    assert written.read_text() == (HERE / "reached" / f"{name}.pyi.ref").read_text(), (
        f"if it is right: cp {written}"
    )


@pytest.fixture(scope="module")
def mypy(project):
    """What mypy says of the files."""
    pytest.importorskip("mypy", reason="needs mypy")
    options = [
        "--config-file",
        "pyproject.toml",
        "--no-error-summary",
    ]  # here, for the cache that `make lint` filled
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *(project / name for name in USAGES), project / "reached"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MYPYPATH": str(project)},
    )  # fmt: skip
    return run.stdout + run.stderr


@pytest.mark.parametrize("name", USAGES)
def test_mypy_sees_parameters_defaults_and_fields(mypy, name):
    revealed, errors = expected(name)
    file = re.escape(f"/{name}")
    notes = dict(re.findall(rf'{file}:(\d+): note: Revealed type is "(.+)"', mypy))
    assert {int(line): plain(text) for line, text in notes.items()} == revealed
    assert {int(line) for line in re.findall(rf"{file}:(\d+): error", mypy)} == errors, mypy


def test_mypy_finds_nothing_wrong_with_the_stubs(mypy):
    assert not re.findall(r"^.*/reached/.*error.*$", mypy, re.MULTILINE)


@pytest.fixture(scope="module")
def pyright(project):
    """What pyright says of the files: for each its name, the line, the kind and the text."""
    command = Path(sys.executable).parent / "pyright"
    if not command.exists() and not shutil.which("pyright"):
        pytest.skip("needs pyright")
    run = subprocess.run(
        [str(command if command.exists() else "pyright"), "--outputjson", "--pythonpath", sys.executable,
         *(project / name for name in USAGES), *project.glob("reached/*.pyi")],
        capture_output=True, text=True, cwd=project,
    )  # fmt: skip
    if not run.stdout.lstrip().startswith("{"):
        pytest.skip(f"pyright does not run here: {run.stderr.strip().splitlines()[-1:]}")
    found = json.loads(run.stdout)["generalDiagnostics"]
    return [
        (Path(d["file"]).name, d["range"]["start"]["line"] + 1, d["severity"], d["message"]) for d in found
    ]


@pytest.mark.parametrize("name", USAGES)
def test_pyright_sees_parameters_defaults_and_fields(pyright, name):
    revealed, errors = expected(name)
    lines = [(line, kind, text) for file, line, kind, text in pyright if file == name]
    notes = {line: re.search(r'is "(.+)"', text) for line, kind, text in lines if kind == "information"}
    assert {line: plain(m.group(1)) for line, m in notes.items() if m} == revealed
    assert {line for line, kind, _ in lines if kind == "error"} == errors, lines


def test_pyright_finds_nothing_wrong_with_the_stubs(pyright):
    assert not [found for found in pyright if found[0].endswith(".pyi") and found[2] == "error"]
