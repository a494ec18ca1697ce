"""What this teaches: a package that ships its kernels compiled.

11_prebuilt_package/ is a complete one: an op with a C++ and a CUDA kernel, and a setup.py of one call. To build a
wheel of your own, where torch and opkit are installed:

    pip wheel --no-build-isolation --no-deps ./11_prebuilt_package

This file does it in a temporary folder, looks into the wheel, installs it there, and runs the op where no compiler
is found and nothing is cached. The wheel is for every Python 3 and every torch from 2.11 on this platform. With nvcc
it has the CUDA kernel too, for the architectures in TORCH_CUDA_ARCH_LIST; no GPU is needed to build it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

import opkit

PACKAGE = Path(__file__).parent / "11_prebuilt_package"


def application() -> None:
    """Use the package, as a program does that does not care how its kernels came to be."""
    import opkit_scan

    torch.manual_seed(0)
    a, x = torch.rand(8, 100, dtype=torch.float64), torch.randn(8, 100, dtype=torch.float64)
    with opkit.use_backend("cpp", strict=True):  # the reference is no way out
        torch.testing.assert_close(opkit_scan.linear_scan(a, x), opkit_scan.linear_scan.reference(a, x))
    print(opkit_scan.linear_scan.explain(a, x))


def pip(*arguments: str | Path) -> None:
    """Run pip in this environment, offline: torch and opkit are here already."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *arguments, "--no-index", "--no-deps"],
        env=environment,
        check=True,
    )


def main() -> None:
    """Build the wheel, install it, and run it without a compiler."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project = shutil.copytree(PACKAGE, folder / "project")  # setuptools leaves its own folders there
        pip("wheel", "--no-build-isolation", "--wheel-dir", folder, project)
        (wheel,) = folder.glob("*.whl")
        print(f"built {wheel.name}, with")
        for entry in zipfile.ZipFile(wheel).infolist():
            if "_opkit" in entry.filename:
                print(f"    {entry.filename}  {entry.file_size / 1024:.1f} KiB")
        assert wheel.name.startswith("opkit_scan-1.0-py3-none-linux_")

        pip("install", "--target", folder / "site", wheel)
        nothing = {"PATH": "", "CXX": "/nonexistent/g++", "CUDA_HOME": "/nonexistent"}
        environment = {
            **os.environ,
            **nothing,
            "OPKIT_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH")))),
        }
        subprocess.run([sys.executable, __file__, "application"], env=environment, check=True)
        assert not list(folder.glob("cache/lib/*")), "something was compiled"
        print("nothing was compiled: there was no compiler")


if __name__ == "__main__":
    if sys.argv[1:] == ["application"]:
        application()
    else:
        main()
