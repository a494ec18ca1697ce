"""Every block of the README: Python runs, text is what it printed, the plugin loads, commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import documents

ROOT = Path(__file__).parent.parent
BLOCKS = [(block.kind, block.body) for block in documents.blocks(ROOT / "README.md")]


def test_readme_blocks_are_of_known_kinds():
    assert {kind for kind, _ in BLOCKS} == {"python", "text", "sh", "toml"}


@pytest.mark.slow
def test_readme_python_prints_what_the_readme_says(registry):
    documents.run(ROOT / "README.md")


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


def test_readme_commands_exist():
    commands = [
        shlex.split(line, comments=True) for kind, b in BLOCKS if kind == "sh" for line in b.splitlines()
    ]
    assert {command[0] for command in commands} == {"make", "opkit"}
    for program, *words in commands:
        if program == "make":
            command = [program, *words, "--dry-run"]
        else:  # the subcommand and its options
            options = [word for word in words if word.startswith("--")]
            count = 2 if words[0] == "cache" else 1
            command = [sys.executable, "-m", program, *words[:count], "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert program == "make" or all(option in done.stdout for option in options)


def test_readme_links_lead_somewhere():
    prose = re.sub(r"^```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)]+)\)", prose)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
