"""What the wheel holds: the sources and the manifest, and where it was built into the package, the library."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from opkit_refdev import library

PROJECT = Path(__file__).parents[1]


@pytest.mark.parametrize("carries", [False, True], ids=["sources", "library"])
def test_the_wheel(tmp_path, carries):
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "_prebuilt", "tests")
    project = shutil.copytree(PROJECT, tmp_path / "project", ignore=ignored)
    inside = library.prebuilt().relative_to(Path(library.__file__).parents[1])
    if carries:
        (project / inside).parent.mkdir(parents=True)
        (project / inside).write_bytes(b"a library")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(project)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("opkit-plugin.toml", "stub.py", "csrc/refdev.h", "csrc/memory.cpp"):
        assert f"opkit_refdev/{name}" in names
    assert (str(inside) in names) == carries
    assert wheel.name.endswith("-none-any.whl") != carries


def test_the_carried_library_is_for_this_torch_and_python():
    path = library.prebuilt()
    assert path.parent.name == f"torch-{torch.__version__}"
    assert path.name == f"opkit_refdev_native{sysconfig.get_config_var('EXT_SUFFIX')}"
