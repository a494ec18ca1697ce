"""One builder at a time, for any number of processes and threads that want the same.

The lock is the system's and dies with its holder. It saves work and nothing else: being right rests
on unique folders and renames, so a file system without locks merely builds more than once.

The locked file says who builds, and afterwards why that failed: those who waited raise the same error,
whoever comes later tries again. Attempts are told apart by an id, never by a time.

filelock is not used: it empties the file it locks and cannot tell a lock that is held from one that
cannot be.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opkit.cpp import _progress
from opkit.cpp._owner import Owner
from opkit.errors import BuildError, Diagnostic

_SAY_AFTER = 2.0  # seconds of waiting until a line on stderr
_LOOK_AFTER = 0.5  # seconds of waiting between two looks at whether the owner lives
_PATIENCE = 1800.0  # seconds: then build it too, whatever the owner does
_POLL = 0.002, 0.025  # seconds between two tries, at first and at most


class Turn:
    """This process's turn to build; `failure` is what those ran into whom it waited for."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.failure: BuildError | None = None

    def failed(self, error: BuildError) -> None:
        """Leave `error` to those who wait."""
        self._write(
            {
                "id": os.urandom(8).hex(),
                "message": str(error),
                "op": error.op,
                "diagnostics": [
                    (found.file, found.line, found.column, found.message) for found in error.diagnostics
                ],
                "log_path": str(error.log_path) if error.log_path else None,
                "command": error.command,
            }
        )

    def _begin(self) -> None:
        self._write({"owner": Owner.me().dumps()})

    def _write(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        with contextlib.suppress(OSError):  # no room: those who wait build for themselves
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, data, 0)


@contextlib.contextmanager
def take(path: Path, label: str) -> Iterator[Turn]:
    """Wait until nobody else builds what the lock file `path` stands for.

    Raises:
        FileNotFoundError: the cache folder went away.
        OSError: the file cannot be made.
    """
    fd, before, waited = _acquire(path, label)
    try:
        turn, now = Turn(fd), _read(fd) if waited else {}
        if "message" in now and now["id"] != before.get("id"):
            turn.failure = _error(now)  # and it stays for the others who waited
        else:
            turn._begin()
        yield turn
    finally:
        with contextlib.suppress(
            OSError
        ):  # a forked child may have the file open too, so closing is not enough
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _acquire(path: Path, label: str) -> tuple[int, dict[str, Any], bool]:
    """Return the locked file, what was in it at first, and whether somebody else had it."""
    started = looked = time.monotonic()
    waited, said, pause = False, False, _POLL[0]
    fd = _open(path)
    try:
        before = _read(fd)  # before the first try: a failure after this is one of somebody waited for
        while True:
            if (free := _try(fd)) is not False:
                if free is None or _is_at(fd, path):
                    return fd, before, waited
            elif _is_at(fd, path):
                waited = True
                time.sleep(pause)
                pause = min(pause * 1.5, _POLL[1])
                owner, now = None, time.monotonic()
                if now - looked > _LOOK_AFTER:
                    looked, owner = now, Owner.parse(_read(fd).get("owner", ""))
                if owner and not said and now - started > _SAY_AFTER:
                    said = True
                    _progress.say(f"opkit: waiting for {label}, which {owner}")
                if not (owner and owner.is_gone()) and now - started < _PATIENCE:
                    continue
                # A child of the dead builder has inherited the lock, or whoever has it hangs: leave it that
                # file and make another.
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(fd)
            fd = -1
            fd = _open(path)
    except BaseException:
        if fd >= 0:
            os.close(fd)
        raise


def _open(path: Path) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path.parent, 0o755)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _try(fd: int) -> bool | None:
    """Return whether the lock was taken; None where the file system has none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some file systems say EACCES of a lock that is held
        return False
    except OSError:
        return None
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _read(fd: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    except (OSError, ValueError):  # nothing yet, or it is being written
        return {}
    return content if isinstance(content, dict) else {}


def _error(content: dict[str, Any]) -> BuildError:
    return BuildError(
        content["message"],
        op=content["op"],
        diagnostics=[Diagnostic(*found) for found in content["diagnostics"]],
        log_path=Path(content["log_path"]) if content["log_path"] else None,
        command=content["command"],
    )
