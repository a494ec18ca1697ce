"""Torch's headers, read once: precompiled and kept in the cache.

gcc takes a precompiled header only where it comes first in the source and every macro that it depends
on is the same; otherwise it reads the header itself. So what is here decides how long a build takes
and not what comes out. Nothing is written beside torch's files.

In the aten tier the headers are found before torch's own by an include folder (`place`). In the stable
tier, what a unit includes before it says anything else is what is precompiled (`Beginning`).

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
import shutil
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
_STABLE = "torch/csrc/stable/"
# With these it shows in what the compiler says whether a header was precompiled.
_SHOWING = ("invalid-pch", "-Wsystem-headers")
_READ = "read.txt"  # beside a precompiled header: the files that it was made of
_FOLDER = "opkit_headers"  # in that of the unit, where no #include of the user's looks for such a name
# What may stand among a unit's first #includes and does nothing to them: space, comments, and lines of opkit's own.
_NOTHING = re.compile(
    r"""\s | //[^\n]* | /\*.*?\*/
      | \#[ \t]*(?:line[ \t]|pragma[ \t]+once\b|define[ \t]+OPKIT_)[^\n]*""",
    re.DOTALL | re.VERBOSE,
)
_FIRST = re.compile(r"""\#[ \t]*include[ \t]*(?:<([^>\n]+)>|"([^"\n]+)")""", re.VERBOSE)
# What includes to no effect what is included already: torch's and the standard's, but for all that is known no other.
_GUARDED = re.compile(
    r"torch/.+|\w+|Python\.h"
    r"|(?:assert|ctype|errno|fenv|float|inttypes|limits|locale|math|setjmp|signal|std\w+|string|time|w?char|wctype)\.h"
)
_SPLICE = re.compile(r"\\[ \t\f\v\r]*\n")
_FAILED_READING = re.compile(r"\bPCH\b|internal compiler error")
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
        _write(folder / header, text)
    if not _is_gcc(cxx) or any(word.startswith("@") for word in user_words):
        return
    if list(words[len(words) - len(user_words) :]) != list(user_words):  # what shells or ninja expand
        return
    if _includes.included_files(user_words):  # then no header of the source's comes first
        return
    flags = _relevant(words, user_words)
    for header in sorted(set(headers) - ({NARROWED} - set(ours))):
        precompiled = _Header(header, _TEXTS[header], cxx, tuple(flags)).second()
        if precompiled and not _is_shadowed(precompiled, user_folders):
            # Where gcc does not take the precompiled one, it wants the header beside it.
            if header not in ours:
                _write(folder / header, f"#include_next <{header}>\n")
            (folder / f"{header}.gch").symlink_to(precompiled)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#pragma GCC system_header\n{text}")  # so that it warns of nothing


def prepare(extra_cflags: Sequence[str] = (), headers: Sequence[str] = (BINDING, NARROWED)) -> list[Path]:
    """Precompile torch's headers now, for builds with `extra_cflags`; return where they are.

    Empty for compilers other than gcc, whose precompiled headers opkit does not use.
    """
    cxx = compilers.get_cxx()
    if not _is_gcc(cxx):
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
    flags = tuple(_relevant(words, user_words))
    return [_Header(header, _TEXTS[header], cxx, flags).obtain() for header in headers]


