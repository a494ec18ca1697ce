"""Which files of the user a source draws in, read from its text.

Reading is about a thousand times cheaper than preprocessing torch's headers, and it sees what
the preprocessor for one target does not: branches under `#if __CUDA_ARCH__`. It looks only where
the user points to; torch's, CUDA's and the system's headers are known by their version.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

_NAME = rb"""[ \t]*(?:"(?P<quoted>[^"\n]+)"|<(?P<angled>[^>\n]+)>|(?P<computed>[A-Za-z_]\w*))"""
# They begin with what is rare, which is found much faster than every beginning of a line.
_INCLUDE = re.compile(rb"\#[ \t]*(?:include|include_next|import|embed)" + _NAME)
_HAS_INCLUDE = re.compile(rb"__has_(?:include|embed)[ \t]*\(" + _NAME)
_PATH_FLAGS = ("-I", "-isystem", "-iquote", "-idirafter", "--include-path")
_FILE_FLAGS = ("-include", "-imacros", "--pre-include", "--include")
_PATH_VARIABLES = ("CPATH", "CPLUS_INCLUDE_PATH")
_FLAG_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "SOURCE_DATE_EPOCH")


class Scan:
    """The contents that a set of sources is made of, as far as the user wrote them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self.contents: list[tuple[str, str]] = []  # (as it was included, hash)
        self.files: set[Path] = set()
        self.spellings: set[str] = set()  # of every #include, whether it was found or not
        self.declares = False  # there is the word `extern`: something of another library may be called
        self.is_computed = False  # there is an `#include MACRO`, which only the preprocessor resolves
        self._seen: set[tuple[str, Path]] = set()

    def add_text(self, text: str | bytes, spelling: str, folder: Path | None = None) -> None:
        """Take in a source text that is, or will be, in `folder`."""
        content = text.encode() if isinstance(text, str) else text
        self.contents.append((spelling, hashlib.blake2b(content, digest_size=16).hexdigest()))
        self.declares = self.declares or b"extern" in content or b"asm" in content
        for found in _INCLUDE.finditer(content):
            if not content[content.rfind(b"\n", 0, found.start()) + 1 : found.start()].strip(b" \t"):
                self._add_included(found, folder)
        for found in _HAS_INCLUDE.finditer(content):
            self._add_included(found, folder)

    def add_file(self, path: Path, spelling: str) -> None:
        """Take in a source file and, transitively, what it includes."""
        if (spelling, path) not in self._seen:
            self._seen.add((spelling, path))
            self.files.add(path)
            self.add_text(path.read_bytes(), spelling, path.parent)

    def _add_included(self, found: re.Match[bytes], folder: Path | None) -> None:
        if found["computed"]:
            self.is_computed = True
            return
        name = os.fsdecode(found["quoted"] or found["angled"])
        self.spellings.add(name)
        here = [folder] if folder and found["quoted"] else []
        for searched in (*here, *self.folders):
            if os.path.isfile(os.path.join(searched, name)):
                self.add_file(searched / name, name)
                return


def include_folders(flags: Sequence[str]) -> list[Path]:
    """Return the include folders that `flags` and the compilers' own variables add.

    >>> include_folders(["-I", "/a", "-DX", "-isystem/b"])[:2]
    [PosixPath('/a'), PosixPath('/b')]
    """
    folders = [Path(value) for _, value in _with_values(flags, _PATH_FLAGS)]
    for variable in _PATH_VARIABLES:
        folders += [Path(entry) for entry in os.environ.get(variable, "").split(os.pathsep) if entry]
    return folders


def included_files(flags: Sequence[str]) -> list[Path]:
    """Return the files that `flags` include before the source: `-include x.h`."""
    return [Path(value) for _, value in _with_values(flags, _FILE_FLAGS)]


def without_paths(flags: Sequence[str]) -> list[str]:
    """Return `flags` without include folders: what they lead to is hashed by content instead.

    >>> without_paths(["-I", "/a", "-DX", "-isystem/b"])
    ['-DX']
    """
    dropped = {index for index, _ in _with_values(flags, _PATH_FLAGS)}
    dropped |= {index + 1 for index in dropped if flags[index] in _PATH_FLAGS}
    return [flag for index, flag in enumerate(flags) if index not in dropped]


def variables() -> list[tuple[str, str]]:
    """Return the variables that change a compiler's output behind its command line's back."""
    return [(name, os.environ[name]) for name in _FLAG_VARIABLES if name in os.environ]


def named_files(flags: Sequence[str]) -> list[tuple[str, str]]:
    """Return name and content hash of the files that stand in `flags`: `@options`, `-Wl,--version-script=map`."""
    parts = [part.lstrip("@") for flag in flags for part in re.split(r"[=,]", flag)]
    paths = [Path(part) for part in parts if part and os.path.isfile(part)]
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]


def linked_files(flags: Sequence[str]) -> list[tuple[str, str]]:
    """Return name and content hash of the user's libraries and objects that `flags` link."""
    folders = [Path(value) for _, value in _with_values(flags, ("-L", "--library-path"))]
    found = [Path(flag) for flag in flags if not flag.startswith("-")]
    for _, name in _with_values(flags, ("-l",)):
        files = [name[1:]] if name.startswith(":") else [f"lib{name}.so", f"lib{name}.a"]
        found += [folder / file for folder in folders for file in files]
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in found if path.is_file()]


def _with_values(flags: Sequence[str], names: Sequence[str]) -> list[tuple[int, str]]:
    """Return (index, value) for every one of `names` in `flags`: `-I x`, `-Ix`, `-I=x`."""
    pairs = []
    for index, flag in enumerate(flags):
        name = next((name for name in names if flag.startswith(name)), None)
        if name is None:
            continue
        value = flag[len(name) :].lstrip("= ")
        if value:
            pairs.append((index, value))
        elif index + 1 < len(flags):
            pairs.append((index, flags[index + 1]))
    return pairs
