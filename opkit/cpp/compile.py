"""Translation units to one shared library, through the cache, by opkit's own driver.

What is in the units is the business of whoever writes them (`opkit.cpp.light`, `opkit.cpp.extension`).
What libraries are linked with is in `opkit.cpp._link`.
"""

from __future__ import annotations

import concurrent.futures
import functools
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opkit import _logs
from opkit.cpp import (
    _depfile,
    _includes,
    _jobs,
    _preamble,
    cache,
    compilers,
    diagnostics,
    prebuilt,
    toolchain,
)
from opkit.cpp import tier as tiers
from opkit.cpp._link import INCLUDE, glue_object, package_headers, stub_libraries
from opkit.cpp._progress import Progress, building
from opkit.cpp._unit import Unit, included_by_path, placed_nowhere, sources
from opkit.cpp.compilers import Compiler
from opkit.cpp.toolchain import Options, Toolchain
from opkit.errors import BuildError

_LOG = _logs.logger("cache")
_FORMAT = 3  # raise it when what is built from the same source changes
_ENTRY = 1  # raise it when a library that was built before could no longer be called
_MEMORY = 1 << 30  # bytes that a compiler may need without torch's full headers
_FREESTANDING = ("stddef.h", "stdint.h", "cstddef", "cstdint", "new")
# Flags that put file names or line numbers into the library.
_KEEPS_PLACES = ("-g", "--coverage", "-ftest-coverage", "-lineinfo", "--generate-line-info", "-G")


