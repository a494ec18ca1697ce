from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

USAGE = Path(__file__).parent / "usage.py"
ROOT = Path(__file__).parents[2]
LINES = USAGE.read_text().splitlines()
REVEALED = {i: m.group(1) for i, line in enumerate(LINES, 1) if (m := re.search(r"# reveal: (.+)$", line))}
ERRORS = {i for i, line in enumerate(LINES, 1) if line.rstrip().endswith("# error")}


def plain(text: str) -> str:
    """A revealed type without the modules of its names."""
    text = re.sub(r"(?:builtins|usage|tests\.typing\.usage|torch(?:\._tensor)?)\.", "", text)
    text = re.sub(r"tuple\[.*fallback=(\w+)\]", r"\1", text)
    return re.sub(r"(?:Union\[(\w+), None\])", r"\1 | None", text)


def test_mypy_sees_parameters_defaults_and_fields():
    pytest.importorskip("mypy", reason="needs mypy")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "pyproject.toml",
        "--no-error-summary",
        str(USAGE),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    out = run.stdout
    notes = dict(re.findall(r'usage\.py:(\d+): note: Revealed type is "(.+)"', out))
    assert {int(line): plain(text) for line, text in notes.items()} == REVEALED
    assert {int(line) for line in re.findall(r"usage\.py:(\d+): error", out)} == ERRORS, out + run.stderr


def test_pyright_sees_parameters_defaults_and_fields():
    pyright = Path(sys.executable).parent / "pyright"
    if not pyright.exists() and not shutil.which("pyright"):
        pytest.skip("needs pyright")
    command = [
        str(pyright if pyright.exists() else "pyright"),
        "--outputjson",
        "--pythonpath",
        sys.executable,
    ]
    run = subprocess.run([*command, str(USAGE)], capture_output=True, text=True, cwd=ROOT)
    if not run.stdout.lstrip().startswith("{"):
        pytest.skip(f"pyright does not run here: {run.stderr.strip().splitlines()[-1:]}")
    found = json.loads(run.stdout)["generalDiagnostics"]
    lines = [(d["range"]["start"]["line"] + 1, d["severity"], d["message"]) for d in found]
    notes = {line: re.search(r'is "(.+)"', text) for line, kind, text in lines if kind == "information"}
    assert {line: plain(m.group(1)) for line, m in notes.items() if m} == REVEALED
    assert {line for line, kind, _ in lines if kind == "error"} == ERRORS, run.stdout
