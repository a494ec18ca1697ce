"""Which compilers there are, and which GPUs to compile for.

`find_*` answers None where `get_*` raises. Nothing here compiles a kernel, and nothing is
looked for before it is asked for: opkit imports on machines without a compiler.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opkit.errors import BuildError, ConfigError

LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
_DEFAULT_ARCHITECTURES = ("8.0", "9.0+PTX")
_AGAIN_AFTER = 1.0  # seconds until a compiler that was not there is looked for again
_ARCHITECTURE = re.compile(r"\d{1,2}\.\d[af]?(\+PTX)?")
# torch's names of generations, for TORCH_CUDA_ARCH_LIST=Hopper (torch/utils/cpp_extension.py, named_arches)
_GENERATIONS = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


@dataclass(frozen=True)
class Compiler:
    """A compiler that answers: its file, what identifies it, and the words that start it.

    `command` differs from `path` where $CXX names a launcher: `CXX="ccache g++"`.
    """

    path: Path
    version: str
    command: tuple[str, ...]


def find_cxx() -> Compiler | None:
    """Return the C++ compiler: $CXX, else g++, clang++ or c++ on PATH; None where there is none.

    >>> compiler = find_cxx()
    >>> compiler is None or compiler.path.exists()
    True
    """
    return _remembered(_search_cxx, "PATH", "CXX")


def why_no_cxx() -> str:
    """Return why `find_cxx` finds none, in a few words."""
    if chosen := os.environ.get("CXX"):
        return f"CXX is {chosen!r}, which does not run (correct CXX or unset it)"
    return "no C++ compiler was found (install g++ or set CXX)"


def get_cxx() -> Compiler:
    """Return the C++ compiler.

    Raises:
        BuildError: there is none, or $CXX names one that does not run.
    """
    if compiler := find_cxx():
        return compiler
    if chosen := os.environ.get("CXX"):
        raise BuildError(
            f"looking for a C++ compiler: CXX is {chosen!r}, which does not run. "
            "Expected a compiler such as g++ or /usr/bin/clang++; correct CXX or unset it."
        )
    raise BuildError(
        "looking for a C++ compiler: none of $CXX, g++, clang++ and c++ is on PATH. "
        "Install one (apt install g++, dnf install gcc-c++, conda install gxx) or set CXX."
    )


def find_nvcc() -> Compiler | None:
    """Return nvcc: from $CUDA_HOME or $CUDA_PATH, PATH or /usr/local/cuda; None where there is none."""
    return _remembered(_search_nvcc, "PATH", "CUDA_HOME", "CUDA_PATH")


def why_no_nvcc() -> str:
    """Return why `find_nvcc` finds none, in a few words."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            return f"{variable} is {home!r}, whose bin/nvcc does not run (correct {variable} or unset it)"
    return "nvcc was not found (set CUDA_HOME)"


def get_nvcc() -> Compiler:
    """Return nvcc.

    Raises:
        BuildError: there is none, or $CUDA_HOME has none.
    """
    if compiler := find_nvcc():
        return compiler
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = f"{home}/bin/nvcc does not run" if home else "it is neither on PATH nor in /usr/local/cuda/bin"
    raise BuildError(
        f"looking for nvcc, which compiles CUDA sources: {found}. "
        "Install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads, conda install cuda-nvcc) "
        "or set CUDA_HOME to the folder that has bin/nvcc."
    )


@functools.cache
def cuda_home(nvcc: Compiler) -> Path:
    """Return the folder of the CUDA toolkit that `nvcc` belongs to."""
    # nvcc may be a script that starts another one; only nvcc itself knows where it lives.
    answer = _output([*nvcc.command, "--dryrun", "-E", "-x", "cu", os.devnull])
    found = re.search(r"^#\$ TOP=(.+)$", answer, re.MULTILINE)
    return Path(found[1].strip()).resolve() if found else nvcc.path.resolve().parent.parent


def cuda_library_folders(nvcc: Compiler) -> list[Path]:
    """Return the folders of the CUDA toolkit that have libraries to link."""
    home = cuda_home(nvcc)
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    return [folder for folder in folders if folder.is_dir()]


def find_ninja() -> Path | None:
    """Return the ninja executable: on PATH, or beside this Python even where no venv is activated."""
    beside = (str(Path(sys.executable).parent), sysconfig.get_path("scripts"))
    found = shutil.which("ninja", path=os.pathsep.join((os.environ.get("PATH", os.defpath), *beside)))
    return Path(found) if found else None


