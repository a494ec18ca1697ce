"""What `opkit doctor` looks at: the machine, the environment and opkit's own parts, each by one finding or several.

`failure`: something that opkit offers does not work here. `warning`: it works, slower or not all of it. Nothing is
built, no plugin is loaded, and torch is imported once; a check that cannot go on is a failure, and the next one runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import opkit
from opkit import _config
from opkit.cli import _imports
from opkit.cpp import _roots, compilers
from opkit.errors import OpkitError, did_you_mean

OLDEST_TORCH = "2.11"
_LEAST_ROOM = 500 * 2**20
_PROGRAM = (
    '#include <cstdint>\n#include <span>\nextern "C" int64_t f(std::span<const int64_t> x) { return x[0]; }\n'
)
_DRIVER = Path("/proc/driver/nvidia/version")


class Finding(NamedTuple):
    """What a check found: `ok`, a `warning` or a `failure`, which come with what to do."""

    check: str
    status: Literal["ok", "warning", "failure"]
    found: str
    remedy: str = ""


def findings(imports: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield what every check finds; `imports` are modules and files that define ops."""
    yield from _checked("opkit", _opkit)
    yield from _checked("variables", _variables)
    torch, found = _torch()
    yield found
    if torch is not None:
        yield from _checked("GPU", functools.partial(_gpu, torch))
    yield from _checked("C++ compiler", _cxx)
    if torch is not None:
        yield from _checked("nvcc", functools.partial(_nvcc, torch))
    yield from _checked("ninja", _ninja)
    yield from _checked("cache folder", _cache)
    if torch is not None:
        for name in imports:
            yield from _checked(name, functools.partial(_ops_of, name))
        yield from _checked("native core", _core)
    yield from _checked("plugins", _plugins)


def _checked(check: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except OpkitError as error:
        yield _failure(check, error)
    except Exception as error:  # of torch, a driver, a package's metadata: the next checks may say why
        said = str(error).partition("\n")[0]
        found = f"looking at it failed with {type(error).__name__}: {said}"
        yield Finding(
            check, "failure", found, "Report it to opkit's authors, with what opkit doctor --json prints."
        )


def _failure(check: str, error: OpkitError) -> Finding:
    """Return an error as a finding: the last sentence of its text says what to do."""
    found, end, remedy = str(error).partition("\n")[0].rpartition(". ")
    return (
        Finding(check, "failure", found + end.strip(), remedy) if found else Finding(check, "failure", remedy)
    )


def _opkit() -> Iterator[Finding]:
    where = f"{opkit.__version__} on Python {platform.python_version()}, {sys.platform} {platform.machine()}"
    if sys.platform.startswith("linux"):
        yield Finding("opkit", "ok", where)
    else:
        remedy = "Register kernels in Python here, and build native ones on Linux."
        yield Finding("opkit", "warning", f"{where}: native kernels are built on Linux only", remedy)


def _variables() -> Iterator[Finding]:
    """Compare the environment with the table of variables: a misspelt one says nothing by itself."""
    well = True
    for name in sorted(name for name in os.environ if name.startswith("OPKIT_")):
        if name not in _config.VARIABLES:
            remedy = f"Correct or unset it.{did_you_mean(name, _config.VARIABLES)}"
            yield Finding("variables", "warning", f"{name} is set, and opkit knows no such variable", remedy)
            well = False
            continue
        try:
            _config.get(name)
        except OpkitError as error:
            yield _failure("variables", error)
            well = False
    if well:
        given = [f"{name}={os.environ[name]}" for name in _config.VARIABLES if os.environ.get(name)]
        told = re.sub(r"//[^/@\s]*@", "//***@", ", ".join(given))  # what is printed here is shown to others
        yield Finding("variables", "ok", told or "none is set")


def _torch() -> tuple[ModuleType | None, Finding]:
    """Return torch, or None where it does not import, and what is to say of it."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return None, Finding("torch", "failure", "it is not installed", "Install it: pip install torch.")
        return None, _broken(error)
    except Exception as error:  # a library that does not load, or what another package has it load
        return None, _broken(error)
    version = str(torch.__version__)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < tuple(map(int, OLDEST_TORCH.split("."))):
        remedy = f"Install a newer one: pip install 'torch>={OLDEST_TORCH}'."
        return None, Finding("torch", "failure", f"{version}; opkit needs {OLDEST_TORCH} or newer", remedy)
    built = torch.version.hip and f"ROCm {torch.version.hip}"
    built = built or (f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone")
    return torch, Finding("torch", "ok", f"{version}, built for {built}")


def _broken(error: Exception) -> Finding:
    remedy = "Try python -c 'import torch', and with TORCH_DEVICE_BACKEND_AUTOLOAD=0, which keeps other packages out."
    said = str(error).partition("\n")[0]
    return Finding("torch", "failure", f"importing it failed with {type(error).__name__}: {said}", remedy)


def _gpu(torch: ModuleType) -> Iterator[Finding]:
    if torch.cuda.is_available():
        names = dict.fromkeys(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("GPU", "ok", ", ".join(names))
    elif not _DRIVER.exists():
        yield Finding("GPU", "ok", "torch.cuda finds none, and there is no driver of NVIDIA")
    elif torch.version.cuda is None:
        remedy = "Install a torch for CUDA: https://pytorch.org/get-started/locally."
        yield Finding(
            "GPU", "warning", "there is a driver of NVIDIA, and this torch is not built for CUDA", remedy
        )
    else:
        try:
            torch.cuda.init()
            why = "it finds no device"
        except Exception as error:
            why = str(error).partition("\n")[0]
        remedy = "Look at nvidia-smi and CUDA_VISIBLE_DEVICES; update an old driver, or install a torch for its CUDA."
        yield Finding(
            "GPU", "warning", f"there is a driver of NVIDIA, and torch cannot use it: {why}", remedy
        )


def _cxx() -> Iterator[Finding]:
    cxx = compilers.get_cxx()
    name = f"{cxx.version.splitlines()[0]} ({cxx.path})"
    if said := _refusal(cxx):
        remedy = (
            "Install a compiler for C++20 with its standard library (apt install g++), or set CXX to one."
        )
        yield Finding("C++ compiler", "failure", f"{name} does not compile a small program: {said}", remedy)
    else:
        yield Finding("C++ compiler", "ok", name)


def _refusal(cxx: compilers.Compiler) -> str:
    """Return what a compiler says of a small library, or nothing where it builds it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "unit.cpp").write_text(_PROGRAM)
        words = [*cxx.command, "-std=c++20", "-shared", "-fPIC", "unit.cpp", "-o", "unit.so"]
        done = compilers.execute(words, folder)
    said = done.stdout.strip().splitlines()
    wrong = [line for line in said if "error" in line] or said
    return "" if done.returncode == 0 else wrong[0] if wrong else f"exit code {done.returncode}"


