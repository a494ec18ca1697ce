"""opkit's conformance suite for plugins: here, and on a copy whose kernels are for the CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import opkit_triton
import pytest

import opkit.testing.plugin

pytest.importorskip("triton", reason="triton is not installed: pip install triton")


class TestPlugin(opkit.testing.plugin.Suite):
    name = "triton"


@pytest.mark.slow
def test_interpreted_on_the_cpu_the_kernels_pass_the_suite(tmp_path):
    package = shutil.copytree(
        Path(opkit_triton.__file__).parent,
        tmp_path / "opkit_triton",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    manifest = package / "opkit-plugin.toml"
    text = manifest.read_text()
    assert text.count('device = "cuda"') == 2
    manifest.write_text(text.replace('device = "cuda"', 'device = "cpu"'))
    info = tmp_path / "opkit_triton-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: opkit-triton\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[opkit.plugins]\ntriton = opkit_triton:register\n")
    own = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "opkit", "plugins", "test", "triton"],
        env={**os.environ, **own}, cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no device cuda" not in done.stdout
