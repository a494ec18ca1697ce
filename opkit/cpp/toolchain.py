"""Toolchains: how source of a language becomes an object file, as a value.

C++ and CUDA are built in. A plugin registers one for a language of its own; files with its suffixes
are then compiled by it wherever opkit compiles: as kernels, and as sources of `opkit.cpp.load`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opkit import _sources
from opkit.cpp import compilers
from opkit.cpp.compilers import Compiler
from opkit.errors import ConfigError

_CXX_FLAGS = (
    "-O3",
    "-DNDEBUG",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",  # or a library with a static in a template could never be unloaded
    "-fopenmp-simd",  # `#pragma omp simd` without OpenMP's library
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # fused multiply-add, which gcc switches off under -std=c++20
)
_CLANG_LACKS = ("-fno-gnu-unique",)
_CUDA_FLAGS = ("-O3", "-DNDEBUG", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--expt-extended-lambda")


@dataclass(frozen=True)
class Options:
    """What a unit is compiled with, whatever the toolchain."""

    compiler: Compiler
    """The toolchain's own."""
    cxx: Compiler
    """The C++ compiler, which links, and compiles the host part of device languages."""
    include_paths: tuple[Path, ...]
    system_paths: tuple[Path, ...]
    """Folders whose headers give no warnings: torch's, Python's."""
    defines: tuple[str, ...]
    """`-D` flags that opkit gives."""
    cflags: tuple[str, ...]
    """The caller's flags for C++."""
    own_flags: tuple[str, ...]
    """The caller's flags for this toolchain."""
    architectures: tuple[str, ...]

    @property
    def folders(self) -> list[str]:
        """The include folders as flags."""
        flags = [f"-I{path}" for path in self.include_paths]
        return flags + [word for path in self.system_paths for word in ("-isystem", str(path))]


@dataclass(frozen=True)
class Toolchain:
    """How source of one language becomes an object file.

    Args:
        name: what it is called in texts; also the default backend of kernels compiled by it.
        suffixes: of its source files, as in `(".cu",)`.
        find: returns its compiler, or None where this machine has none.
        why_none: returns why `find` finds none and what to do, in a few words.
        command: returns the words that compile a unit, without the unit's name, `-c` and `-o`.
        flags: what `command` always adds; part of the cache key.
        compile: compiles a unit where that takes more than `command`, as `opkit.cpp.nvrtc.compile_unit` does.
        abi: what a library's entry points agree on; part of the cache key.
        architectures: returns the devices to compile for; part of the cache key.
        libraries: torch libraries beside libtorch_cpu.so whose symbols its code uses.
        link_flags: returns what the linker needs for its objects.
        prelude: C++ that stands before the kernel, such as the include that gives the current stream.
        guard: a C++ statement of the glue that selects a tensor's device; `{tensor}` is an opkit::Tensor.

    Example:
        >>> from opkit.cpp import compilers
        >>> upper = Toolchain(
        ...     name="upper",
        ...     suffixes=(".upper",),
        ...     find=compilers.find_cxx,
        ...     why_none=compilers.why_no_cxx,
        ...     command=lambda options: [*options.compiler.command, "-x", "c++", "-fPIC", *options.folders],
        ... )
        >>> register(upper)
        >>> for_suffix(".upper").name
        'upper'
        >>> unregister("upper")
    """

    name: str
    suffixes: tuple[str, ...]
    find: Callable[[], Compiler | None]
    why_none: Callable[[], str]
    command: Callable[[Options], Sequence[str]]
    flags: tuple[str, ...] = ()
    compile: Callable[..., subprocess.CompletedProcess[str]] | None = None
    abi: str = "stable-2.10"
    architectures: Callable[[], tuple[str, ...]] = field(default=tuple)
    libraries: tuple[str, ...] = ()
    link_flags: Callable[[Compiler], Sequence[str]] = lambda compiler: ()
    prelude: str = ""
    guard: str = ""


_registered: dict[str, Toolchain] = {}
_promised: dict[str, tuple[tuple[str, ...], Callable[[], object]]] = {}


def register(added: Toolchain) -> None:
    """Let files with the toolchain's suffixes be compiled by it; one of the same name is replaced.

    Raises:
        ConfigError: it is no Toolchain, its name or a suffix is not one, or another toolchain has the suffix.
    """
    doing = "registering a toolchain"
    if not isinstance(added, Toolchain):
        raise ConfigError(
            f"{doing}: found {added!r}; expected an opkit.cpp.Toolchain. Write opkit.cpp.Toolchain(name=..., ...)."
        )
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", added.name):
        raise ConfigError(f"{doing}: its name is {added.name!r}; expected letters, digits, '_'. Rename it.")
    # One text instead of a tuple gives its letters.
    if not all(re.fullmatch(r"\.[\w.+]+", suffix) for suffix in added.suffixes):
        raise ConfigError(
            f"{doing}: {added.name} has the suffixes {added.suffixes!r}; expected a tuple of texts that begin "
            "with a dot. Write suffixes=('.ext',)."
        )
    for other in _registered.values():
        if other.name != added.name and (taken := set(other.suffixes) & set(added.suffixes)):
            raise ConfigError(
                f"{doing}: {added.name} wants the suffix {min(taken)!r}, which {other.name} has; expected "
                "suffixes that no other toolchain has. Choose another suffix."
            )
    _registered[added.name] = added


