"""The plugins of `plugins/`, and one that `opkit plugins new` writes, pass the conformance suite from their wheels.

They are installed where nothing else of opkit's is. `make test` runs this where the plugins' dependencies are
installed; a plugin whose dependency is missing is skipped, with its name.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import opkit
from opkit.plugins import scaffold
from tests import documents

pytestmark = pytest.mark.slow

ROOT = Path(opkit.__file__).parents[1]
# Each plugin, and the module without which it has nothing to test.
NEEDS = {
    "jax": "jax",
    "numba": "numba",
    "refdev": "",
    "triton": "triton",
    "tvm-ffi": "tvm_ffi",
    "written": "",
}
# Why a test of the suite may be skipped: what it tests is not part of the plugin, or not of this machine.
SKIPPED = (
    "it brings no device",
    "it states no properties",
    "its manifest names no ops",
    "its manifest names no kernels",
    "there is no device cuda here",
    "there is no call of one of its kernels that this machine can make",
)
_BUILT = shutil.ignore_patterns("__pycache__", "build", "dist", "*.egg-info", "_prebuilt", "tests")
_OWN = ("opkit", "torch_opkit", "__editable__", "__pycache__")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The folder of an environment with what is installed here, but for opkit and its plugins: these from wheels."""
    place = tmp_path_factory.mktemp("wheels")
    for project in ROOT.glob("plugins/*/pyproject.toml"):
        shutil.copytree(project.parent, place / "sources" / project.parent.name, ignore=_BUILT)
    scaffold.write("written", "kernel-python", place / "sources")
    opkit_itself = place / "sources" / "opkit"
    for name in ("opkit", "kernels"):
        shutil.copytree(ROOT / name, opkit_itself / name, ignore=_BUILT)
    for name in ("opkit_boot.py", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, opkit_itself)
    options = ["--disable-pip-version-check", "--quiet", "--no-deps", "--no-index"]
    wheel = ["wheel", "--no-build-isolation", "--wheel-dir", place / "wheels", *(place / "sources").iterdir()]
    subprocess.run([sys.executable, "-m", "pip", *wheel, *options], check=True)

    made = place / "environment"
    venv.create(made, symlinks=True)
    (site,) = made.glob("lib/python3*/site-packages")
    for folder in filter(Path.is_dir, map(Path, sys.path)):
        if any(folder.glob("*.dist-info")):
            for entry in folder.iterdir():
                if not entry.name.startswith(_OWN) and not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)
    install = [made / "bin/python", "-m", "pip", "install", *options, *(place / "wheels").iterdir()]
    subprocess.run(install, env=alone(), check=True)
    return made


def alone():
    """Return this process's variables without those that show another environment's packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def run(environment, *words):
    """Run opkit there, in a folder of nobody's, and return the process that has ended.

    Libraries that the plugins' own tests have built, in the user's cache, are not built again.
    """
    return subprocess.run(
        [environment / "bin/python", "-m", "opkit", *words],
        env={**alone(), "OPKIT_CACHE_PATH": str(Path("~/.cache/opkit").expanduser())},
        cwd=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_every_plugin_has_a_place_here(environment):
    found = run(environment, "plugins", "list")
    assert found.returncode == 0, found.stderr
    assert {line.split()[0] for line in found.stdout.splitlines()} == set(NEEDS)
    assert {project.name for project in ROOT.glob("plugins/opkit-*")} == {
        f"opkit-{name}" for name in NEEDS if name != "written"
    }


@pytest.mark.parametrize("name", NEEDS)
def test_a_plugin_passes_the_suite_from_its_wheel(environment, name):
    needed = NEEDS[name]
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed, which the plugin {name} needs")
    done = run(environment, "plugins", "test", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 12, done.stdout
    unknown = [
        line for line in done.stdout.splitlines() if line.startswith("SKIPPED") and not line.endswith(SKIPPED)
    ]
    assert not unknown


@pytest.mark.parametrize("name", [name for name in NEEDS if name != "written"])
def test_the_python_of_a_plugins_readme_runs(environment, name, tmp_path):
    if NEEDS[name] and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed, which the plugin {name} needs")
    blocks = documents.blocks(ROOT / "plugins" / f"opkit-{name}" / "README.md")
    program = tmp_path / "program.py"
    program.write_text("\n".join(block.body for block in blocks if block.kind == "python"))
    assert program.read_text()
    told = {"refdev": {"OPKIT_DEVICE": "refdev"}, "triton": {"TRITON_INTERPRET": "1"}}.get(name, {})
    cache = {"OPKIT_CACHE_PATH": str(Path("~/.cache/opkit").expanduser())}
    done = subprocess.run(
        [environment / "bin/python", program],
        env={**alone(), **cache, **told}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
