"""Preambles, as clang calls the first headers of a unit: in the stable tier they are precompiled, up to torch's.

How a header is precompiled is the business of `opkit.cpp._pch`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opkit.cpp import _includes, _pch, compilers

_STABLE = "torch/csrc/stable/"
# With these it shows in what the compiler says whether a header was precompiled.
_SHOWING = ("invalid-pch", "-Wsystem-headers")
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


@dataclass(frozen=True)
class Preamble:
    """The headers that a unit of the stable tier includes first, up to torch's, for gcc to have read already.

    It is read ahead of the unit, which then includes each of them again, to no effect. They are the same
    headers in the same order with nothing before them, so nothing changes for what follows.
    """

    header: _pch.Header
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
    ) -> Preamble | None:
        """Return what `text`, a unit's, begins with; None where that is to be read as it stands.

        Args:
            text: the unit's text.
            cxx: the compiler.
            words: all flags that it gets; the caller's own at the end.
            user_words: the caller's own flags.
            user_folders: where the caller's headers are, those in `user_words` included.
            system_folders: where torch's headers are.
        """
        if not _pch.is_gcc(cxx) or any(
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
        flags = (*_pch.relevant_flags(words, user_words), *maps)
        included = "".join(f"#include <{name}>\n" for name in names)
        return cls(_pch.Header(names[-1], included, cxx, flags), tuple(user_folders))

    def place(self, folder: Path, unit: str) -> list[str]:
        """Put the headers into `folder`, the unit's, and return the flags that have them read first.

        No flags where the headers are not precompiled and need not be, as in the first build. Wants -MD beside them.
        """
        precompiled = self.header.known()
        if precompiled is None or _pch.is_shadowed(precompiled, self.user_folders):
            return []
        name = f"{_FOLDER}/{unit}.h"
        # What gcc reads where it does not take the precompiled one.
        _pch.write_header(folder / name, self.header.text)
        (folder / f"{name}.gch").symlink_to(precompiled)
        # Else the file that the compiler writes would not name what is in the header.
        return ["-include", name, "-fpch-deps"]

    def remember(self) -> None:
        """Say that a unit which begins so was compiled: for the next one the headers are precompiled."""
        with contextlib.suppress(OSError):
            self.header.note()


def remove(folder: Path) -> None:
    """Remove what `Preamble.place` put into `folder`."""
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
