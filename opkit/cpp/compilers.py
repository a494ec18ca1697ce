"""Which compilers there are, and which GPUs to compile for.

`find_*` answers None where `get_*` raises. Nothing here compiles a kernel, and nothing is
looked for before it is asked for: opkit imports on machines without a compiler.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
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

from opkit import _logs
from opkit.cpp import _roots, cache
from opkit.errors import BuildError, ConfigError

_WITHOUT_NVCC = "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
_DEFAULT_ARCHITECTURES = ("8.0", "9.0+PTX")
_AGAIN_AFTER = 1.0  # seconds until a compiler that was not there is looked for again
_LOG = _logs.logger("build")
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
    return f"nvcc was not found (set CUDA_HOME, or for light kernels {_WITHOUT_NVCC})"


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
        f"or set CUDA_HOME to the folder that has bin/nvcc. Light kernels do without it: {_WITHOUT_NVCC}."
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


def native_macros(cxx: Compiler, flags: Sequence[str]) -> str:
    """Return a hash of what `-march=native` and the like among `flags` mean on this machine, or nothing."""
    named = [flag for flag in flags if "native" in flag]
    parts = [part for flag in named for part in re.split(r",|(?<=options)=|(?<=Xcompiler)=", flag)]
    native = tuple(part for part in parts if part.startswith("-m") and "native" in part)
    if not native:
        return ""
    command = [*cxx.command, *native, "-dM", "-E", "-x", "c++", os.devnull]
    return known(("native", cxx.version, native, _processor()), lambda: cache.digest(_output(command)))


@functools.cache
def _processor() -> str:
    """Return what identifies the processor: its model and what it can do."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(8192).split("\n\n")[0]
    except OSError:
        return platform.processor()
    # The clock's frequency changes from one look to the next.
    return "\n".join(line for line in first.splitlines() if not line.startswith(("cpu MHz", "bogomips")))


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


def build_environment(temporary: Path | None = None) -> dict[str, str]:
    """Return the environment that compilers run in; `temporary` is where they put what they throw away."""
    return {
        # So that __DATE__ does not make every build another one, unless the user says which date it is.
        "SOURCE_DATE_EPOCH": "0",
        **os.environ,
        # Diagnostics are parsed: no translations, no typographic quotes.
        "LC_ALL": "C",
        **({"TMPDIR": str(temporary)} if temporary else {}),
    }


class _Quoted:
    """A command as a shell takes it, put together only where it is read."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command

    def __str__(self) -> str:
        return shlex.join(self._command)


def execute(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a compiler in a build's folder; what it says is all in `stdout`."""
    _LOG.debug("$ %s", _Quoted(command))
    return subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=build_environment(folder),
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


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
    launched = len(command) > 1 and os.path.basename(command[0]) in LAUNCHERS
    found = _which(command[1] if launched else command[0])
    if not found:
        return None
    real = os.path.realpath(found)
    stat = os.stat(real)
    return _probe(command, found, real, (stat.st_size, stat.st_mtime_ns))


def _which(name: str) -> str | None:
    """Return what `shutil.which` does, which is slower."""
    if os.sep in name:
        return shutil.which(name)
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(folder, name)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return None


@functools.cache
def _probe(command: tuple[str, ...], path: str, real: str, stamp: tuple[int, int]) -> Compiler | None:
    # `stamp` is in the arguments so that a compiler replaced under a running process is asked anew.
    # Where the compiler lies is no part of its version: a cache is shared by machines.
    def ask() -> str:
        return _output([*command, "--version"]).strip()

    # What a script starts may change while it stays the same, so that its answers are not kept.
    version, script = known(("version", command, real, stamp), lambda: "" if _script(real) else ask()), ""
    if not version and (script := _script(real)):
        version = ask()
    flags = [word for word in command[1:] if word.startswith("-")]
    told = f"{version}\n{stamp[0]} bytes {script} {flags}"
    return Compiler(Path(path).absolute(), told, command) if version else None


def _script(file: str) -> str:
    """Return what tells a wrapper around a compiler from others, or nothing where it is a compiler itself."""
    if os.path.basename(file) in LAUNCHERS:
        return os.path.basename(file)
    with open(file, "rb") as stream:
        start = stream.read(2)
        return cache.digest(stream.read()) if start == b"#!" else ""


def known(question: tuple[object, ...], ask: Callable[[], str]) -> str:
    """Return what a compiler says, or a file holds, from the cache, where an earlier process has left it.

    Starting a compiler takes longer than finding a built kernel. An answer belongs to the size and the
    time of what was asked, which are in the question; an empty one is not kept.
    """
    file, key = f"{_roots.own()}/compilers.json", cache.digest(*question)
    answers = _answers.setdefault(file, {})
    if key not in answers:
        answers.update(_written(file))
    if key not in answers:
        answer = ask()
        if not answer:
            return ""
        answers[key] = answer
        unique = f"{file}.{os.getpid()}"
        with contextlib.suppress(OSError):  # no cache yet, read-only, full: the next process asks again
            Path(unique).write_text(json.dumps({**_written(file), **answers}))
            os.replace(unique, file)
    return answers[key]


_answers: dict[str, dict[str, str]] = {}  # of each cache folder, as far as they were needed


def _written(file: str) -> dict[str, str]:
    try:
        with open(file, "rb", buffering=0) as stream:
            found = json.loads(stream.read())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


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
