"""Every block of the README: Python runs, text is what it printed, the plugin loads, commands exist."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_readme_plugin_is_found_and_its_kernel_runs(tmp_path):
    code = next(b for kind, b in BLOCKS if kind == "python" and "def register" in b)
    entry_points = next(b for kind, b in BLOCKS if kind == "toml")
    group, name, target = re.fullmatch(
        r'\[project.entry-points."(.+)"\]\n(\w+) = "(.+)"\n', entry_points
    ).groups()
    (tmp_path / f"{target.split(':')[0]}.py").write_text("import torch\n" + code)
    info = tmp_path / "readme_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: readme-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    use = """
import opkit, torch
from opkit_kernels import swiglu
x = torch.randn(4)
with opkit.use_backend("fast"):
    print(swiglu.explain(x, x).selected, torch.equal(swiglu(x, x), torch.nn.functional.silu(x) * x))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", use], env=environment, capture_output=True, text=True)
    assert done.stdout == "fast True\n", done.stderr


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
