"""What processes leave for one another about plugins: small JSON files in the cache folder.

    <OPKIT_CACHE_DIR>/plugins/calls/…         calls of plugins that go on, see quarantine
                             /quarantine/…    plugins that are left out, see quarantine
                             /trials/…        what became of native libraries, see trial
                             /hashes/…        the contents of libraries, by path, see trial
                             /locks/…         whose turn it is

A file appears whole or not at all. Where the folder cannot be written nothing is remembered, and nothing
fails because of that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import Any

import opkit_boot


def path(*parts: str) -> str:
    """Return the path of a file or folder of records, which need not exist."""
    return os.path.join(opkit_boot.folder(), *parts)


def key(*parts: object) -> str:
    """Return a file name that stands for `parts`; it begins with the first of them, for who looks into the folder."""
    from opkit.cpp import cache

    return f"{cache.slug(str(parts[0]))}-{cache.digest(*parts)[:16]}"


def read(file: str) -> dict[str, Any]:
    """Return what `write` left there; nothing where there is no such file, or something else in it."""
    import json

    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(file: str, content: dict[str, Any]) -> bool:
    """Put `content` there, in place of what there was; return whether that was possible."""
    import json

    own = f"{file}.{os.urandom(4).hex()}"
    try:
        make(os.path.dirname(file))
        with open(own, "x", encoding="utf-8") as stream:
            json.dump(content, stream)
        os.replace(own, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(own)
        return False
    return True


def make(folder: str) -> None:
    """Make a folder of records.

    Raises:
        OSError: it cannot be made.
    """
    if not os.path.isdir(folder):
        # As cpp makes it, for libraries in it are run.
        os.makedirs(os.path.dirname(path()), mode=0o700, exist_ok=True)
        os.makedirs(folder, mode=0o755, exist_ok=True)


@contextlib.contextmanager
def turn(file: str) -> Iterator[None]:
    """Wait until no other process or thread has its turn with `file`; the system ends that of a dead one.

    Where there are no locks nobody waits: what is done in turn may be done twice.
    """
    fd = -1
    with contextlib.suppress(OSError):
        make(path("locks"))
        fd = os.open(path("locks", os.path.basename(file)), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if fd >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        if fd >= 0:
            with contextlib.suppress(OSError):  # a child forked meanwhile has the file open too
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
