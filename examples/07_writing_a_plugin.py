"""What this teaches: a distribution that adds kernels to ops of other people.

07_plugin/ is a complete one: a pyproject.toml with an entry point in the group "opkit.plugins", and a module with
the function that it names. An application finds it by having it installed, without importing it:

    pip install ./07_plugin

This file is the application. It runs itself without the plugin, with it, with plugins turned off, and with a
broken one. So that nothing of your environment changes, `install` writes what pip would into a temporary folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import opkit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@opkit.op("demo::rms_norm", shapes="*b n, n -> *b n")
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide each row by its root mean square, and multiply it by weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def application() -> None:
    """Use the op, as a program does that knows of no plugin."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 256), torch.randn(256)
    exact = rms_norm.reference(x.double(), weight.double())
    torch.testing.assert_close(rms_norm(x, weight).double(), exact, rtol=1e-5, atol=1e-6)
    print(rms_norm.explain(x, weight))
    print(opkit.plugins.why("fast"))


def install(project: Path, folder: Path) -> None:
    """Put the modules of a project into a folder, with the metadata that its pyproject.toml asks for."""
    told = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    for module in project.glob("*.py"):
        shutil.copy(module, folder)
    info = folder / f"{told['name'].replace('-', '_')}-{told['version']}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {told['name']}\nVersion: {told['version']}\n"
    )
    with info.joinpath("entry_points.txt").open("w") as file:
        for group, points in told["entry-points"].items():
            print(f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), sep="\n", file=file)


def run(title: str, **variables: str) -> str:
    """Run the application in a process of its own, and return what it printed."""
    child = [sys.executable, __file__, "application"]
    environment = {**os.environ, **variables}
    answer = subprocess.run(child, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(f"--- {title}\n{answer.stdout}")
    return answer.stdout


def main() -> None:
    """Run the application in four environments."""
    with tempfile.TemporaryDirectory() as folder:
        install(Path(__file__).parent / "07_plugin", Path(folder))
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))

        without = run("without the plugin")
        assert "reference  selected" in without
        installed = run("installed", PYTHONPATH=path)
        assert "fast       selected" in installed
        assert "opkit-fast 1.0" in installed
        off = run("installed, and OPKIT_AUTOLOAD=0", PYTHONPATH=path, OPKIT_AUTOLOAD="0")
        assert "reference  selected" in off

        # A plugin that fails does no harm: a warning, and the application goes on.
        Path(folder, "opkit_fast.py").write_text("import opkit_fast_and_missing\n")
        broken = run("installed, and broken", PYTHONPATH=path)
        assert "reference  selected" in broken
        assert "ModuleNotFoundError" in broken


if __name__ == "__main__":
    if sys.argv[1:] == ["application"]:
        application()
    else:
        main()
