"""Torch's headers, read once: precompiled and kept in the cache.

gcc takes a precompiled header only where it comes first in the source and every macro that it depends
on is the same; otherwise it reads the header itself. So what is here decides how long a build takes
and not what comes out. Nothing is written beside torch's files.

In the aten tier the headers are found before torch's own by an include folder (`place`). In the stable
tier, what a unit includes before it says anything else is precompiled: `opkit.cpp._preamble`.

`torch/extension.h` is first tried without torch's C++ frontend, which is most of it and which
kernels do not use; a source that does not compile so is compiled with the whole. What `load_inline`
compiles is first tried with opkit/python.h, which is torch/types.h and what binds functions without pybind11.

Precompiling takes longer than any one build: the first build with some flags does without, the
second prepares the header, all later ones use it. `prepare` does it ahead for the aten tier.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opkit import _torch_build
from opkit.cpp import _depfile, _includes, cache, compilers, diagnostics
from opkit.cpp._progress import building
from opkit.errors import BuildError

LABEL = "torch headers"
NARROWED = "torch/extension.h"
PLAIN_FLAGS = ("-O3", "-DNDEBUG")

BINDING = "opkit/python.h"

_FORMAT = 2
_HOPELESS = "failed"
# torch/all.h and torch/python.h without torch/{nn,optim,data,jit,serialize}.h
_NARROW = """\
#ifndef OPKIT_TORCH_EXTENSION_H
#define OPKIT_TORCH_EXTENSION_H
#include <torch/autograd.h>
#include <torch/cuda.h>
#include <torch/enum.h>
#include <torch/fft.h>
#include <torch/mps.h>
#include <torch/nested.h>
#include <torch/sparse.h>
#include <torch/special.h>
#include <torch/types.h>
#include <torch/utils.h>
#include <torch/version.h>
#include <torch/xpu.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/python_headers.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_numbers.h>
#include <torch/csrc/utils/python_tuples.h>
#endif
"""
_BINDING = (Path(__file__).parent / "include" / BINDING).read_text()
# The headers that stand in for others while compiling in one way or another.
NARROW = {NARROWED: _NARROW}
DIRECT = {BINDING: _BINDING, NARROWED: f"#include <{BINDING}>\n"}
_TEXTS = {
    NARROWED: _NARROW,
    BINDING: _BINDING,
    "torch/types.h": "#include <torch/types.h>\n",
    "torch/library.h": "#include <torch/library.h>\n",
    "ATen/ATen.h": "#include <ATen/ATen.h>\n",
}
_INCLUDE = re.compile(r"""^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]""", re.MULTILINE)
_FRONTEND = re.compile(r"\b(?:nn|optim|data|jit|serialize)::|\bTORCH_MODULE\b|\btorch::(?:save|load)\b")
# Words that are no part of what a precompiled header is: gcc compares the macros itself.
_UNRELATED = ("-D", "-U", "-W")
_TAKES_VALUE = ("-D", "-U")
_READ = "read.txt"  # beside a precompiled header: the files that it was made of
_HIDDEN_FOLDERS = ("CPATH", "CPLUS_INCLUDE_PATH")


def is_enough(texts: Iterable[str]) -> bool:
    """Whether the narrow header is likely to do for `texts`; where it is not, trying it costs time."""
    return not any(_FRONTEND.search(text) for text in texts)


def first_header(text: str, read: Callable[[str], str | None]) -> str | None:
    """Return the header of torch that `text` includes before anything else, or None.

    Args:
        text: a source.
        read: gives the text of a file of the user's by its name in `#include`, or None for another.
    """
    for _ in range(10):  # a file may include itself
        found = _INCLUDE.search(text)
        if found is None:
            return None
        if found[1] in _TEXTS:
            return found[1]
        included = read(found[1])
        if included is None:
            return None
        text = included
    return None


def place(
    folder: Path,
    headers: Iterable[str],
    *,
    ours: Mapping[str, str],
    cxx: compilers.Compiler,
    words: Sequence[str],
    user_words: Sequence[str],
    user_folders: Sequence[Path],
) -> None:
    """Put into `folder`, for compilers to look at first, the headers of ours and what is precompiled.

    Args:
        folder: the include folder to make.
        headers: which of torch's headers the sources begin with.
        ours: texts that stand in for headers of torch, or beside them.
        cxx: the compiler.
        words: its flags, as torch gives them to it; the caller's own at the end.
        user_words: the caller's own flags.
        user_folders: where the caller's headers are, those in `user_words` included.
    """
    for header, text in ours.items():
        write_header(folder / header, text)
    if not is_gcc(cxx) or any(word.startswith("@") for word in user_words):
        return
    if list(words[len(words) - len(user_words) :]) != list(user_words):  # what shells or ninja expand
        return
    if _includes.included_files(user_words):  # then no header of the source's comes first
        return
    flags = relevant_flags(words, user_words)
    for header in sorted(set(headers) - ({NARROWED} - set(ours))):
        precompiled = Header(header, _TEXTS[header], cxx, tuple(flags)).second()
        if precompiled and not is_shadowed(precompiled, user_folders):
            # Where gcc does not take the precompiled one, it wants the header beside it.
            if header not in ours:
                write_header(folder / header, f"#include_next <{header}>\n")
            (folder / f"{header}.gch").symlink_to(precompiled)


def write_header(path: Path, text: str) -> None:
    """Write a header for gcc to read as one of the system's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#pragma GCC system_header\n{text}")  # so that it warns of nothing


