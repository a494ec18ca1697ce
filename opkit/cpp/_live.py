"""What live processes hold: the entries they were given, and the folders they build in.

Each process has one file under `live/`. It is locked for as long as the process lives, however it
ends, and lists the entries the process was given. A lock also lives on in children that were forked,
which have the libraries mapped too; what a child is given itself goes to a file of its own.

    live/<id>    one entry a line

Where a file system has no locks, the first line says which process it is: one of this host is looked
up by its pid, any other is taken to be alive.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
from dataclasses import dataclass

from opkit.cpp._owner import Owner


@dataclass(frozen=True)
class _File:
    fd: int
    path: str
    node: tuple[int, int]

    @property
    def id(self) -> str:
        return os.path.basename(self.path)

    def is_there(self) -> bool:
        """Whether the descriptor still is this file, and the file still is in its folder."""
        try:  # a daemon closes every descriptor it finds, and the number may belong to the user's file by now
            stat = os.fstat(self.fd)
        except OSError:
            return False
        return (stat.st_dev, stat.st_ino) == self.node and stat.st_nlink > 0


_files: dict[tuple[str, int], _File | None] = {}  # of a root and a process; None where it cannot be written
_held: set[tuple[str, str]] = set()


def hold(root: str, entry: str) -> bool:
    """Say that this process was given `entry`; return whether that is new.

    Whoever removes entries first takes their manifest away and then asks `scan`. So an entry whose
    manifest is still there after this call stays.
    """
    if (root, entry) in _held:
        return False
    if file := _mine(root):
        with contextlib.suppress(OSError):  # no room: nobody must wait or fail for this
            os.write(file.fd, f"{entry}\n".encode("utf-8", "surrogateescape"))
    _held.add((root, entry))
    return True


def own_id(root: str) -> str:
    """Return the name that this process has under `root`, by which its folders are known to have an owner.

    Raises:
        OSError: nothing can be written there.
    """
    file = _mine(root)
    if file is None:
        _files.pop((root, os.getpid()), None)
        file = _create(root)
        _files[root, os.getpid()] = file
    return file.id


def scan(root: str) -> tuple[set[str], set[str]]:
    """Return the ids of live processes, and the entries that they hold; forget the dead."""
    ids: set[str] = set()
    entries: set[str] = set()
    with contextlib.suppress(OSError), os.scandir(f"{root}/live") as files:
        for file in files:
            with contextlib.suppress(OSError):
                if not _remove_if_dead(file.path):
                    ids.add(file.name)
                    with open(file.path, encoding="utf-8", errors="surrogateescape") as stream:
                        entries.update(line.rstrip("\n") for line in stream)
    return ids, entries


def _mine(root: str) -> _File | None:
    place = root, os.getpid()
    if place in _files:
        file = _files[place]
        if file is None or file.is_there():
            return file
        _held.difference_update({held for held in _held if held[0] == root})
    try:
        _files[place] = _create(root)
    except OSError:  # a cache that this process may only read
        _files[place] = None
    return _files[place]


def _create(root: str) -> _File:
    while True:
        path = f"{root}/live/{os.urandom(8).hex()}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{root}/live", 0o755)
            continue
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError:  # no locks here
                os.write(fd, f"{Owner.me().dumps()}\n".encode())
            stat = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        if stat.st_nlink:  # else somebody took it for one of a dead process, before it was locked
            return _File(fd, path, (stat.st_dev, stat.st_ino))
        os.close(fd)


def _remove_if_dead(path: str) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        owner = Owner.parse(os.read(fd, 4096).partition(b"\n")[0])
        if owner is None or not owner.is_gone():
            return False
    finally:
        os.close(fd)
    os.unlink(path)
    return True


@atexit.register
def _leave() -> None:
    """Remove the file of this process, unless a child that it forked holds it."""
    for (_, pid), file in _files.items():
        if pid == os.getpid() and file is not None and file.is_there():
            with contextlib.suppress(OSError):
                os.close(file.fd)
                _remove_if_dead(file.path)
