"""The device in this process, chosen before torch is imported, and the library built before the first test."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

os.environ["OPKIT_DEVICE"] = "refdev"

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def library():
    """Set the device up as `import torch` does where opkit is installed, and load its library."""
    if not hasattr(torch, "refdev"):
        import opkit_boot

        opkit_boot.boot()
        assert opkit_boot.problem is None, opkit_boot.problem
    torch.ones(1, device="refdev")


@pytest.fixture
def environment():
    """The variables of a new process that sees what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture
def run(tmp_path, environment):
    """Run code in a new process; return what it prints."""

    def run(code: str, *arguments: str) -> str:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(code))
        done = subprocess.run(
            [sys.executable, *arguments, str(script)],
            env=environment,
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
