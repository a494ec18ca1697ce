"""Libraries that a package brings along: found by the key of their source, where no compiler is needed.

    <folder of the source>/_opkit/<label>-<source key>.so      the library
                                                      .json    its hash, its architectures, what it needs

The key covers what a library computes and leaves out who compiled it and how, so that the machine
that runs it can tell whether the source is still the one that it was built from. Whatever does not
fit is not found, and the caller compiles. Nothing is written here at run time: the folder is the
installer's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from opkit.cpp._audit import Audit
from opkit.errors import warn

FOLDER = "_opkit"
"""The folder beside a source that has its libraries."""

_ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


def find(folder: Path, name: str, architectures: Sequence[str]) -> Path | None:
    """Return the library `name` in `folder`, or None where there is none that fits.

    A library that is damaged is left alone with one warning.

    Args:
        folder: `_opkit` beside the source.
        name: the slug of the kernel's label, and the key of its source.
        architectures: the GPU architectures that it must run on, none for the CPU.
    """
    record = folder / f"{name}.json"
    try:
        text = record.read_bytes()
    except OSError:  # as a rule there is nothing
        return None
    library = folder / f"{name}.so"
    try:
        told = json.loads(text)
        if not all(covers(told["architectures"], wanted) for wanted in architectures):
            return None
        stat = library.stat()
        if _is_whole(library, told["sha256"], stat.st_size, stat.st_mtime_ns):
            return library
        problem = "its content is not what was installed"
    except OSError as error:
        problem = f"it cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError):
        problem = f"{record.name} is not what was installed"
    _warn_damaged(library, problem)
    return None


def save(library: Path, folder: Path, name: str, *, architectures: Sequence[str], audit: Audit) -> Path:
    """Put `library` into `folder` for `find`, and return where it is.

    Args:
        library: what was built.
        folder: `_opkit` beside the source; made where it is missing.
        name: as in `find`.
        architectures: what it was compiled for: `("8.0", "9.0+PTX")`.
        audit: what it needs, recorded for people who read it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.so"
    shutil.copyfile(library, target)
    told = {
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "architectures": list(architectures),
        "needs": {"torch": ".".join(map(str, audit.torch)), **audit.versions},
        "libraries": list(audit.libraries),
    }
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    return target


def covers(built: Sequence[str], wanted: str) -> bool:
    """Whether code for the architectures `built` runs on the device architecture `wanted`.

    >>> covers(["8.0", "9.0+PTX"], "8.6"), covers(["8.0", "9.0+PTX"], "12.0"), covers(["8.0"], "9.0")
    (True, True, False)
    """
    if wanted.removesuffix("+PTX") in (one.removesuffix("+PTX") for one in built):
        return True
    found = _ARCHITECTURE.fullmatch(wanted)
    # Code with a letter was asked for by name, and only the same has its instructions.
    return (
        found is not None and not found[3] and any(_runs(one, int(found[1]), int(found[2])) for one in built)
    )


def _runs(built: str, major: int, minor: int) -> bool:
    found = _ARCHITECTURE.fullmatch(built)
    if found is None:
        return False
    own = (int(found[1]), int(found[2]))
    if found[3] == "a":  # for this one, as machine code and as PTX
        return own == (major, minor)
    if found[4] and not found[3] and own <= (major, minor):  # the driver compiles PTX for what is newer
        return True
    return own[0] == major and own[1] <= minor


@functools.cache
def _is_whole(library: Path, sha256: str, size: int, mtime_ns: int) -> bool:
    # Size and time are in the arguments so that each state of the file is read once in a process.
    return hashlib.sha256(library.read_bytes()).hexdigest() == sha256


@functools.cache
def _warn_damaged(library: Path, problem: str) -> None:
    warn(
        f"loading {library.name} from {library.parent}: {problem}. The kernel is compiled instead, where there is a "
        "compiler. Install the package again to have it without compiling."
    )
