"""An extension with torch's headers as one job for the cache: its key, its build, its error.

torch writes the build file and ninja runs it, in a private folder. What to do with the library is
the business of `opkit.cpp.extension`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opkit import _torch_build
from opkit.cpp import _arguments, _bindings, _includes, _jobs, _pch, cache, compilers, diagnostics
from opkit.cpp import tier as tiers
from opkit.cpp._progress import Progress, building
from opkit.cpp._unit import included_by_path, placed_nowhere
from opkit.cpp.compile import stub_libraries
from opkit.cpp.toolchain import names_host_compiler
from opkit.errors import BuildError

Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_FORMAT = 2
_MAIN = "main.cpp"
_CFLAGS = _pch.PLAIN_FLAGS  # torch passes no -O at all; the caller's flags come later and win
_STATUS = re.compile(r"\[(\d+)/(\d+)\] ")


class _Way(NamedTuple):
    main: str | None  # in place of main.cpp
    ours: (
        Mapping[str, str] | None
    )  # headers in place of torch's; None: all are torch's, nothing is precompiled


@dataclass(frozen=True)
class Job:
    name: str
    files: tuple[Path, ...]  # the user's
    texts: Mapping[str, str]  # to be written into the build folder
    units: tuple[str, ...]  # which of the texts are compiled by themselves
    cflags: tuple[str, ...]
    cuda_cflags: tuple[str, ...]
    ldflags: tuple[str, ...]
    include_paths: tuple[Path, ...]
    with_cuda: bool
    verbose: bool
    cxx: compilers.Compiler
    nvcc: compilers.Compiler | None
    architectures: tuple[str, ...]
    op: str | None = None
    """The op that it is a kernel of."""
    title: str | None = None
    """What it is called in texts, where that is not its name."""
    direct: str | None = None
    """A unit without pybind11, which is tried in place of main.cpp."""

    @classmethod
    def of(
        cls,
        name: str,
        sources: Sources,
        extra_cflags: Sequence[str] | None,
        extra_cuda_cflags: Sequence[str] | None,
        extra_ldflags: Sequence[str] | None,
        extra_include_paths: Sequence[str | os.PathLike[str]] | None,
        with_cuda: bool | None,
        verbose: bool,
        *,
        is_module: bool,
        texts: Mapping[str, str] | None = None,
        units: Sequence[str] = (),
    ) -> Job:
        """Check the arguments and copy them: the caller's lists stay as they are."""
        pattern = r"[A-Za-z_]\w*" if is_module else r"[A-Za-z_][\w.-]*"
        if not isinstance(name, str) or not re.fullmatch(pattern, name):
            what = "a Python name" if is_module else "a file name"
            raise BuildError(
                f"building an extension: its name is {name!r}; expected {what}, such as 'fast_ops'. "
                "Rename it."
            )
        doing = f"building {name}"
        all_texts, all_units = dict(texts or {}), list(units)
        files = []
        for i, source in enumerate(_arguments.sources(name, sources)):
            if isinstance(source, str) and "\n" in source:
                unit = f"{name}_{i}.{'cu' if '__global__' in source else 'cpp'}"
                all_texts[unit] = source
                all_units.append(unit)
            else:
                files.append(_arguments.source_file(name, Path(source)))
        if not files and not all_units:
            raise BuildError(
                f"building {name}: it has no sources; expected at least one path or source text. Name one."
            )
        names = [*all_units, *(path.name for path in files)]
        has_cuda = any(name.endswith(_arguments.CUDA_SUFFIXES) for name in names)
        if with_cuda is None:
            with_cuda = has_cuda
        elif has_cuda and not with_cuda:
            raise BuildError(
                f"building {name}: it has CUDA sources and with_cuda=False; expected with_cuda=True or None. "
                "Leave with_cuda out."
            )
        needs_nvcc = with_cuda and _refuse_rocm(name)
        nvcc = _fitting(name, compilers.get_nvcc()) if needs_nvcc else None
        return cls(
            name=name,
            files=tuple(files),
            texts=all_texts,
            units=tuple(all_units),
            cflags=_arguments.flags(doing, "extra_cflags", extra_cflags),
            cuda_cflags=_arguments.flags(doing, "extra_cuda_cflags", extra_cuda_cflags),
            ldflags=_arguments.flags(doing, "extra_ldflags", extra_ldflags),
            include_paths=tuple(
                Path(path).absolute()
                for path in _arguments.folders(doing, "extra_include_paths", extra_include_paths)
            ),
            with_cuda=with_cuda,
            verbose=verbose,
            cxx=compilers.get_cxx(),
            nvcc=nvcc,
            architectures=compilers.cuda_architectures() if needs_nvcc else (),
        )

    @classmethod
    def of_kernel(
        cls,
        unit: str,
        *,
        op: str,
        backend: str,
        with_cuda: bool,
        extra_include_paths: Sequence[Path],
        **flags: Any,
    ) -> Job:
        """Return the job of a kernel of an op: one unit, which may include the user's file by its path."""
        text = f"kernel.{'cu' if with_cuda else 'cpp'}"
        job = cls.of(
            re.sub(r"\W", "_", f"{op}_{backend}"),
            [],
            flags["extra_cflags"],
            flags["extra_cuda_cflags"],
            flags["extra_ldflags"],
            extra_include_paths,
            with_cuda,
            False,
            is_module=False,
            texts={text: unit},
            units=[text],
        )
        return dataclasses.replace(job, op=op, title=f"{op} [{backend}]")

    @property
    def label(self) -> str:
        return self.title or f"{self.name} [{'cuda' if self.with_cuda else 'cpp'}]"

    tier = tiers.ATEN

    def library(self) -> Path:
        """Return the library, the cached one or else a new one."""
        return cache.obtain(self.key, label=self.label, build=self.build)

    def key(self) -> str:
        """Hash everything that decides what the library does."""
        import torch

        # torch passes flags through a shell, so one flag may be several words.
        cflags, cuda_cflags, ldflags = _words(self.cflags), _words(self.cuda_cflags), _words(self.ldflags)
        scan = self.scan()
        return cache.digest(
            _FORMAT,
            self.name,
            (sys.platform, sysconfig.get_platform(), sysconfig.get_config_var("EXT_SUFFIX")),
            # the commit tells two builds of one version apart
            (torch.__version__, torch.version.git_version, torch.compiled_with_cxx11_abi()),
            (self.cxx.version, self.nvcc.version if self.nvcc else None, self.architectures),
            (_CFLAGS, self.units, self.with_cuda),
            (_includes.without_paths(cflags), _includes.without_paths(cuda_cflags), self.ldflags),
            _includes.linked_files(ldflags),
            _includes.variables(),
            scan.contents,
            (self.direct, _pch.DIRECT) if self.direct else None,
            self._preprocessed() if scan.is_computed else None,
            _includes.named_files([*cflags, *cuda_cflags, *ldflags]),
            compilers.native_macros(self.cxx, [*self.cxx.command, *cflags, *cuda_cflags]),
        )

    def scan(self) -> _includes.Scan:
        """Read what the user wrote, headers included."""
        import torch

        flags = [*_words(self.cflags), *_words(self.cuda_cflags)]
        torch_home = Path(torch.__file__).parent
        folders = [*self.include_paths, *_includes.include_folders(flags)]
        scan = _includes.Scan([folder for folder in folders if torch_home not in folder.parents])
        for spelling, text in self.texts.items():
            scan.add_text(placed_nowhere(text), spelling)
            for path in included_by_path(text):
                scan.add_file(path, path.name)
        for path in (*self.files, *_includes.included_files(flags)):
            if path.is_file():
                scan.add_file(path, path.name)
        return scan

    @property
    def _memory_each(self) -> int:
        return _jobs.NVCC_MEMORY if self.nvcc else _jobs.CXX_MEMORY

    def build(self, work: cache.Workspace) -> Path:
        final = cache.root() / "lib" / work.name
        for spelling, text in self.texts.items():
            (work.folder / spelling).write_text(text)
        self._write_build_file(work.folder, final)
        headers = work.folder / "headers"
        _torch_build.search_first(work.folder / "build.ninja", headers)
        ninja = [str(compilers.get_ninja()), "-v", "-j", str(_jobs.limit(self._memory_each))]
        with building(self.label, steps=len(self.files) + len(self.units) + 1) as progress:
            ways = self._ways()
            while True:
                way = ways.pop(0)
                self._place_headers(work.folder, way)
                code, log = self._run_ninja(ninja, work.folder, progress)
                if way.main and self._blames_texts(log):  # which another binding does not mend
                    del ways[:-1]
                elif not (way.main or way.ours or f"{headers}/" in log or "PCH" in log):
                    ways.clear()
                if not (code and ways):
                    break
            if code:
                raise self._failure(work, log)
        shutil.rmtree(headers, ignore_errors=True)
        (work.folder / "log.txt").write_text(log)
        for path in work.folder.iterdir():
            if path.suffix in (".o", ".d", ".ninja") or path.name.startswith(".ninja"):
                path.unlink()
        return work.folder / f"{self.name}.so"

    def _write_build_file(self, folder: Path, final: Path) -> None:
        # In `__FILE__`, which torch's checks print, the folder that will be there afterwards.
        place = shlex.quote(f"-fmacro-prefix-map={folder}={final}")
        cuda_cflags, ldflags = list(self.cuda_cflags), list(self.ldflags)
        if self.nvcc:
            words = _words(cuda_cflags)
            # torch asks the devices, of which a build machine has none, unless the flags name architectures.
            if not any("arch" in flag for flag in words):
                cuda_cflags = [*compilers.gencode_flags(self.architectures), *cuda_cflags]
            # torch passes -ccbin $CC itself, and nvcc takes one only.
            if "CC" not in os.environ and not names_host_compiler(words):
                cuda_cflags = ["-ccbin", shlex.quote(str(self.cxx.path)), *cuda_cflags]
            cuda_cflags = [*_CFLAGS, f"--compiler-options={place}", *cuda_cflags]
            ldflags += self._cuda_link_flags()
        _torch_build.write_build_file(
            folder,
            name=self.name,
            sources=[*(folder / unit for unit in self.units), *_distinct(self.files, folder, self.units)],
            cxx=self.cxx.command,
            launchers=compilers.LAUNCHERS,
            extra_cflags=[*_CFLAGS, place, *self.cflags],
            extra_cuda_cflags=cuda_cflags,
            extra_ldflags=ldflags,
            extra_include_paths=self.include_paths,
            cuda_home=compilers.cuda_home(self.nvcc) if self.nvcc else None,
        )

    def _ways(self) -> list[_Way]:
        """Return the ways to compile it, the quickest first; the last one is torch's own and always does."""
        scan = self.scan()
        narrow = (scan.is_computed or _pch.NARROWED in scan.spellings) and _pch.is_enough(
            [*self._own_texts(), *self.texts.values()]
        )
        ways = [_Way(None, _pch.NARROW if narrow else {}), _Way(None, None)]
        return [_Way(self.direct, _pch.DIRECT), *ways] if self.direct and _bindings.is_supported() else ways

    def _blames_texts(self, log: str) -> bool:
        """Whether all errors are in what the user wrote, and so none in what exports it."""
        files = [Path(finding.diagnostic.file).name for finding in diagnostics.parse(log)]
        return bool(files) and all(file in self.texts and not file.startswith("main.") for file in files)

    def _place_headers(self, folder: Path, way: _Way) -> None:
        """Make the folder of headers that compilers look at first, and main.cpp, as `way` has them."""
        headers, user_words = folder / "headers", _words(self.cflags)
        shutil.rmtree(headers, ignore_errors=True)
        if self.direct:
            (folder / _MAIN).write_text(way.main or self.texts[_MAIN])
        if way.ours is None:
            return
        starts = {_pch.first_header(text, self._own_text) for text in self._own_texts(way.main)}
        _pch.place(
            headers,
            [start for start in starts if start],
            ours=way.ours,
            cxx=self.cxx,
            words=_torch_build.cflags(folder / "build.ninja"),
            user_words=user_words,
            user_folders=[*self.include_paths, *_includes.include_folders(user_words)],
        )

    def _own_texts(self, main: str | None = None) -> list[str]:
        """Return the texts of the units in C++, `main` in place of main.cpp."""
        units = [unit for unit in self.units if not unit.endswith(_arguments.CUDA_SUFFIXES)]
        texts = [main if main and unit == _MAIN else self.texts[unit] for unit in units]
        files = [path for path in self.files if path.suffix not in _arguments.CUDA_SUFFIXES]
        return [*texts, *(path.read_text(errors="replace") for path in files)]

    def _own_text(self, name: str) -> str | None:
        """Return the text of a file that a unit includes by its path, or by its name in the build folder."""
        path = Path(name)
        if name in self.texts or not (path.is_absolute() and path.is_file()):
            return self.texts.get(name)
        return path.read_text(errors="replace")

    def _cuda_link_flags(self) -> list[str]:
        """Return flags that find CUDA's runtime, and torch's CUDA libraries also where torch has none."""
        import torch

        # torch looks in $CUDA_HOME/lib64 alone, where a toolkit of a distribution has nothing.
        folders = compilers.cuda_library_folders(self.nvcc) if self.nvcc else []
        flags = [f"-L{shlex.quote(str(folder))}" for folder in folders]
        if (Path(torch.__file__).parent / "lib" / "libtorch_cuda.so").exists():
            return flags
        stubs = stub_libraries(self.cxx, ("libc10_cuda.so", "libtorch_cuda.so"))
        # The stubs define nothing, so a linker that keeps only what is used would not name them.
        return [*flags, f"-L{shlex.quote(str(stubs))}", "-Wl,--no-as-needed"]

    def _run_ninja(self, ninja: Sequence[str], folder: Path, progress: Progress) -> tuple[int, str]:
        process = subprocess.Popen(
            ninja,
            cwd=folder,
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
                if self.verbose:
                    progress.say(line.rstrip("\n"))
        return process.returncode, "".join(lines)

    def compile_commands(self) -> list[dict[str, Any]]:
        """Return how each source is compiled, as clangd reads it: directory, file, arguments.

        Texts have no file outside of a build and are left out.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for spelling, text in self.texts.items():
                (folder / spelling).write_text(text)
            self._write_build_file(folder, folder)
            ninja = [str(compilers.get_ninja()), "-t", "compdb"]
            done = subprocess.run(ninja, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
            sources = {str(path): path for path in self.files}
            # What stands in for a source that shares its name with another one only includes it.
            sources |= {
                str(source): path
                for path, source in zip(self.files, _distinct(self.files, folder, self.units), strict=True)
            }
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
            label=self.label,
            op=self.op,
            sources=[*self.files, *(kept / text for text in self.texts if not text.startswith("main."))],
            log_path=kept / "log.txt",
            command=failed[1].strip() if failed else ninja,
            command_path=kept / "command.sh",
        )

    def _preprocessed(self) -> list[str]:
        """Return the sources after preprocessing, for `#include MACRO`, which text does not resolve."""
        from torch.utils import cpp_extension

        folders = [*self.include_paths, *cpp_extension.include_paths(), Path(sysconfig.get_path("include"))]
        command = [*self.cxx.command, "-std=c++20", "-fPIC", *_words(self.cflags), "-E", "-P", "-x", "c++"]
        command += [f"-I{folder}" for folder in folders]
        texts = [self.texts[unit] for unit in self.units] + [f'#include "{path}"\n' for path in self.files]
        return [_output([*command, "-"], text) for text in texts]


def _refuse_rocm(name: str) -> bool:
    import torch

    if torch.version.hip is not None:
        raise BuildError(
            f"building {name}: this torch is for ROCm, whose sources opkit does not translate from CUDA; "
            "expected a torch for CUDA or the CPU. Use torch.utils.cpp_extension.load for this source."
        )
    return True


def _fitting(name: str, nvcc: compilers.Compiler) -> compilers.Compiler:
    """Return `nvcc` where code that it compiles runs beside torch's own CUDA."""
    import torch

    found = re.search(r"\brelease (\d+)\.(\d+)", nvcc.version)
    expected = torch.version.cuda
    if expected and found and found[1] != expected.split(".")[0]:
        raise BuildError(
            f"building {name}: nvcc is of CUDA {found[1]}.{found[2]} ({nvcc.path}) and torch {torch.__version__} of "
            f"CUDA {expected}; expected one major version. Set CUDA_HOME to a toolkit of CUDA "
            f"{expected.split('.')[0]}, or install a torch for CUDA {found[1]}."
        )
    return nvcc


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


def _words(flags: Sequence[str]) -> list[str]:
    return shlex.split(" ".join(flags))


def _output(command: Sequence[str], text: str) -> str:
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=compilers.build_environment(),
    )
    return done.stdout
