"""NVRTC, NVIDIA's compiler for devices, as a library: where it is, and how it is called.

torch's builds for CUDA bring it, and so do packages of pip and CUDA toolkits. Nothing here knows of kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opkit.errors import BuildError


@dataclass(frozen=True)
class Nvrtc:
    """NVRTC as it was found: its library, its version, and the folders of CUDA's headers."""

    library: Path
    include: tuple[Path, ...]
    version: str
    """What tells it from other ones, for keys of caches."""
    major: int
    minor: int


def find() -> Nvrtc | None:
    """Return NVRTC: torch's, of the packages that pip installs, or of the CUDA toolkit; None where there is none.

    It must have the headers of CUDA's runtime beside it, and be of the CUDA that torch is built for.

    >>> nvrtc = find()
    >>> nvrtc is None or nvrtc.library.exists()
    True
    """
    return _search()[0]


def why_none() -> str:
    """Return why `find` finds none, in a few words."""
    return _search()[1]


class RejectedError(Exception):
    """What NVRTC says of a program that it does not compile."""


def compile(
    path: Path, program: bytes, options: Sequence[str], names: Sequence[str]
) -> tuple[list[str], bytes, bytes]:
    """Return the symbols that `names` have in the program, its cubin and its PTX; `path` is NVRTC's."""
    library = _load(path)
    handle = ctypes.c_void_p()
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _expect(library, library.nvrtcCreateProgram(ctypes.byref(handle), program, b"unit.cu", 0, None, None))
    try:
        for name in names:
            _expect(library, library.nvrtcAddNameExpression(handle, name.encode()))
        if status := library.nvrtcCompileProgram(handle, len(options), arguments):
            log = _content(library, handle, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise RejectedError(log or library.nvrtcGetErrorString(status).decode())
        symbols = []
        for name in names:
            symbol = ctypes.c_char_p()
            _expect(library, library.nvrtcGetLoweredName(handle, name.encode(), ctypes.byref(symbol)))
            symbols.append((symbol.value or b"").decode())
        return symbols, _content(library, handle, "CUBIN"), _content(library, handle, "PTX").rstrip(b"\0")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(handle))


def _content(library: ctypes.CDLL, handle: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _expect(library, getattr(library, f"nvrtcGet{what}Size")(handle, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _expect(library, getattr(library, f"nvrtcGet{what}")(handle, content))
    return content.raw


def _expect(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise RejectedError(library.nvrtcGetErrorString(status).decode())


def supported(nvrtc: Nvrtc) -> list[str]:
    """Return the architectures that NVRTC compiles for, as in `['8.0', '9.0']`."""
    library = _load(nvrtc.library)
    count = ctypes.c_int()
    _expect(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    _expect(library, library.nvrtcGetSupportedArchs(numbers))
    return [f"{number // 10}.{number % 10}" for number in numbers]


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        if builtins := _builtins(path):  # NVRTC itself looks for it only where the loader does
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    except OSError as err:
        raise BuildError(
            f"loading NVRTC, which compiles CUDA source where there is no nvcc: {err}. Expected a library for this "
            "machine. Reinstall the package that it belongs to: pip install --force-reinstall nvidia-cuda-nvrtc."
        ) from err
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


_found: dict[tuple[object, ...], Nvrtc] = {}


def _search() -> tuple[Nvrtc | None, str]:
    """Return NVRTC, or why there is none; only what is found is remembered."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    key = (*homes, *sys.path)
    if key in _found:
        return _found[key], ""
    import torch

    cuda = int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None
    suffix = "-cu12" if cuda == 12 else ""
    why = f"NVRTC was not found (pip install nvidia-cuda-nvrtc{suffix} nvidia-cuda-runtime{suffix})"
    for library in _libraries(homes):
        numbered = re.search(r"\.so\.(\d+)", library.name)
        major = int(numbered[1]) if numbered else 0
        if cuda and major != cuda:
            why = f"{library} is not of CUDA {cuda}, which torch is built for"
            why += f" (pip install nvidia-cuda-nvrtc{suffix} nvidia-cuda-runtime{suffix})"
        elif include := _headers(library, homes, major):
            builtins = max(
                library.parent.glob("libnvrtc-builtins.so*"), key=lambda p: len(p.name), default=None
            )
            numbered = re.search(r"\.so\.\d+\.(\d+)", builtins.name) if builtins else None
            minor = int(numbered[1]) if numbered else 0
            version = f"NVRTC {major}.{minor}, {library.stat().st_size} bytes"
            _found[key] = Nvrtc(library, include, version, major, minor)
            return _found[key], ""
        else:
            why = f"{library} has no headers of CUDA's runtime (pip install nvidia-cuda-runtime{suffix})"
    return None, why


def _loaded() -> list[Path]:
    """Return NVRTC's library where this process has loaded it: torch does so when it first needs it."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return [Path(name) for name in dict.fromkeys(re.findall(r"(/\S*/libnvrtc\.so\S*)$", maps, re.MULTILINE))]


def _libraries(homes: Sequence[str | None]) -> Iterator[Path]:
    """Yield NVRTC's libraries: those that are loaded, that pip installed, and of CUDA toolkits, newest first."""
    yield from _loaded()
    folders = [folder for place in sys.path for folder in sorted(Path(place or ".").glob("nvidia/*/lib"))]
    folders += [Path(home) / lib for home in homes if home for lib in ("lib64", "lib")]
    for folder in folders:
        yield from sorted(folder.glob("libnvrtc.so.[0-9]*"), reverse=True)


def _builtins(library: Path) -> Path | None:
    """Return the library that NVRTC itself loads, by the name with the whole version."""
    return max(library.parent.glob("libnvrtc-builtins.so*"), key=lambda path: len(path.name), default=None)


def _headers(library: Path, homes: Sequence[str | None], major: int) -> tuple[Path, ...]:
    """Return the folders of CUDA's headers that fit a library, or nothing."""
    folders = [library.parent.parent / "include"]
    folders += [
        folder for place in sys.path for folder in sorted(Path(place or ".").glob("nvidia/*/include"))
    ]
    folders += [Path(home) / "include" for home in homes if home]
    for folder in folders:
        header = folder / "cuda_runtime_api.h"
        if header.is_file():
            found = re.search(r"#define CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
            if found and int(found[1]) // 1000 == major:
                more = folder / "cccl"
                return (folder.resolve(), *([more.resolve()] if more.is_dir() else []))
    return ()


def _main(library: str, source: str, *arguments: str) -> int:
    """Compile a program for the device, as the error of a build says to repeat it."""
    at = arguments.index("--")
    try:
        compile(Path(library), Path(source).read_bytes(), arguments[:at], arguments[at + 1 :])
    except RejectedError as rejected:
        print(rejected, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
