"""An extension with torch's headers as one job for the cache: what it is made of, and its key.

How it is built is the business of `opkit.cpp._ninja`, what to do with the library that of `opkit.cpp.extension`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opkit.cpp import _arguments, _includes, _pch, cache, compilers
from opkit.cpp import tier as tiers
from opkit.cpp._ninja import Build, split_flags
from opkit.cpp._unit import included_by_path, placed_nowhere
from opkit.errors import BuildError

Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_FORMAT = 2


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
        nvcc = fitting(name, compilers.get_nvcc()) if needs_nvcc else None
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

    def build(self, work: cache.Workspace) -> Path:
        """Compile and link in the workspace; see `cache.obtain`."""
        return Build(self, work.folder).library(work)

    def compile_commands(self) -> list[dict[str, Any]]:
        """Return how each source is compiled, as clangd reads it: directory, file, arguments.

        Texts have no file outside of a build and are left out.
        """
        with tempfile.TemporaryDirectory() as folder:
            return Build(self, Path(folder)).compile_commands()

    def key(self) -> str:
        """Hash everything that decides what the library does."""
        import torch

        cflags, cuda_cflags, ldflags = map(split_flags, (self.cflags, self.cuda_cflags, self.ldflags))
        scan = self.scan()
        return cache.digest(
            _FORMAT,
            self.name,
            (sys.platform, sysconfig.get_platform(), sysconfig.get_config_var("EXT_SUFFIX")),
            # the commit tells two builds of one version apart
            (torch.__version__, torch.version.git_version, torch.compiled_with_cxx11_abi()),
            (self.cxx.version, self.nvcc.version if self.nvcc else None, self.architectures),
            (_pch.PLAIN_FLAGS, self.units, self.with_cuda),
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

        flags = [*split_flags(self.cflags), *split_flags(self.cuda_cflags)]
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

    def _preprocessed(self) -> list[str]:
        """Return the sources after preprocessing, for `#include MACRO`, which text does not resolve."""
        from torch.utils import cpp_extension

        folders = [*self.include_paths, *cpp_extension.include_paths(), Path(sysconfig.get_path("include"))]
        command = [
            *self.cxx.command,
            "-std=c++20",
            "-fPIC",
            *split_flags(self.cflags),
            "-E",
            "-P",
            "-x",
            "c++",
        ]
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


def fitting(name: str, nvcc: compilers.Compiler) -> compilers.Compiler:
    """Return `nvcc` where code that it compiles runs beside torch's own CUDA.

    Raises:
        BuildError: they are of different major versions.
    """
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
