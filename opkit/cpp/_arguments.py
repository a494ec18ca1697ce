"""Refuses arguments of the wrong kind in the caller's words, before they end in a bare TypeError.

A lone text for a list of flags would otherwise be taken letter by letter.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opkit.errors import BuildError

CUDA_SUFFIXES = (".cu", ".cuh")
_SUFFIXES = (
    ".cpp",
    ".cc",
    ".cxx",
    ".c++",
    ".cp",
    ".C",
    ".c",
    ".s",
    ".S",
    *CUDA_SUFFIXES,
)  # what gcc compiles


def flags(doing: str, name: str, value: Any) -> tuple[str, ...]:
    """Return a list of flags as a tuple.

    >>> flags("building f", "extra_cflags", ["-O1", " -g"])
    ('-O1', '-g')
    """
    return tuple(flag.strip() for flag in _entries(doing, name, value, (str,), "flags"))


def folders(doing: str, name: str, value: Any) -> tuple[str | os.PathLike[str], ...]:
    """Return a list of folders as a tuple."""
    return _entries(doing, name, value, (str, os.PathLike), "folders")


def texts(doing: str, name: str, value: Any) -> list[str]:
    """Return a source text, or a list of those, as a list."""
    value = [value] if isinstance(value, str) else value
    return list(_entries(doing, name, value, (str,), "source texts"))


def sources(name: str, value: Any) -> list[str | os.PathLike[str]]:
    """Return sources as a list, of paths and texts alone."""
    lone = isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Iterable)
    entries = [value] if lone else list(value)
    for entry in entries:
        if not isinstance(entry, (str, os.PathLike)):
            raise BuildError(
                f"building {name}: it has the source {entry!r}, of type {type(entry).__name__}; expected a path or "
                "a source text, or a list of those. Pass each as a str, or a path as a Path."
            )
    return entries


def source_file(name: str, path: Path) -> Path:
    """Return the path of a source that is there, whatever the current folder is later."""
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise BuildError(
                f"building {name}: source {str(path)!r} has the suffix {path.suffix!r}; expected one of "
                f"{', '.join(_SUFFIXES)}. Name the C++ or CUDA source itself."
            )
        return path.absolute()
    raise BuildError(
        f"building {name}: source {str(path)!r} is no file in {Path.cwd()}; expected a path to a .cpp or .cu "
        "file, or a source text, which has a newline. Correct the path."
    )


def _entries(doing: str, name: str, value: Any, kinds: tuple[type, ...], what: str) -> tuple[Any, ...]:
    if value is None or value == ():
        return ()
    if isinstance(value, (str, bytes, os.PathLike)) or not isinstance(value, Iterable):
        raise BuildError(
            f"{doing}: {name} is {value!r}; expected a list of {what}. {_correction(name, value, what)}"
        )
    entries = tuple(value)
    for entry in entries:
        if not isinstance(entry, kinds):
            raise BuildError(
                f"{doing}: {name} has the entry {entry!r}, of type {type(entry).__name__}; expected a list of "
                f"{what}. Write each entry as a str."
            )
    return entries


def _correction(name: str, value: Any, what: str) -> str:
    if not isinstance(value, (str, os.PathLike)):
        return f"Write {name}=[...], each entry a str."
    words = [os.fspath(value)]
    if what == "flags":
        try:
            words = shlex.split(words[0])
        except ValueError:  # quotes that do not close
            pass
    return f"Write {name}={words!r}."