def get_ninja() -> Path:
    """Return the ninja executable.

    Raises:
        BuildError: there is none.
    """
    if ninja := find_ninja():
        return ninja
    raise BuildError(
        "looking for ninja, which builds extensions with torch's headers: it is neither on PATH nor "
        f"beside {sys.executable}. Install it: pip install ninja."
    )


def cuda_architectures() -> tuple[str, ...]:
    """Return the GPU architectures to compile for, as in `('8.0', '9.0+PTX')`.

    TORCH_CUDA_ARCH_LIST if it is set, else those of the devices, else 8.0 and 9.0+PTX.

    Raises:
        ConfigError: TORCH_CUDA_ARCH_LIST has an entry that is no architecture.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not text or text == "native":
        return _device_architectures() or _DEFAULT_ARCHITECTURES
    architectures: dict[str, None] = {}
    for entry in re.split(r"[;,\s]+", text.strip(";, ")):
        for architecture in _GENERATIONS.get(entry, entry).split(";"):
            if not _ARCHITECTURE.fullmatch(architecture):
                raise ConfigError(
                    f"reading TORCH_CUDA_ARCH_LIST: found {entry!r} in {text!r}; expected architectures "
                    f"separated by semicolons or spaces, or one of {', '.join(_GENERATIONS)}, native. "
                    "Write for instance TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'."
                )
            architectures[architecture] = None
    return tuple(architectures)


def gencode_flags(architectures: Sequence[str]) -> list[str]:
    """Return nvcc's flags for `architectures`.

    >>> gencode_flags(["9.0+PTX"])
    ['-gencode=arch=compute_90,code=sm_90', '-gencode=arch=compute_90,code=compute_90']
    """
    flags = []
    for architecture in architectures:
        number = architecture.split("+")[0].replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def build_environment() -> dict[str, str]:
    """Return the environment that compilers run in."""
    return {
        # So that __DATE__ does not make every build another one, unless the user says which date it is.
        "SOURCE_DATE_EPOCH": "0",
        **os.environ,
        # Diagnostics are parsed: no translations, no typographic quotes.
        "LC_ALL": "C",
    }


def _device_architectures() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return ()
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(f"{major}.{minor}" for major, minor in sorted(capabilities))


_memory: dict[tuple[object, ...], tuple[Compiler | None, object, float]] = {}


def _remembered(search: Callable[[], Compiler | None], *variables: str) -> Compiler | None:
    """Return what `search` finds; PATH is searched again where `variables` or the compiler changed."""
    key = (search, *map(os.environ.get, variables))
    compiler, stamp, when = _memory.get(key, (None, None, -_AGAIN_AFTER))
    if compiler is None:
        if time.monotonic() - when < _AGAIN_AFTER:
            return None
    elif _stamp(compiler.path) == stamp:
        return compiler
    compiler = search()
    _memory[key] = (compiler, _stamp(compiler.path) if compiler else None, time.monotonic())
    return compiler


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _search_cxx() -> Compiler | None:
    if chosen := os.environ.get("CXX"):
        try:
            return _identify(tuple(shlex.split(chosen)))
        except ValueError:  # quotes that do not close
            return None
    for name in ("g++", "clang++", "c++"):
        if compiler := _identify((name,)):
            return compiler
    return None


def _search_nvcc() -> Compiler | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            return _identify((str(Path(home) / "bin" / "nvcc"),))
    return _identify(("nvcc",)) or _identify(("/usr/local/cuda/bin/nvcc",))


def _identify(command: tuple[str, ...]) -> Compiler | None:
    """Return the compiler that `command` starts, or None where it does not run."""
    if not command:
        return None
    launched = len(command) > 1 and Path(command[0]).name in LAUNCHERS
    found = shutil.which(command[1] if launched else command[0])
    if not found:
        return None
    real = Path(found).resolve()
    stat = real.stat()
    return _probe(command, Path(found), real, (stat.st_size, stat.st_mtime_ns))


@functools.cache
def _probe(command: tuple[str, ...], path: Path, real: Path, stamp: tuple[int, int]) -> Compiler | None:
    # `stamp` is in the arguments so that a compiler replaced under a running process is asked anew.
    version = _output([*command, "--version"])
    return Compiler(path.absolute(), f"{version.strip()}\n{real}", command) if version else None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
