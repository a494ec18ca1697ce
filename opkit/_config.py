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

from opkit.errors import ConfigError, did_you_mean

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


_AUTOLOAD = ("0", "ops", "devices", "all")


def _autoload(variable: Variable, text: str) -> str:
    """Return `0`, `ops`, `devices` or `all`."""
    word = text.strip().lower()
    if word in _AUTOLOAD:
        return word
    if word in _TRUE or word in _FALSE:
        return "all" if word in _TRUE else "0"
    legal = dict.fromkeys((*_AUTOLOAD, *_TRUE, *_FALSE))
    raise ConfigError(
        f"reading {variable.name}: found {text!r}; expected one of {', '.join(legal)}. "
        f"It says: {variable.meaning}. Unset it or use a legal value."
    )


def _device(variable: Variable, text: str) -> str:
    name = text.strip()
    if re.fullmatch(r"([a-z]\w*)?", name, re.ASCII):
        return name
    raise ConfigError(
        f"reading {variable.name}: found {text!r}; expected the name of a device without an index, such as opk. "
        f"It says: {variable.meaning}. Unset it or use a legal value."
    )


_PIN = re.compile(r"([^\s=@,]+)(?:==([^\s=@,]+))?(?:@sha256:([0-9a-f]{64}))?", re.ASCII)


def _pins(variable: Variable, text: str) -> tuple[tuple[str, str, str], ...]:
    """Return names with the versions and digests they are pinned to, empty where they are not."""
    found = []
    for part in _names(variable, text):
        pin = _PIN.fullmatch(part)
        if pin is None:
            raise ConfigError(
                f"reading {variable.name}: found {part!r}; expected NAME, NAME==VERSION, NAME@sha256:DIGEST or "
                "NAME==VERSION@sha256:DIGEST, with the 64 hexadecimal digits that `opkit plugins why NAME` shows. "
                f"It says: {variable.meaning}. Unset it or use a legal value."
            )
        found.append((pin[1], pin[2] or "", pin[3] or ""))
    return tuple(found)


def _seconds(variable: Variable, text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text.strip(), re.ASCII):
        return float(text)
    raise ConfigError(
        f"reading {variable.name}: found {text!r}; expected a number of seconds such as 30 or 0.5. "
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


ROOMS = ("build", "cache", "native", "plugins", "select", "tune")
_LEVELS = {"+": 10, "": 20, "-": 40}  # DEBUG, INFO and ERROR of `logging`


def _rooms(variable: Variable, text: str) -> dict[str, int]:
    """Return the level that each room that is named logs at.

    >>> _rooms(VARIABLES["OPKIT_LOGS"], "+build,select")
    {'build': 10, 'select': 20}
    """
    levels: dict[str, int] = {}
    for part in _names(variable, text):
        sign = part[0] if part[0] in "+-" else ""
        name = part[len(sign) :].strip()
        if name not in (*ROOMS, "all"):
            raise ConfigError(
                f"reading {variable.name}: found {part!r}; expected one of {', '.join((*ROOMS, 'all'))}, with + before "
                f"it for more and - for errors only.{did_you_mean(name, (*ROOMS, 'all'))} It says: "
                f"{variable.meaning}. Unset it or use a legal value."
            )
        levels.update(dict.fromkeys(ROOMS if name == "all" else (name,), _LEVELS[sign]))
    return levels


def _folder(variable: Variable, text: str) -> Path:
    if text:  # absolute, or it would be another folder after os.chdir
        folder = os.path.expanduser(text)  # much cheaper than asking Path
        return Path(folder if os.path.isabs(folder) else os.path.join(os.getcwd(), folder))
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
        Variable(
            "OPKIT_AUTOLOAD",
            "all",
            "which installed plugins are used by themselves: none (0), those with ops, those with devices, or all",
            _autoload,
        ),
        Variable(
            "OPKIT_PLUGINS", "", "the only plugins to use, some perhaps pinned: fast,numba==0.1.0", _pins
        ),
        Variable("OPKIT_PLUGINS_DENY", "", "plugins not to use, whatever else is said: slow,other", _names),
        Variable("OPKIT_DEVICE", "", "the device of a plugin to set up, whatever its probe says", _device),
        Variable("OPKIT_STRICT", "0", "whether a plugin that is broken or does not fit is an error", _flag),
        Variable(
            "OPKIT_PLUGINS_TIMEOUT",
            "120",
            "seconds that a call of a plugin, or the trial of its library, may take (0: any number)",
            _seconds,
        ),
        Variable("OPKIT_LOGS", "", "what opkit tells of its work on stderr: +build,select", _rooms),
        Variable(
            "OPKIT_PLUGINS_PARENT",
            "",
            "set by opkit for child processes: the plugins that their parent uses",
            lambda variable, text: text,
        ),
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
    return parse(name, os.environ.get(name, VARIABLES[name].default))


def parse(name: str, text: str) -> Any:
    """Return the value that variable `name` has as `text`; raise ConfigError where that is not legal."""
    variable = VARIABLES[name]
    return variable.parse(variable, text)


def refresh() -> None:
    """Forget the values read so far, so that the next `get` reads the environment anew."""
    get.cache_clear()
