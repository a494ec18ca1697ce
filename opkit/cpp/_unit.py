"""One translation unit: a text that includes the user's files by absolute path, or has their text.

Where the text is from and where the files lie decides nothing about what is compiled, so keys are
made of what is left without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from opkit.cpp.toolchain import Toolchain

# It begins with a rare letter, which is found much faster than every beginning of a line.
_FROM = re.compile(
    r'#[ \t]*(?:include[ \t]+"(?P<included>/[^"\n]+)"|line[ \t]+\d+[ \t]+"(?P<placed>[^"\n]+)")'
)


@dataclass(frozen=True)
class Unit:
    """One translation unit: a text, which may include the user's files by absolute path."""

    name: str
    """The file that the text is written to; unique in its job."""
    text: str
    toolchain: Toolchain
    meaning: str | None = None
    """What the text says beside the user's source, where that is generated and may be worded anew."""

    @classmethod
    def of_file(cls, path: Path, index: int, compiled_by: Toolchain) -> Unit:
        """Return the unit that a user's file is by itself."""
        return cls(f"{index}_{path.stem}{path.suffix}", f'#include "{path}"\n', compiled_by)


def placed_nowhere(text: str) -> str:
    """Return a unit's text without where it is from and the folders of the files that it includes."""
    kept, end = [], 0
    for found in _directives(text):
        kept.append(text[end : found.start()])
        end = found.end()
    return "".join((*kept, text[end:]))


def included_by_path(text: str) -> list[Path]:
    """Return the files that a unit's text includes by absolute path; a Python file that it is from is none."""
    return [path for path in map(Path, _named(text, "included")) if path.is_file()]


def sources(unit: Unit) -> list[Path]:
    """Return the user's files: those that the unit includes by path, and those that its text is from."""
    placed = [name for name in _named(unit.text, "placed") if name.startswith("/")]
    return [Path(name) for name in dict.fromkeys([*_named(unit.text, "included"), *placed])]


def _named(text: str, group: str) -> list[str]:
    return [found[group] for found in _directives(text) if found[group]]


def _directives(text: str) -> list[re.Match[str]]:
    return [
        found
        for found in _FROM.finditer(text)
        if not text[text.rfind("\n", 0, found.start()) + 1 : found.start()].strip(" \t")
    ]