@dataclass(frozen=True)
class Beginning:
    """The headers that a unit of the stable tier includes first, up to torch's, for gcc to have read already.

    It is read ahead of the unit, which then includes each of them again, to no effect. They are the same
    headers in the same order with nothing before them, so nothing changes for what follows.
    """

    header: _Header
    user_folders: tuple[Path, ...]

    @classmethod
    def of(
        cls,
        text: str,
        *,
        cxx: compilers.Compiler,
        words: Sequence[str],
        user_words: Sequence[str],
        user_folders: Sequence[Path],
        system_folders: Sequence[Path],
    ) -> Beginning | None:
        """Return what `text`, a unit's, begins with; None where that is to be read as it stands.

        Args:
            text: the unit's text.
            cxx: the compiler.
            words: all flags that it gets; the caller's own at the end.
            user_words: the caller's own flags.
            user_folders: where the caller's headers are, those in `user_words` included.
            system_folders: where torch's headers are.
        """
        if not _is_gcc(cxx) or any(
            word.startswith("@") or any(part in word for part in _SHOWING) for word in user_words
        ):
            return None
        if _includes.included_files(user_words):  # they come first
            return None
        names = first_headers(text, user_folders)
        if not names:
            return None
        # __FILE__ in torch's headers, which its checks print.
        homes = [f"{folder}/" for folder in (*system_folders, cxx.path.parent.parent)]
        maps = [
            word
            for word in words[: len(words) - len(user_words)]
            if word.startswith("-fmacro-prefix-map=")
            and any(home.startswith(word.partition("=")[2].rpartition("=")[0]) for home in homes)
        ]
        flags = (*_relevant(words, user_words), *maps)
        included = "".join(f"#include <{name}>\n" for name in names)
        return cls(_Header(names[-1], included, cxx, flags), tuple(user_folders))

    def place(self, folder: Path, unit: str) -> list[str]:
        """Put the headers into `folder`, the unit's, and return the flags that have them read first.

        No flags where the headers are not precompiled and need not be, as in the first build. Wants -MD beside them.
        """
        precompiled = self.header.known()
        if precompiled is None or _is_shadowed(precompiled, self.user_folders):
            return []
        name = f"{_FOLDER}/{unit}.h"
        _write(folder / name, self.header.text)  # what gcc reads where it does not take the precompiled one
        (folder / f"{name}.gch").symlink_to(precompiled)
        # Else the file that the compiler writes would not name what is in the header.
        return ["-include", name, "-fpch-deps"]

    def remember(self) -> None:
        """Say that a unit which begins so was compiled: for the next one the headers are precompiled."""
        with contextlib.suppress(OSError):
            self.header.note()


def remove(folder: Path) -> None:
    """Remove what `Beginning.place` put into `folder`."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def set_aside(folder: Path, log: str) -> bool:
    """Whether a compiler failed over a precompiled header and not the source; the header is then gone.

    gcc below 13 stops where it cannot have the memory that the header was written for.
    """
    if not (_FAILED_READING.search(log) and (folder / _FOLDER).is_dir()):
        return False
    for file in (folder / _FOLDER).glob("*.gch"):
        file.unlink(missing_ok=True)
    return True


def first_headers(text: str, user_folders: Sequence[Path]) -> list[str]:
    """Return the headers that a unit includes before anything else, up to the first of torch's stable ABI.

    Empty where anything else stands before that one, such as a macro or a pragma: it may be meant for torch's
    headers.

    >>> first_headers("#include <vector>\\n#include <torch/csrc/stable/ops.h>\\nint x;", [])
    ['vector', 'torch/csrc/stable/ops.h']
    >>> first_headers("#define X\\n#include <torch/csrc/stable/ops.h>\\n", [])
    []
    """
    found: list[str] = []
    _follow(text, None, user_folders, found, set())
    return found if found and found[-1].startswith(_STABLE) else []


def _follow(text: str, here: Path | None, folders: Sequence[Path], found: list[str], seen: set[Path]) -> bool:
    """Add to `found` what `text`, of a file in the folder `here`, includes first; return whether to go on after it."""
    if "??/" in text:  # a backslash, in old standards
        return False
    text, at = _SPLICE.sub("", text), 0
    while at < len(text):
        if nothing := _NOTHING.match(text, at):
            at = nothing.end()
            continue
        include = _FIRST.match(text, at)
        if include is None:
            return False
        at = include.end()
        name = include[1] or include[2]
        # A quoted name is looked for beside the file first.
        beside = [here] if here and include[2] else []
        path = next((p for p in (folder / name for folder in (*beside, *folders)) if p.is_file()), None)
        if path is None:
            if not _GUARDED.fullmatch(name):
                return False
            found.append(name)
            if name.startswith(_STABLE):
                return False
        else:  # the user's: it is his headers that it includes, in turn
            if path in seen:
                return False
            seen.add(path)
            try:
                content = path.read_bytes().decode(errors="replace")
            except OSError:
                return False
            if not _follow(content, path.parent, folders, found, seen):
                return False
    return True


@dataclass(frozen=True)
class _Header:
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


def _relevant(words: Sequence[str], user_words: Sequence[str]) -> list[str]:
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


def _is_shadowed(precompiled: Path, folders: Sequence[Path]) -> bool:
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


def _is_gcc(cxx: compilers.Compiler) -> bool:
    # A launcher such as ccache has its own idea of precompiled headers.
    return "Free Software Foundation" in cxx.version and len(cxx.command) == 1
