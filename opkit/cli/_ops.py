"""The ops that a command line names, each by its name or by a pattern with `*`."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from opkit.errors import OpNotFoundError, did_you_mean


def matching(patterns: Sequence[str], known: Sequence[str], *, doing: str) -> list[str]:
    """Return those of the `known` names that `patterns` mean, each once.

    Raises:
        OpNotFoundError: a pattern means none.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        found = fnmatch.filter(known, pattern)
        if not found:
            raise OpNotFoundError(
                f"{doing} {pattern}: no op has that name; known are {', '.join(known) or 'none'}."
                f"{did_you_mean(pattern, known)} Name the module that defines it with --import.",
                op=pattern,
            )
        names.update(dict.fromkeys(found))
    return list(names)
