"""Every OPKIT_* environment variable, in one table, parsed once and refused when wrong.

Values are read on first use and kept; `refresh()` reads them anew (tests use it).
This module decides nothing: it only turns text into values.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opkit.errors import ConfigError

_FALSE = ("0", "false", "no", "off")
_TRUE = ("1", "true", "yes", "on", "all")


@dataclass(frozen=True)
class Variable:
    """An environment variable: what it means, and how its text becomes a value."""

    name: str
    default: str
    meaning: str
    parse: Callable[[Variable, str], Any]


def _names(variable: Variable, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _flag(variable: Variable, text: str) -> bool:
    word = text.strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise ConfigError(
        f"reading {variable.name}: found {text!r}; expected one of {', '.join(_TRUE + _FALSE)}. "
        f"It says: {variable.meaning}. Unset it or use a legal value."
    )


def _frozen(variable: Variable, text: str) -> str:
    """Return `error`, `warn`, or nothing."""
    word = text.strip().lower()
    if word == "warn" or not word:
        return word
    if word in _TRUE or word in _FALSE:
        return "error" if word in _TRUE else ""
    raise ConfigError(
        f"reading {variable.name}: found {text!r}; expected warn, or one of {', '.join(_TRUE + _FALSE)}. "
        f"It says: {variable.meaning}. Unset it or use a legal value."
    )


_TWINS = ("auto", "0", "1")


def _twin(variable: Variable, text: str) -> str:
    word = text.strip().lower()
    if word in _TWINS:
        return word
    raise ConfigError(
        f"reading {variable.name}: found {text!r}; expected one of {', '.join(_TWINS)}. "
        f"It says: {variable.meaning}. Unset it or use a legal value."
    )


def _folder(variable: Variable, text: str) -> Path:
    if text:  # absolute, or it would be another folder after os.chdir
        return Path(text).expanduser().absolute()
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "opkit"


def _folders(variable: Variable, text: str) -> tuple[Path, ...]:
    return tuple(Path(part).expanduser() for part in text.split(os.pathsep) if part)


def _url(variable: Variable, text: str) -> str:
    if not text or re.fullmatch(r"[A-Za-z][\w+.-]*(::[\w+.:/-]+)?://\S.*", text):
        return text
    raise ConfigError(
        f"reading {variable.name}: found {text!r}; expected the address of a folder, such as s3://bucket/kernels, "
        f"gs://bucket/kernels or file:///mnt/kernels. It says: {variable.meaning}. Unset it or use a legal value."
    )


_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def _size(variable: Variable, text: str) -> int:
    """Return bytes.

    >>> _size(VARIABLES["OPKIT_CACHE_LIMIT"], "1.5K")
    1536
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if found:
        return int(float(found[1]) * 2 ** _UNITS[found[2].upper()])
    raise ConfigError(
        f"reading {variable.name}: found {text!r}; expected a size such as 500M, 10G or 1.5T, a number of bytes, "
        f"or 0 for no limit. It says: {variable.meaning}. Unset it or use a legal value."
    )


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("OPKIT_BACKEND", "", "backends to prefer, first one first: cpp,reference", _names),
        Variable(
            "OPKIT_VALIDATE",
            "0",
            "whether each call of an op compares what its kernel returned and wrote with what is declared",
            _flag,
        ),
        Variable(
            "OPKIT_FROZEN",
            "0",
            "whether a call that was not prepared is an error, or with warn a warning",
            _frozen,
        ),
        Variable(
            "OPKIT_NATIVE",
            "auto",
            "whether the native core runs ops: as soon as it is built, never (0), or always (1: wait for it, or raise)",
            _twin,
        ),
        Variable("OPKIT_AUTOLOAD", "all", "whether installed plugins are called on first need", _flag),
        Variable(
            "OPKIT_CACHE_DIR",
            "",
            "folder for compiled kernels (default: opkit in $TORCH_EXTENSIONS_DIR or ~/.cache)",
            _folder,
        ),
        Variable(
            "OPKIT_CACHE_PATH",
            "",
            f"more folders of compiled kernels, only read, separated by {os.pathsep!r}",
            _folders,
        ),
        Variable(
            "OPKIT_CACHE_REMOTE",
            "",
            "a shared cache to fetch compiled kernels from, as an address that fsspec knows",
            _url,
        ),
        Variable(
            "OPKIT_CACHE_LIMIT",
            "10G",
            "how large the folder for compiled kernels may grow before the least recently used ones go",
            _size,
        ),
    )
}


@functools.cache
def get(name: str) -> Any:
    """Return the parsed value of variable `name`; raise ConfigError where its text is not legal."""
    variable = VARIABLES[name]
    return variable.parse(variable, os.environ.get(name, variable.default))


def refresh() -> None:
    """Forget the values read so far, so that the next `get` reads the environment anew."""
    get.cache_clear()
