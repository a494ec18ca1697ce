"""Every block of the README: Python runs, text is what it printed, commands and entry points exist."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import subprocess
from pathlib import Path

import pytest

import opkit

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def test_readme_blocks_are_of_known_kinds():
    assert {kind for kind, _ in BLOCKS} == {"python", "text", "sh", "toml"}


@pytest.mark.slow
def test_readme_python_prints_what_the_readme_says(registry):
    namespace: dict[str, object] = {"__name__": "readme"}
    printed = ""
    for kind, body in BLOCKS:
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, "README.md", "exec"), namespace)
            printed = out.getvalue()
        elif kind == "text":
            assert doctest.OutputChecker().check_output(body, printed, FLAGS), printed
    plugin = namespace["register"]
    assert callable(plugin)


def test_readme_plugin_registers_its_kernel(registry):
    body = next(b for kind, b in BLOCKS if kind == "python" and "def register" in b)
    namespace: dict[str, object] = {}
    exec("import torch\n" + body, namespace)
    added = []

    class Recorder:
        def register_kernel(self, op, device, *, backend):
            assert opkit.get(op)
            return lambda function: added.append((op, device, backend))

    namespace["register"](Recorder())
    assert added == [("opkit::swiglu", "cpu", "fast")]


def test_readme_commands_are_targets_of_the_makefile():
    commands = [line.split("#")[0].split() for kind, b in BLOCKS if kind == "sh" for line in b.splitlines()]
    assert [c[0] for c in commands] == ["make"] * len(commands)
    for command in commands:
        done = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_readme_links_lead_somewhere():
    prose = re.sub(r"^```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)]+)\)", prose)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
