"""What libraries of opkit's own driver are linked with: the bodies of opkit's headers, and stubs of torch's libraries.

The stubs are empty and have only the names: what a library needs of torch is found in the process that loads it, so
linking needs no torch and takes no time.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from opkit.cpp import cache, compilers, diagnostics, toolchain
from opkit.cpp.compilers import Compiler
from opkit.cpp.toolchain import Options

INCLUDE = Path(__file__).parent / "include"
_GLUE = INCLUDE / "opkit" / "glue.cpp"
_HEADERS = sorted(f"{folder}/{name}" for folder, _, names in os.walk(INCLUDE) for name in names)
_FORMAT = 3  # raise it when what is built from the same source changes


@functools.cache
def package_headers() -> str:
    """Hash opkit's own headers, which are the same for every kernel of the process."""
    stamps = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, _HEADERS)]

    def read() -> str:
        contents = [(path.relative_to(INCLUDE), path.read_bytes()) for path in map(Path, _HEADERS)]
        return cache.digest(*((str(name), hashlib.sha256(content).hexdigest()) for name, content in contents))

    return compilers.known(("headers", _HEADERS, stamps), read)


def glue_object(cxx: Compiler) -> Path:
    """Return the bodies of opkit's headers, compiled: what most of compiling a light kernel would be."""

    def build(work: cache.Workspace) -> Path:
        # -Og, which compiles fastest: little of it is more than a few calls of torch.
        options = Options(cxx, cxx, (INCLUDE,), (), (), ("-Og", "-ffunction-sections"), (), ())
        command = [*toolchain.CPP.command(options), "-c", str(_GLUE), "-o", "glue.o"]
        done = compilers.execute(command, work.folder)
        if done.returncode:
            raise diagnostics.failure(done.stdout, label="the glue", command=shlex.join(command))
        return work.folder / "glue.o"

    def key() -> str:
        machine = (sys.platform, platform.machine())
        return cache.digest(_FORMAT, *machine, cxx.version, toolchain.CPP.flags, package_headers())

    return cache.obtain(key, label="glue", build=build)


def stub_libraries(cxx: Compiler, names: Sequence[str]) -> Path:
    """Return a folder with empty shared libraries called `names`, to link against."""
    names = sorted(set(names))

    def build(work: cache.Workspace) -> Path:
        for name in names:
            command = [
                *cxx.command,
                "-shared",
                "-nostdlib",
                f"-Wl,-soname,{name}",
                "-x",
                "assembler",
                "/dev/null",
            ]
            done = compilers.execute([*command, "-o", name], work.folder)
            if done.returncode:
                raise diagnostics.failure(done.stdout, label=f"a stub of {name}", command=shlex.join(command))
        return work.folder / names[0]

    def key() -> str:
        return cache.digest(_FORMAT, sys.platform, platform.machine(), cxx.version, tuple(names))

    return cache.obtain(key, label="stubs", build=build).parent