def _nvcc(torch: ModuleType) -> Iterator[Finding]:
    """Compare nvcc with the CUDA of torch: what the one compiles runs in a process with the other."""
    if torch.version.hip:
        remedy = "Write kernels for this GPU in Python or Triton."
        found = f"not needed: torch is built for ROCm {torch.version.hip}, and opkit compiles CUDA for NVIDIA alone"
        yield Finding("nvcc", "warning", found, remedy)
        return
    nvcc = compilers.find_nvcc()
    if nvcc is None:
        yield _without_nvcc(torch)
        return
    from opkit.cpp import _aten

    _aten.fitting("CUDA kernels", nvcc)
    release = re.search(r"\brelease ([\d.]+)", nvcc.version)
    found = f"CUDA {release[1] if release else '(unknown)'} ({nvcc.path})"
    yield Finding("nvcc", "ok", found if torch.version.cuda else f"{found}; torch does not need it")


def _without_nvcc(torch: ModuleType) -> Finding:
    from opkit.cpp import _nvrtc

    if named := next((name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None):
        found = f"{named} is {os.environ[named]!r}, whose bin/nvcc does not run"
        needed = torch.version.cuda is not None
        return Finding("nvcc", "failure" if needed else "warning", found, f"Correct {named} or unset it.")
    if torch.version.cuda is None:
        return Finding("nvcc", "ok", "not found, and not needed: torch is built for the CPU alone")
    toolkit = f"Install the toolkit of CUDA {torch.version.cuda.split('.')[0]} and set CUDA_HOME to it"
    if (nvrtc := _nvrtc.find()) is not None:
        found = f"not found; NVRTC {nvrtc.major}.{nvrtc.minor} compiles light kernels, and no others"
        return Finding("nvcc", "warning", found, f"{toolkit}, if there are others.")
    status: Literal["warning", "failure"] = "failure" if torch.cuda.is_available() else "warning"
    found = f"not found, and {_nvrtc.why_none()}: no CUDA kernel can be compiled"
    return Finding("nvcc", status, found, f"{toolkit}.")


def _ninja() -> Iterator[Finding]:
    ninja = compilers.get_ninja()
    if importlib.util.find_spec("setuptools") is None:
        found = f"{ninja}; but setuptools, which torch's build files take, is not installed"
        yield Finding("ninja", "failure", found, "Install it: pip install setuptools.")
    else:
        yield Finding("ninja", "ok", str(ninja))


def _cache() -> Iterator[Finding]:
    doing = "looking at the cache"
    folder = _roots.make(doing)
    try:
        with tempfile.TemporaryFile(dir=f"{folder}/tmp"):
            pass
    except OSError as error:
        raise _roots.unwritable(doing, error) from None
    _roots.readable(doing)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        found = f"{folder} is on a file system from which no library can be loaded (noexec)"
        yield Finding("cache folder", "failure", found, "Set OPKIT_CACHE_DIR to a folder on another one.")
        return
    room = shutil.disk_usage(folder).free
    if room < _LEAST_ROOM:
        found = f"{folder} has only {room / 2**20:.0f} MiB of room left"
        yield Finding("cache folder", "warning", found, "Run opkit cache clean, or make room on the disk.")
    else:
        yield Finding("cache folder", "ok", f"{folder}, {room / 2**30:.1f} GiB of room")


def _ops_of(name: str) -> Iterator[Finding]:
    """Import what defines ops, and say which of their kernels cannot be built here."""
    before = set(opkit.list_ops())
    _imports.run([name])
    ops = [opkit.get(known) for known in opkit.list_ops() if known not in before]
    missing: dict[str, list[str]] = {}
    for op in ops:
        for kernel in op.kernels:
            if kernel.status == "rejected":
                missing.setdefault(kernel.reason, []).append(f"{op.name} [{kernel.backend}]")
    for reason, kernels in missing.items():
        remedy = "Other kernels or the reference run in their place; what is said in parentheses helps."
        yield Finding(name, "warning", f"{', '.join(kernels)} cannot be built here: {reason}", remedy)
    if not missing:
        yield Finding(name, "ok", f"it defines {', '.join(op.name for op in ops) or 'no op'}")


def _core() -> Iterator[Finding]:
    from opkit.dispatch import native
    from opkit.dispatch.native import library

    module = native.core()
    if module is not None:
        yield Finding("native core", "ok", f"{module.__file__}")
        return
    must = _config.get("OPKIT_NATIVE") == "1"
    status: Literal["warning", "failure"] = "failure" if must else "warning"
    told = "OPKIT_NATIVE=1 asks for it, and" if must else "calls go through Python, which is slower:"
    if reason := library.unsupported():
        remedy = "Unset OPKIT_NATIVE." if must else "Nothing; what ops compute is the same."
        yield Finding("native core", status, f"{told} {reason}", remedy)
    elif _config.get("OPKIT_NATIVE") == "0":
        yield Finding("native core", "warning", f"{told} OPKIT_NATIVE is 0", "Unset OPKIT_NATIVE.")
    elif failure := library.find_failure():
        log = f" The log is {failure.log}." if failure.log else ""
        remedy = f"Run opkit build --native, which tries again and shows more.{log}"
        yield Finding("native core", status, f"{told} {failure.message.partition(chr(10))[0]}", remedy)
    else:
        remedy = (
            "Run opkit build --native; or wait, as it is built in the background when an op is first called."
        )
        yield Finding(
            "native core", "warning", "calls go through Python, which is slower: it is not built yet", remedy
        )


def _plugins() -> Iterator[Finding]:
    from opkit.plugins import doctor, loader, story

    states = loader.states()
    wrong = [story.record(state) for state in states if state.is_wrong]
    for plugin in wrong:
        status = f"{plugin.status} ({plugin.cause})" if plugin.cause else plugin.status
        found = f"{plugin.name} of {plugin.distribution} {plugin.version} is {status}: {plugin.reason}"
        remedy = f"{plugin.remedy} opkit plugins why {plugin.name} says more.".strip()
        yield Finding("plugins", "failure", found, remedy)
    unseen = list(doctor.unseen(states))
    for text in unseen:
        found, _, remedy = text.rpartition(". ")
        yield Finding("plugins", "warning", found, remedy)
    for what, why in doctor.autoloaded():
        if why:
            found, _, remedy = why.partition(". ")
            yield Finding("plugins", "failure", f"torch loads {what} when it is imported: {found}", remedy)
    if not wrong and not unseen:
        names = ", ".join(state.found.name for state in states)
        found = f"{names}; opkit plugins doctor --probe loads each" if names else "none is installed"
        yield Finding("plugins", "ok", found)