def unregister(name: str) -> None:
    """Forget a toolchain."""
    _registered.pop(name, None)


def promise(name: str, suffixes: Sequence[str], fetch: Callable[[], object]) -> None:
    """Say that `fetch` will register the toolchain `name`, once it or one of its suffixes is asked for."""
    _promised[name] = tuple(suffixes), fetch


def withdraw(name: str) -> None:
    """Take back a promise."""
    _promised.pop(name, None)


def _fetch(is_wanted: Callable[[str, tuple[str, ...]], bool]) -> None:
    for name, (suffixes, fetch) in list(_promised.items()):
        if is_wanted(name, suffixes):
            fetch()
            _promised.pop(name, None)


def find(name: str) -> Toolchain | None:
    """Return the toolchain called `name`; plugins are asked where none is known."""
    if name not in _registered:
        _sources.consult_for_kernels()
        _fetch(lambda promised, _: promised == name)
    return _registered.get(name)


def for_suffix(suffix: str) -> Toolchain | None:
    """Return the toolchain that compiles files with `suffix`; plugins are asked where none is known."""
    if suffix not in suffixes():
        _sources.consult_for_kernels()
        _fetch(lambda _, promised: suffix in promised)
    return next((known for known in _registered.values() if suffix in known.suffixes), None)


def names() -> list[str]:
    """Return the names of all toolchain."""
    return sorted(_registered)


def suffixes() -> list[str]:
    """Return all suffixes that can be compiled."""
    return [suffix for known in _registered.values() for suffix in known.suffixes]


def names_host_compiler(flags: Iterable[str]) -> bool:
    """Whether nvcc's `flags` say which C++ compiler it uses."""
    return any(flag.startswith(("-ccbin", "--compiler-bindir")) for flag in flags)


def _cxx_command(options: Options) -> list[str]:
    standard = [] if _names_standard(options.cflags) else ["-std=c++20"]
    flags = _for_compiler(options.compiler)
    return [
        *options.compiler.command,
        *standard,
        *options.folders,
        *flags,
        *options.defines,
        *options.cflags,
        *options.own_flags,
    ]


def _cuda_command(options: Options) -> list[str]:
    # A comma separates options for the host compiler.
    host = [*_for_compiler(options.cxx), *options.cflags]
    forwarded = [word for flag in host for word in ("--compiler-options", flag.replace(",", "\\,"))]
    return [
        *options.compiler.command,
        *([] if names_host_compiler(options.own_flags) else ["-ccbin", str(options.cxx.path)]),
        *([] if _names_standard(options.own_flags) else ["-std=c++20"]),
        *options.folders,
        *_CUDA_FLAGS,
        *options.defines,
        *compilers.gencode_flags(options.architectures),
        *forwarded,
        *options.own_flags,
    ]


def _cuda_link_flags(nvcc: Compiler) -> list[str]:
    folders = compilers.cuda_library_folders(nvcc)
    return [*(f"-L{folder}" for folder in folders), "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


def _names_standard(flags: Iterable[str]) -> bool:
    return any(flag.startswith(("-std", "--std")) for flag in flags)


def _for_compiler(cxx: Compiler) -> list[str]:
    lacks = _CLANG_LACKS if "clang" in cxx.version else ()
    return [flag for flag in _CXX_FLAGS if flag not in lacks]


CPP = Toolchain(
    name="cpp",
    suffixes=(".cpp", ".cc", ".cxx", ".c"),
    find=lambda: compilers.find_cxx(),
    why_none=lambda: compilers.why_no_cxx(),
    command=_cxx_command,
    flags=_CXX_FLAGS,
)
CUDA = Toolchain(
    name="cuda",
    suffixes=(".cu",),
    find=lambda: compilers.find_nvcc(),
    why_none=lambda: compilers.why_no_nvcc(),
    command=_cuda_command,
    flags=(*_CXX_FLAGS, *_CUDA_FLAGS),
    architectures=compilers.cuda_architectures,
    libraries=("libtorch_cuda.so",),
    link_flags=_cuda_link_flags,
    guard="DeviceGuard device_guard({tensor});",
)
register(CPP)
register(CUDA)
