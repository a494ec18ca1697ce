"""Every OPKIT_* environment variable, in one table, parsed once and refused when wrong.

Values are read on first use and kept; `refresh()` reads them anew (tests use it).
This module decides nothing: it only turns text into values.
"""

from __future__ import annotations

import functools
import os
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


def _folder(variable: Variable, text: str) -> Path:
    if text:
        return Path(text).expanduser()
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "opkit"


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("OPKIT_BACKEND", "", "backends to prefer, first one first: cpp,reference", _names),
        Variable("OPKIT_AUTOLOAD", "all", "whether installed plugins are called on first need", _flag),
        Variable(
            "OPKIT_CACHE_DIR",
            "",
            "folder for compiled kernels (default: opkit in $TORCH_EXTENSIONS_DIR or ~/.cache)",
            _folder,
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
