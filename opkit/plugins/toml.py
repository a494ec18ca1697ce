"""Reading TOML, with the standard library where it can. Imported only where there is a file to read."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def loads(text: str) -> dict[str, Any]:
    """Return what a text says.

    Raises:
        ValueError: it is no TOML; the text of the error has the line.
    """
    try:
        found: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return found