def prepare(extra_cflags: Sequence[str] = (), headers: Sequence[str] = (BINDING, NARROWED)) -> list[Path]:
    """Precompile torch's headers now, for builds with `extra_cflags`; return where they are.

    Empty for compilers other than gcc, whose precompiled headers opkit does not use.
    """
    cxx = compilers.get_cxx()
    if not is_gcc(cxx):
        return []
    with tempfile.TemporaryDirectory() as folder:
        _torch_build.write_build_file(
            Path(folder),
            name="headers",
            sources=[Path(folder) / "headers.cpp"],
            cxx=cxx.command,
            launchers=compilers.LAUNCHERS,
            extra_cflags=[*PLAIN_FLAGS, *extra_cflags],
            extra_cuda_cflags=[],
            extra_ldflags=[],
            extra_include_paths=[],
            cuda_home=None,
        )
        words = _torch_build.cflags(Path(folder) / "build.ninja")
    user_words = shlex.split(" ".join(extra_cflags))
    flags = tuple(relevant_flags(words, user_words))
    return [Header(header, _TEXTS[header], cxx, flags).obtain() for header in headers]


@dataclass(frozen=True)
class Header:
    """A text that only includes headers, with the flags that decide what it is once precompiled."""

    name: str
    text: str
    cxx: compilers.Compiler
    flags: tuple[str, ...]

    def second(self) -> Path | None:
        """Return the precompiled header from the second time on that it is asked for, unless it cannot be made."""
        try:
            if (found := self.known()) is None:
                self.note()
            return found
        except OSError:  # the build itself says that the cache cannot be written
            return None

    def known(self) -> Path | None:
        """Return the precompiled header where it is there or was noted, unless it cannot be made."""
        try:
            if found := cache.find(f"{cache.slug(LABEL)}-{self._key}"):
                return found
            if not self._asked.exists() or self._asked.read_text() == _HOPELESS:
                return None
            return self.obtain()
        except OSError:
            return None
        except BuildError:  # no memory or no room for it; the build itself may have both
            with contextlib.suppress(OSError):
                self._asked.write_text(_HOPELESS)
            return None

    def note(self) -> None:
        """Remember that it was of use, so that it is made the next time."""
        self._asked.parent.mkdir(parents=True, exist_ok=True)
        self._asked.touch()

    def obtain(self) -> Path:
        """Return the precompiled header, the cached one or else a new one."""

        def build(work: cache.Workspace) -> Path:
            (work.folder / "header.h").write_text(self.text)
            command = [*self.cxx.command, *self.flags, "-MD", "-MF", "header.d", "-x", "c++-header"]
            command += ["header.h", "-o", "header.h.gch"]
            # What those folders have is no part of what the flags name.
            environment = compilers.build_environment(work.folder)
            for name in _HIDDEN_FOLDERS:
                environment.pop(name, None)
            with building(f"{self.name} in precompiled form, once for these flags"):
                done = subprocess.run(
                    command,
                    cwd=work.folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    check=False,
                )
                if done.returncode:
                    raise diagnostics.failure(done.stdout, label=LABEL, command=shlex.join(command))
            depfile = work.folder / "header.d"
            read = sorted(_depfile.read(depfile))
            (work.folder / _READ).write_text("\n".join(map(str, read)))
            work.depend_on(read)
            depfile.unlink()
            return work.folder / "header.h.gch"

        return cache.obtain(lambda: self._key, label=LABEL, build=build)

    @functools.cached_property
    def _key(self) -> str:
        import torch

        return cache.digest(
            _FORMAT,
            (self.name, self.text),
            self.cxx.version,
            self.flags,  # they name torch's and Python's folders, which are in the header, too
            (torch.__version__, torch.version.git_version),
            sysconfig.get_config_var("EXT_SUFFIX"),
            _includes.variables(),
        )

    @property
    def _asked(self) -> Path:
        return cache.root() / "headers" / self._key


def relevant_flags(words: Sequence[str], user_words: Sequence[str]) -> list[str]:
    """Return the flags that decide what a precompiled header is."""
    ours = words[: len(words) - len(user_words)]
    own = [
        word for word in ours if not word.startswith(("-I", "-DTORCH_EXTENSION_NAME", "-fmacro-prefix-map"))
    ]
    theirs, previous = [], ""
    for word in _includes.without_paths(user_words):
        unrelated = word.startswith(_UNRELATED) and word != "-Wpedantic"  # which takes a macro away
        if not unrelated and previous not in _TAKES_VALUE:
            theirs.append(word)
        previous = word
    return [*own, *theirs]


def is_shadowed(precompiled: Path, folders: Sequence[Path]) -> bool:
    """Whether one of `folders` has, for some file of the header, another that the compiler would find first."""
    read = (precompiled.parent / _READ).read_text().splitlines()
    for folder in folders:
        with contextlib.suppress(OSError):
            names = set(os.listdir(folder))
            for path in read:
                parts = path.split("/")
                for i, part in enumerate(parts):
                    if part in names and _is_other(folder.joinpath(*parts[i:]), path):
                        return True
    return False


def _is_other(path: Path, known: str) -> bool:
    return path.is_file() and not path.samefile(known)


def is_gcc(cxx: compilers.Compiler) -> bool:
    """Whether it is gcc by itself: a launcher such as ccache has its own idea of precompiled headers."""
    return "Free Software Foundation" in cxx.version and len(cxx.command) == 1