@dataclass(frozen=True)
class Job:
    """One shared library to be built: everything that decides what it is.

    Args:
        label: what is built, for texts: `demo::rms_norm [cpp]`.
        units: what is compiled. A single C++ unit is compiled and linked in one step.
        op: the op's qualified name, for the error.
        tier: how much of torch it uses.
        include_paths: folders for `#include`, after opkit's own.
        cflags: flags for the C++ compiler, which also compiles the host part of CUDA code.
        cuda_cflags: flags for nvcc.
        ldflags: flags for the linker.
        module: the name of the Python module that the library is, or None.
        carried: a folder that may hold the library prebuilt, see `opkit.cpp.prebuilt`.
        verbose: show on stderr what is run.
        spellings: the names that the sources include, where they are known already.
    """

    label: str
    units: tuple[Unit, ...]
    op: str | None = None
    tier: str = tiers.LIGHT
    include_paths: tuple[Path, ...] = ()
    cflags: tuple[str, ...] = ()
    cuda_cflags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()
    module: str | None = None
    carried: Path | None = None
    verbose: bool = False
    spellings: frozenset[str] | None = None

    def library(self) -> Path:
        """Return the library: the prebuilt one, the cached one, or else a new one.

        What was built before, by any process, is returned without compiling and without a word.

        Raises:
            BuildError: it does not compile; the error lines are in the text and in `diagnostics`.
        """
        if found := self.prebuilt():
            _LOG.info("%s: the package carries it, %s", self.label, found)
            return found
        return cache.obtain(self.key, label=self.label, build=self.build)

    def prebuilt(self) -> Path | None:
        """Return the library that the package brings along, or None; needs no compiler."""
        if self.carried is None or not self.carried.is_dir() or self.is_open:
            return None
        name = f"{cache.slug(self.label)}-{self.source_key()}"
        return prebuilt.find(self.carried, name, self.architectures)

    @property
    def is_open(self) -> bool:
        """Whether only a compiler can tell what the sources include, and so what the library computes."""
        return self._scan().is_computed

    # ---------------------------------------------------------------- keys

    def source_key(self) -> str:
        """Hash what the library computes: no compiler, no paths, no times, and not how opkit words its glue.

        So a library that a package carries fits later versions of opkit.
        """
        scan = self._scan(meanings=True)
        flags = (*self.cflags, *self.cuda_cflags)
        return cache.digest(
            _ENTRY,
            (sys.platform, platform.machine()),
            [(unit.name, unit.toolchain.name, unit.toolchain.abi) for unit in self.units],
            self.module,
            scan.contents,
            _includes.without_paths(self.cflags),
            _includes.without_paths(self.cuda_cflags),
            _includes.without_paths(self.ldflags),
            _includes.linked_files(self.ldflags),
            _includes.named_files((*flags, *self.ldflags)),
            [str(path) for path in self._sources] if _keeps_places(flags) else (),
        )

    def key(self) -> str:
        """Hash what the library computes and how it is compiled: still no paths and no times."""
        found = [used.find() or _refuse(used, self.label, self.op) for used in self._toolchains]
        cxx = compilers.get_cxx()
        return cache.digest(
            _FORMAT,
            self.source_key(),
            [placed_nowhere(unit.text) for unit in self.units],
            package_headers(),
            cxx.version,
            [(t.flags, c.version, t.architectures()) for t, c in zip(self._toolchains, found, strict=True)],
            self._system.versions,
            _includes.variables(),
            compilers.native_macros(cxx, (*cxx.command, *self.cflags, *self.cuda_cflags)),
        )

    @property
    def architectures(self) -> tuple[str, ...]:
        """The devices that it is compiled for."""
        return tuple(a for used in self._toolchains for a in used.architectures())

    # ---------------------------------------------------------------- building

    def build(self, work: cache.Workspace) -> Path:
        """Compile and link in the workspace; see `cache.obtain`."""
        library = work.folder / (f"{self.module}.so" if self.module else f"{cache.slug(self.label)}.so")
        for unit in self.units:
            (work.folder / unit.name).write_text(unit.text)
        whole = len(self.units) == 1 and self.units[0].toolchain is toolchain.CPP
        preambles = {unit: preamble for unit in self.units if (preamble := self._preamble_of(unit))}
        placed = {unit: preamble.place(work.folder, unit.name) for unit, preamble in preambles.items()}
        steps = [
            [*self._command(unit), *placed.get(unit, ()), *_dependency_flags(unit)] for unit in self.units
        ]
        if whole:
            steps = [[*steps[0], self.units[0].name, *self._link(library.name, ())]]
        else:
            for step, unit in zip(steps, self.units, strict=True):
                step += ["-c", unit.name, "-o", f"{unit.name}.o"]
        count = len(steps) + (not whole)
        with building(self.label, steps=count) as progress:
            log = self._run(work, steps, "", progress)
            if not whole:
                objects = [f"{unit.name}.o" for unit in self.units]
                link = [*compilers.get_cxx().command, *self._link(library.name, objects)]
                log = self._run(work, [link], log, progress, done=len(steps))
        (work.folder / "log.txt").write_text(log)
        scanned = self._scan().files
        inside = tuple(f"{folder}/" for folder in (work.folder, INCLUDE, *self._system.known))
        found = {path for unit in self.units for path in _depfile.read(work.folder / f"{unit.name}.d")}
        work.depend_on(sorted(path for path in map(str, found - scanned) if not path.startswith(inside)))
        for unit in self.units:
            (work.folder / f"{unit.name}.d").unlink(missing_ok=True)
            (work.folder / f"{unit.name}.o").unlink(missing_ok=True)
        _preamble.remove(work.folder)
        for preamble in set(preambles.values()):
            preamble.remember()
        return library

    def compile_commands(self) -> list[dict[str, Any]]:
        """Return the entries of compile_commands.json for the user's files, as clangd reads them."""
        return [
            {
                "directory": str(path.parent),
                "file": str(path),
                "arguments": [*self._command(unit), "-c", str(path)],
            }
            for unit in self.units
            for path in included_by_path(unit.text)
        ]

    def _run(
        self, work: cache.Workspace, steps: list[list[str]], log: str, progress: Progress, done: int = 0
    ) -> str:
        """Run steps that do not depend on each other, and return the log with what they said."""
        units = self.units if not done else (None,)  # the link is of none
        outputs: list[subprocess.CompletedProcess[str]] = []
        memory = _MEMORY if self._toolchains == [toolchain.CPP] else _jobs.NVCC_MEMORY
        with concurrent.futures.ThreadPoolExecutor(min(len(steps), _jobs.limit(memory))) as pool:
            for output in pool.map(functools.partial(self._execute, work), steps, units):
                outputs.append(output)
                progress.step(done + len(outputs))
        for output in outputs:
            said = f"$ {shlex.join(output.args)}\n{output.stdout}"
            if self.verbose and sys.stderr:
                sys.stderr.write(said)
            log += said
        for output in outputs:
            if output.returncode:
                raise self._failure(work, output.args, log, output.stdout)
        return log

    def _execute(
        self, work: cache.Workspace, step: list[str], unit: Unit | None
    ) -> subprocess.CompletedProcess[str]:
        if unit is None or unit.toolchain.compile is None:
            done = compilers.execute(step, folder=work.folder)
            again = done.returncode and _preamble.set_aside(work.folder, done.stdout)
            return compilers.execute(step, folder=work.folder) if again else done
        return unit.toolchain.compile(
            work.folder / unit.name,
            work.folder / f"{unit.name}.o",
            options=self._options(unit),
            label=self.label,
            op=self.op,
            execute=functools.partial(compilers.execute, folder=work.folder),
        )

    def _command(self, unit: Unit) -> list[str]:
        return list(unit.toolchain.command(self._options(unit)))

    def _options(self, unit: Unit) -> Options:
        used, flags = unit.toolchain, (*self.cflags, *self.cuda_cflags)
        own = self.cuda_cflags if used is not toolchain.CPP else ()
        folders = dict.fromkeys([INCLUDE, *self.include_paths, *(path.parent for path in self._sources)])
        # Without the folder of a source in `__FILE__` the library is the same wherever it is built; a
        # debugger needs it.
        places = [] if _keeps_places(flags) else [f"-fmacro-prefix-map={folder}/=" for folder in folders]
        named = [f"-DTORCH_EXTENSION_NAME={self.module}"] if self.module else []
        return Options(
            compiler=_compiler(used),
            cxx=compilers.get_cxx(),
            include_paths=(INCLUDE, *self.include_paths),
            system_paths=self._system.folders,
            defines=(*self._system.defines, *named, *(["-DOPKIT_LINKED"] if self._links_glue else [])),
            cflags=(*places, *self.cflags),
            own_flags=own,
            architectures=used.architectures(),
        )

    def _preamble_of(self, unit: Unit) -> _preamble.Preamble | None:
        """Return the headers of torch that the unit begins with, where they may be precompiled."""
        if unit.toolchain is not toolchain.CPP or _keeps_places(self.cflags):
            return None
        cxx = compilers.get_cxx()
        return _preamble.Preamble.of(
            unit.text,
            cxx=cxx,
            words=self._command(unit)[len(cxx.command) :],
            user_words=self.cflags,
            user_folders=[INCLUDE, *self.include_paths, *_includes.include_folders(self.cflags)],
            system_folders=self._system.folders,
        )

    def _link(self, output: str, objects: Sequence[str]) -> list[str]:
        cxx = compilers.get_cxx()
        flags = [*objects, "-shared", "-o", output]
        if self._links_glue:
            flags += [str(glue_object(cxx)), "-Wl,--gc-sections"]
        if self._system.needs_torch:
            # --no-as-needed: torch loads its libraries so that only those find their symbols that name them.
            names = dict.fromkeys(["libtorch_cpu.so", *(n for t in self._toolchains for n in t.libraries)])
            flags += [f"-L{stub_libraries(cxx, tuple(names))}", "-Wl,--no-as-needed"]
            flags += [f"-l:{name}" for name in names]
            if self._uses_little:
                # Reading the system's libraries is most of what linking a small kernel takes. What it calls of them is
                # found through torch, which needs them too. Only where little is called: without the library at hand,
                # a symbol is bound to its oldest version.
                flags += ["-nodefaultlibs", "-lgcc"]
        for used in self._toolchains:
            flags += used.link_flags(_compiler(used))
        return [*flags, *self.ldflags]

    def _failure(self, work: cache.Workspace, step: list[str], log: str, output: str) -> BuildError:
        """Keep the log, the source and a script beside them, and return the error that names them."""
        kept = work.keep()
        # The script and the excerpts name the unit where it is now.
        command = shlex.join(step)
        (kept / "command.sh").write_text(f"#!/bin/sh\ncd {shlex.quote(str(kept))} && LC_ALL=C {command}\n")
        (kept / "log.txt").write_text(log)
        for unit in self.units:
            output = re.sub(rf"(?m)^{re.escape(unit.name)}(?=[:(])", str(kept / unit.name), output)
        return diagnostics.failure(
            output,
            label=self.label,
            op=self.op,
            sources=self._sources,
            log_path=kept / "log.txt",
            command=command,
            command_path=kept / "command.sh",
        )

    # ---------------------------------------------------------------- what is in it

    @functools.cached_property
    def _sources(self) -> list[Path]:
        """The user's files: those that units include by absolute path, and those that their text is from."""
        return list(dict.fromkeys(path for unit in self.units for path in sources(unit)))

    @functools.cached_property
    def _toolchains(self) -> list[Toolchain]:
        return list(dict.fromkeys(unit.toolchain for unit in self.units))

    @property
    def _links_glue(self) -> bool:
        """Whether the bodies of opkit's headers are linked, not compiled with the kernel.

        Only without flags of the kernel's own, of which any may decide how they are to be compiled.
        """
        return (
            self.tier == tiers.LIGHT
            and self._toolchains == [toolchain.CPP]
            and "opkit/glue.h" in self._spellings
            and not self.cflags
        )

    @property
    def _uses_little(self) -> bool:
        """Whether the units are C++ of opkit's own headers alone, without flags or declarations of their own."""
        return (
            not (self.cflags or self.ldflags)
            and self._toolchains == [toolchain.CPP]
            and all(name.startswith("opkit/") or name in _FREESTANDING for name in self._spellings)
            and not self._scan(meanings=True).declares
        )

    @functools.cached_property
    def _spellings(self) -> frozenset[str]:
        """The names that the sources include."""
        return frozenset(self._scan().spellings) if self.spellings is None else self.spellings

    @functools.cached_property
    def _system(self) -> tiers.System:
        """The headers of torch and Python that the sources want."""
        return tiers.system(self._spellings)

    def _scan(self, *, meanings: bool = False) -> _includes.Scan:
        """Read the texts, or what they mean, and the user's headers as they are now."""
        flags = (*self.cflags, *self.cuda_cflags)
        scan = _includes.Scan([*self.include_paths, *_includes.include_folders(flags)])
        for unit in self.units:
            meant = unit.meaning if meanings else None
            scan.add_text(placed_nowhere(unit.text) if meant is None else meant, unit.name)
            for path in included_by_path(unit.text):
                scan.add_file(path, path.name)
        for path in _includes.included_files(flags):
            if path.is_file():
                scan.add_file(path, path.name)
        return scan


def _compiler(used: Toolchain) -> Compiler:
    """Return the toolchain's compiler.

    Raises:
        BuildError: there is none on this machine.
    """
    return used.find() or _refuse(used, "a kernel", None)


def _refuse(used: Toolchain, label: str, op: str | None) -> Any:
    if used is toolchain.CPP:
        compilers.get_cxx()
    if used is toolchain.CUDA:
        compilers.get_nvcc()
    raise BuildError(
        f"building {label}: the toolchain {used.name} has no compiler here: {used.why_none()}. Expected one that "
        f"compiles {', '.join(used.suffixes)}. Install it, or register another kernel for the op.",
        op=op,
    )


def _keeps_places(flags: Sequence[str]) -> bool:
    return any(flag.startswith(_KEEPS_PLACES) for flag in flags)


def _dependency_flags(unit: Unit) -> list[str]:
    return ["-MD", "-MF", f"{unit.name}.d"]
