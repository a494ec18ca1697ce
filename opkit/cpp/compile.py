"""One translation unit to one shared library, through the cache.

The library is linked against empty stubs with the names of torch's libraries: what it needs of
torch is found in the process that loads it, so building needs no torch and takes a tenth of a
second. What is in the unit is the business of whoever writes it (`opkit.cpp.light`).
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opkit.cpp import _includes, cache, diagnostics, toolchain
from opkit.cpp._progress import building
from opkit.cpp.toolchain import Compiler
from opkit.errors import BuildError

INCLUDE = Path(__file__).parent / "include"

_FORMAT = 2  # raise it when what is built from the same source changes
_CXX_FLAGS = (
    "-O3",
    "-DNDEBUG",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",  # `#pragma omp simd` without OpenMP's library
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",  # fused multiply-add, which gcc switches off under -std=c++20
)
_CUDA_FLAGS = ("-O3", "-DNDEBUG", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--expt-extended-lambda")
# Flags that put file names or line numbers into the library.
_KEEPS_PLACES = ("-g", "--coverage", "-ftest-coverage", "-lineinfo", "--generate-line-info", "-G")
_INCLUDED = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"(/[^"\n]+)"', re.MULTILINE)
_PLACED = re.compile(r'^[ \t]*#[ \t]*line[ \t]+\d+[ \t]+"([^"\n]+)"', re.MULTILINE)


def shared_library(
    unit: str,
    *,
    label: str,
    op: str | None = None,
    cuda: bool = False,
    include_paths: Sequence[Path] = (),
    extra_cflags: Sequence[str] = (),
    extra_cuda_cflags: Sequence[str] = (),
    extra_ldflags: Sequence[str] = (),
) -> Path:
    """Compile one translation unit and return the shared library's path.

    What was built before, by any process, is returned without compiling and without a word.

    >>> shared_library('extern "C" int one() { return 1; }', label="doc [cpp]")  # doctest: +SKIP
    PosixPath('.../doc-cpp-0f3a.../doc-cpp.so')

    Args:
        unit: the source text; it includes the user's files by absolute path.
        label: what is built, for texts: `demo::rms_norm [cpp]`.
        op: the op's qualified name, for the error.
        cuda: compile with nvcc for `toolchain.cuda_architectures()`.
        include_paths: folders for `#include`, after opkit's own.
        extra_cflags: flags for the C++ compiler, which also compiles the host part of CUDA code.
        extra_cuda_cflags: flags for nvcc.
        extra_ldflags: flags for the linker.

    Raises:
        BuildError: it does not compile; the error lines are in the text and in `diagnostics`.
    """
    cxx = toolchain.get_cxx()
    job = _Job(
        unit=unit,
        label=label,
        op=op,
        cxx=cxx,
        nvcc=toolchain.get_nvcc() if cuda else None,
        architectures=toolchain.cuda_architectures() if cuda else (),
        include_paths=(INCLUDE, *(path.absolute() for path in include_paths)),
        cflags=tuple(flag.strip() for flag in extra_cflags),
        cuda_cflags=tuple(flag.strip() for flag in extra_cuda_cflags),
        ldflags=tuple(flag.strip() for flag in extra_ldflags),
    )
    return cache.obtain(job.key, label=label, build=job.build)


@dataclass(frozen=True)
class _Job:
    unit: str
    label: str
    op: str | None
    cxx: Compiler
    nvcc: Compiler | None
    architectures: tuple[str, ...]
    include_paths: tuple[Path, ...]
    cflags: tuple[str, ...]
    cuda_cflags: tuple[str, ...]
    ldflags: tuple[str, ...]

    @functools.cached_property
    def sources(self) -> list[Path]:
        """The user's files: those that the unit includes by absolute path, and those that its text is from."""
        placed = [name for name in _PLACED.findall(self.unit) if name.startswith("/")]
        return [Path(name) for name in dict.fromkeys([*_INCLUDED.findall(self.unit), *placed])]

    @property
    def keeps_places(self) -> bool:
        return any(flag.startswith(_KEEPS_PLACES) for flag in (*self.cflags, *self.cuda_cflags))

    @property
    def unit_name(self) -> str:
        return "unit.cu" if self.nvcc else "unit.cpp"

    def key(self) -> str:
        """Hash everything that decides what the library does: no paths, no times."""
        return cache.digest(
            _FORMAT,
            (sys.platform, platform.machine()),
            (self.cxx.version, self.nvcc.version if self.nvcc else None),
            (_CXX_FLAGS, _CUDA_FLAGS if self.nvcc else ()),
            self.architectures,
            _includes.without_paths(self.cflags),
            _includes.without_paths(self.cuda_cflags),
            self.ldflags,
            _includes.linked_files(self.ldflags),
            _includes.variables(),
            self._preprocessed(),
            self._scanned(),
        )

    def build(self, work: cache.Workspace) -> Path:
        library = work.folder / f"{cache.slug(self.label)}.so"
        (work.folder / self.unit_name).write_text(self.unit)
        if self.nvcc:
            steps = [
                [*self._compile(), "-c", self.unit_name, "-o", "unit.o"],
                [*self.cxx.command, "unit.o", *self._link(library.name)],
            ]
        else:
            steps = [[*self._compile(), self.unit_name, *self._link(library.name)]]
        log = ""
        with building(self.label):
            for step in steps:
                done = _run(step, cwd=work.folder)
                log += f"$ {shlex.join(step)}\n{done.stdout}"
                if done.returncode:
                    raise self._failure(work, step, log, done.stdout)
        (work.folder / "log.txt").write_text(log)
        (work.folder / "unit.o").unlink(missing_ok=True)
        return library

    def _compile(self) -> list[str]:
        folders = [f"-I{path}" for path in self.include_paths]
        host = [*_CXX_FLAGS, *self._relative_places(), *self.cflags]
        if not self.nvcc:
            return [*self.cxx.command, "-std=c++20", *folders, *host]
        # A comma separates options for the host compiler.
        forwarded = [word for flag in host for word in ("--compiler-options", flag.replace(",", "\\,"))]
        return [
            *self.nvcc.command,
            *([] if names_host_compiler(self.cuda_cflags) else ["-ccbin", str(self.cxx.path)]),
            *([] if any(flag.startswith(("-std", "--std")) for flag in self.cuda_cflags) else ["-std=c++20"]),
            *folders,
            *_CUDA_FLAGS,
            *toolchain.gencode_flags(self.architectures),
            *forwarded,
            *self.cuda_cflags,
        ]

    def _link(self, output: str) -> list[str]:
        # --no-as-needed: torch loads its libraries so that only those find their symbols that name them.
        stubs = stub_libraries(self.cxx, ("libtorch_cpu.so", "libtorch_cuda.so"))
        flags = ["-shared", "-o", output, f"-L{stubs}", "-Wl,--no-as-needed", "-ltorch_cpu"]
        if self.nvcc:
            folders = toolchain.cuda_library_folders(self.nvcc)
            flags += ["-ltorch_cuda", *(f"-L{folder}" for folder in folders)]
            flags += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        return [*flags, *self.ldflags]

    def _relative_places(self) -> list[str]:
        """Return flags that keep the folder of a source out of `__FILE__`, and so out of the key."""
        if self.keeps_places:  # a debugger needs them
            return []
        folders = dict.fromkeys([*self.include_paths, *(path.parent for path in self.sources)])
        return [f"-fmacro-prefix-map={folder}/=" for folder in folders]

    def _preprocessed(self) -> str:
        """Hash what the compiler sees after preprocessing, with every macro (-march=native shows there)."""
        command = [*self._compile(), "-E"]
        if not self.nvcc:
            command += ["-dD", *([] if self.keeps_places else ["-P"]), "-x", "c++", "-"]
            done = _run(command, stdin=self.unit)
        else:
            # nvcc preprocesses for one architecture; what is only in the others is in _scanned.
            command = [word for word in command if not word.startswith("-gencode")]
            command += [*toolchain.gencode_flags(self.architectures[:1])[:1], "--compiler-options", "-dD"]
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / self.unit_name).write_text(self.unit)
                done = _run([*command, self.unit_name], cwd=Path(folder))
        text = done.stdout
        if done.returncode:
            # It will not compile either, and the compiler says why. Were it to, the key is computed
            # again after the build and differs.
            return f"not preprocessed: {hashlib.sha256(self.unit.encode()).hexdigest()}"
        if self.nvcc and not self.keeps_places:
            text = re.sub(r"^#(?:line)? \d+ .*\n", "", text, flags=re.MULTILINE)
        return hashlib.sha256(text.encode()).hexdigest()

    def _scanned(self) -> list[tuple[str, str]]:
        """Hash the user's text and headers for CUDA, what is under `#if __CUDA_ARCH__` included."""
        if not self.nvcc:
            return []
        flags = (*self.cflags, *self.cuda_cflags)
        scan = _includes.Scan([*self.include_paths, *_includes.include_folders(flags)])
        # Neither where the text is from nor the folders of files; a Python file is not read.
        scan.add_text(_PLACED.sub("", _INCLUDED.sub("", self.unit)), self.unit_name)
        included = [Path(name) for name in _INCLUDED.findall(self.unit)]
        for path in (*included, *_includes.included_files(flags)):
            if path.is_file():
                scan.add_file(path, path.name)
        return scan.contents

    def _failure(self, work: cache.Workspace, step: list[str], log: str, output: str) -> BuildError:
        """Keep the log, the source and a script beside them, and return the error that names them."""
        kept = work.keep()
        # The script and the excerpts name the unit where it is now.
        command = shlex.join(step)
        (kept / "command.sh").write_text(f"#!/bin/sh\ncd {shlex.quote(str(kept))} && LC_ALL=C {command}\n")
        (kept / "log.txt").write_text(log)
        output = re.sub(rf"(?m)^{re.escape(self.unit_name)}(?=[:(])", str(kept / self.unit_name), output)
        return diagnostics.failure(
            output,
            label=self.label,
            op=self.op,
            sources=self.sources,
            log_path=kept / "log.txt",
            command=command,
            command_path=kept / "command.sh",
        )


def names_host_compiler(flags: Sequence[str]) -> bool:
    """Whether nvcc's `flags` say which C++ compiler it uses."""
    return any(flag.startswith(("-ccbin", "--compiler-bindir")) for flag in flags)


def stub_libraries(cxx: Compiler, names: Sequence[str]) -> Path:
    """Return a folder with empty shared libraries called `names`, to link against."""

    def build(work: cache.Workspace) -> Path:
        for name in names:
            command = [*cxx.command, "-shared", "-nostdlib", f"-Wl,-soname,{name}", "-x", "c++", "/dev/null"]
            done = _run([*command, "-o", str(work.folder / name)])
            if done.returncode:
                raise diagnostics.failure(done.stdout, label=f"a stub of {name}", command=shlex.join(command))
        return work.folder / names[0]

    def key() -> str:
        return cache.digest(_FORMAT, sys.platform, platform.machine(), cxx.version, tuple(names))

    return cache.obtain(key, label="stubs", build=build).parent


def _run(
    command: Sequence[str], *, cwd: Path | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=toolchain.build_environment(),
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
