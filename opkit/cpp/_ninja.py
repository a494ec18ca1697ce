"""The build of an extension with torch's headers: torch writes the build file and ninja runs it, in a private folder.

What is built and when is the business of `opkit.cpp._aten`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from opkit import _torch_build
from opkit.cpp import _arguments, _bindings, _includes, _jobs, _pch, cache, compilers, diagnostics
from opkit.cpp._link import stub_libraries
from opkit.cpp._progress import Progress, building
from opkit.cpp.toolchain import names_host_compiler
from opkit.errors import BuildError

if TYPE_CHECKING:
    from opkit.cpp._aten import Job

_MAIN = "main.cpp"
_CFLAGS = _pch.PLAIN_FLAGS  # torch passes no -O at all; the caller's flags come later and win
_STATUS = re.compile(r"\[(\d+)/(\d+)\] ")


class _Way(NamedTuple):
    main: str | None
    """In place of main.cpp."""
    ours: Mapping[str, str] | None
    """Headers in place of torch's; None: all are torch's, and nothing is precompiled."""


@dataclass(frozen=True)
class Build:
    """The build of one job in one folder."""

    job: Job
    folder: Path

    def library(self, work: cache.Workspace) -> Path:
        """Compile and link in the workspace; see `cache.obtain`."""
        final = cache.root() / "lib" / work.name
        self._write_files(final)
        headers = self.folder / "headers"
        _torch_build.search_first(self.folder / "build.ninja", headers)
        ninja = [str(compilers.get_ninja()), "-v", "-j", str(_jobs.limit(self._memory_each))]
        with building(self.job.label, steps=len(self.job.files) + len(self.job.units) + 1) as progress:
            ways = self._ways()
            while True:
                way = ways.pop(0)
                self._place_headers(way)
                code, log = self._run_ninja(ninja, progress)
                if way.main and self._blames_texts(log):  # which another binding does not mend
                    del ways[:-1]
                elif not (way.main or way.ours or f"{headers}/" in log or "PCH" in log):
                    ways.clear()
                if not (code and ways):
                    break
            if code:
                raise self._failure(work, log)
        shutil.rmtree(headers, ignore_errors=True)
        (self.folder / "log.txt").write_text(log)
        for path in self.folder.iterdir():
            if path.suffix in (".o", ".d", ".ninja") or path.name.startswith(".ninja"):
                path.unlink()
        return self.folder / f"{self.job.name}.so"

    def _write_files(self, final: Path) -> None:
        """Write the texts and `build.ninja`, for a library that will be in the folder `final`."""
        for spelling, text in self.job.texts.items():
            (self.folder / spelling).write_text(text)
        # In `__FILE__`, which torch's checks print, the folder that will be there afterwards.
        place = shlex.quote(f"-fmacro-prefix-map={self.folder}={final}")
        cuda_cflags, ldflags = list(self.job.cuda_cflags), list(self.job.ldflags)
        if self.job.nvcc:
            words = split_flags(cuda_cflags)
            # torch asks the devices, of which a build machine has none, unless the flags name architectures.
            if not any("arch" in flag for flag in words):
                cuda_cflags = [*compilers.gencode_flags(self.job.architectures), *cuda_cflags]
            # torch passes -ccbin $CC itself, and nvcc takes one only.
            if "CC" not in os.environ and not names_host_compiler(words):
                cuda_cflags = ["-ccbin", shlex.quote(str(self.job.cxx.path)), *cuda_cflags]
            cuda_cflags = [*_CFLAGS, f"--compiler-options={place}", *cuda_cflags]
            ldflags += self._cuda_link_flags()
        _torch_build.write_build_file(
            self.folder,
            name=self.job.name,
            sources=[
                *(self.folder / unit for unit in self.job.units),
                *_distinct(self.job.files, self.folder, self.job.units),
            ],
            cxx=self.job.cxx.command,
            launchers=compilers.LAUNCHERS,
            extra_cflags=[*_CFLAGS, place, *self.job.cflags],
            extra_cuda_cflags=cuda_cflags,
            extra_ldflags=ldflags,
            extra_include_paths=self.job.include_paths,
            cuda_home=compilers.cuda_home(self.job.nvcc) if self.job.nvcc else None,
        )

    def _cuda_link_flags(self) -> list[str]:
        """Return flags that find CUDA's runtime, and torch's CUDA libraries also where torch has none."""
        import torch

        # torch looks in $CUDA_HOME/lib64 alone, where a toolkit of a distribution has nothing.
        folders = compilers.cuda_library_folders(self.job.nvcc) if self.job.nvcc else []
        flags = [f"-L{shlex.quote(str(folder))}" for folder in folders]
        if (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
            return flags
        stubs = stub_libraries(self.job.cxx, ("libc10_cuda.so", "libtorch_cuda.so"))
        # The stubs define nothing, so a linker that keeps only what is used would not name them.
        return [*flags, f"-L{shlex.quote(str(stubs))}", "-Wl,--no-as-needed"]

    def _ways(self) -> list[_Way]:
        """Return the ways to compile it, the quickest first; the last one is torch's own and always does."""
        scan = self.job.scan()
        narrow = (scan.is_computed or _pch.NARROWED in scan.spellings) and _pch.is_enough(
            [*self._own_texts(), *self.job.texts.values()]
        )
        ways = [_Way(None, _pch.NARROW if narrow else {}), _Way(None, None)]
        if self.job.direct and _bindings.is_supported():
            ways.insert(0, _Way(self.job.direct, _pch.DIRECT))
        return ways

    def _blames_texts(self, log: str) -> bool:
        """Whether all errors are in what the user wrote, and so none in what exports it."""
        files = [Path(finding.diagnostic.file).name for finding in diagnostics.parse(log)]
        return bool(files) and all(file in self.job.texts and not file.startswith("main.") for file in files)

    def _place_headers(self, way: _Way) -> None:
        """Make the folder of headers that compilers look at first, and main.cpp, as `way` has them."""
        headers, user_words = self.folder / "headers", split_flags(self.job.cflags)
        shutil.rmtree(headers, ignore_errors=True)
        if self.job.direct:
            (self.folder / _MAIN).write_text(way.main or self.job.texts[_MAIN])
        if way.ours is None:
            return
        starts = {_pch.first_header(text, self._own_text) for text in self._own_texts(way.main)}
        _pch.place(
            headers,
            [start for start in starts if start],
            ours=way.ours,
            cxx=self.job.cxx,
            words=_torch_build.cflags(self.folder / "build.ninja"),
            user_words=user_words,
            user_folders=[*self.job.include_paths, *_includes.include_folders(user_words)],
        )

    def _own_texts(self, main: str | None = None) -> list[str]:
        """Return the texts of the units in C++, `main` in place of main.cpp."""
        units = [unit for unit in self.job.units if not unit.endswith(_arguments.CUDA_SUFFIXES)]
        texts = [main if main and unit == _MAIN else self.job.texts[unit] for unit in units]
        files = [path for path in self.job.files if path.suffix not in _arguments.CUDA_SUFFIXES]
        return [*texts, *(path.read_text(errors="replace") for path in files)]

    def _own_text(self, name: str) -> str | None:
        """Return the text of a file that a unit includes by its path, or by its name in the build folder."""
        path = Path(name)
        if name in self.job.texts or not (path.is_absolute() and path.is_file()):
            return self.job.texts.get(name)
        return path.read_text(errors="replace")

    @property
    def _memory_each(self) -> int:
        return _jobs.NVCC_MEMORY if self.job.nvcc else _jobs.CXX_MEMORY

    def _run_ninja(self, ninja: Sequence[str], progress: Progress) -> tuple[int, str]:
        process = subprocess.Popen(
            ninja,
            cwd=self.folder,
            env={**compilers.build_environment(), "NINJA_STATUS": "[%f/%t] "},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        lines = []
        with process:
            for line in process.stdout or ():
                lines.append(line)
                if status := _STATUS.match(line):
                    progress.step(int(status[1]), of=int(status[2]))
                if self.job.verbose:
                    progress.say(line.rstrip("\n"))
        return process.returncode, "".join(lines)

    def _failure(self, work: cache.Workspace, log: str) -> BuildError:
        """Keep the build folder, where ninja can be run again, and return the error that names it."""
        before = str(work.folder)
        kept = work.keep()
        log = log.replace(before, str(kept))
        build_file = kept / "build.ninja"
        build_file.write_text(build_file.read_text().replace(before, str(kept)))
        (kept / "log.txt").write_text(log)
        ninja = shlex.join([str(compilers.get_ninja()), "-v"])
        (kept / "command.sh").write_text(f"#!/bin/sh\ncd {shlex.quote(str(kept))} && LC_ALL=C {ninja}\n")
        failed = re.search(r"^FAILED: .*\n(.+)$", log, re.MULTILINE)
        return diagnostics.failure(
            log,
            label=self.job.label,
            op=self.job.op,
            sources=[
                *self.job.files,
                *(kept / text for text in self.job.texts if not text.startswith("main.")),
            ],
            log_path=kept / "log.txt",
            command=failed[1].strip() if failed else ninja,
            command_path=kept / "command.sh",
        )

    def compile_commands(self) -> list[dict[str, Any]]:
        """Return how each source is compiled, as clangd reads it: directory, file, arguments."""
        self._write_files(self.folder)
        ninja = [str(compilers.get_ninja()), "-t", "compdb"]
        done = subprocess.run(ninja, cwd=self.folder, stdout=subprocess.PIPE, text=True, check=True)
        files = self.job.files
        sources = {str(path): path for path in files}
        # What stands in for a source that shares its name with another one only includes it.
        stand_ins = _distinct(files, self.folder, self.job.units)
        sources |= {str(source): path for path, source in zip(files, stand_ins, strict=True)}
        commands = []
        for entry in json.loads(done.stdout):
            if path := sources.get(entry["file"]):
                words = [
                    str(path) if word == entry["file"] else word for word in shlex.split(entry["command"])
                ]
                words = _without(words, ("-MMD", "-MD"), ("-MF", "-o"))  # what a build writes
                words = [word for word in words if "-macro-prefix-map=" not in word]
                commands.append({"directory": str(path.parent), "file": str(path), "arguments": words})
        return commands


def split_flags(flags: Sequence[str]) -> list[str]:
    """Return the words of flags: torch passes them through a shell, so one may be several."""
    return shlex.split(" ".join(flags))


def _distinct(files: Sequence[Path], folder: Path, taken: Sequence[str]) -> list[Path]:
    """Return `files`, with a stand-in for each whose object file another source would overwrite."""

    def object_name(name: str) -> tuple[str, bool]:  # torch's: k.cpp and k.cc are both k.o, k.cu is k.cuda.o
        return Path(name).stem, Path(name).suffix in _arguments.CUDA_SUFFIXES

    names = {object_name(name) for name in taken}
    sources = []
    for i, path in enumerate(files):
        if object_name(path.name) in names:
            stand_in = folder / f"{path.stem}.{i}{path.suffix}"
            stand_in.write_text(f"#include {json.dumps(str(path))}\n")
            sources.append(stand_in)
        else:
            names.add(object_name(path.name))
            sources.append(path)
    return sources


def _without(words: Sequence[str], options: Sequence[str], with_values: Sequence[str]) -> list[str]:
    """Return a command's `words` without some options; of `with_values` the next word goes, too."""
    kept, previous = [], ""
    for word in words:
        if word not in (*options, *with_values) and previous not in with_values:
            kept.append(word)
        previous = word
    return kept
