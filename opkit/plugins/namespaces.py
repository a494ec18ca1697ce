"""What a native library defines in torch's dispatcher, and what of it is defined already.

The dispatcher ends the process where a namespace (TORCH_LIBRARY) or an operator is defined twice, and no
`except` sees it. So a library is asked before it is opened: what it would define is found by opening
it in another process, see trial, and is held against the dispatcher of this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

# A namespace is a string of its own in the file; names that the compiler made are none.
_WORD = re.compile(rb"(?<=\0)(?!_Z)[A-Za-z_][A-Za-z0-9_]{0,63}(?=\0)")


class Defined(NamedTuple):
    """What a library defines: namespaces with TORCH_LIBRARY, and operators with their overloads."""

    namespaces: tuple[str, ...]
    ops: tuple[str, ...]


def defined_by(path: str, open_library: Callable[[], object]) -> Defined:
    """Return what the library at `path` defines when `open_library` opens it in this process.

    A namespace without operators shows nowhere. It is found by trying the words in the file: each that cannot
    be defined any more after the opening, and could be before.
    """
    from opkit import _torch_library

    with open(path, "rb") as stream:
        words = {word.decode() for word in _WORD.findall(stream.read())}
    free = {word for word in words if not _torch_library.definer(word)}
    ops = _torch_library.all_operators()
    open_library()
    added = _torch_library.all_operators() - ops
    free |= _namespaces(added) - _namespaces(ops)
    return Defined(tuple(sorted(word for word in free if _torch_library.definer(word))), tuple(sorted(added)))


def _namespaces(ops: Iterable[str]) -> set[str]:
    return {name.partition("::")[0] for name in ops}


def clashes(namespaces: Sequence[str], ops: Sequence[str]) -> list[str]:
    """Return what of this is defined in this process already, and by what, in words.

    Example:
        >>> clashes(["aten", "mine"], [])
        ["the namespace 'aten' (TORCH_LIBRARY), which .../RegisterSchema.cpp... has defined"]
    """
    from opkit import _torch_library

    found = [
        f"the namespace {name!r} (TORCH_LIBRARY), which {where} has defined"
        for name in namespaces
        if (where := _torch_library.definer(name))
    ]
    return found + [
        f"the op {name}, which {where} has defined" for name in ops if (where := _torch_library.definer(name))
    ]
