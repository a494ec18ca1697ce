"""What live processes hold: the entries they were given, and the folders they build in.

Each process has one file under `live/`. It is locked for as long as the process lives, however it
ends, and lists the entries the process was given. A lock also lives on in children that were forked,
which have the libraries mapped too; what a child is given itself goes to a file of its own.

    live/<id>    one entry a line; empty, for the next process to take, where the last one ended well

Where a file system has no locks, the first line says which process it is: one of this host is looked
up by its pid, any other is taken to be alive.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import itertools
import os
from dataclasses import dataclass

from opkit.cpp._owner import Owner

_LOOKED_AT = 32  # files of which one may be free


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
    os.write(file.fd, b"\n")  # it goes to nobody else while its folders may be there
    return file.id


def scan(root: str) -> tuple[set[str], set[str]]:
    """Return the ids of live processes, and the entries that they hold; forget the dead."""
    ids: set[str] = set()
    entries: set[str] = set()
    with contextlib.suppress(OSError), os.scandir(f"{root}/live") as files:
        for file in files:
            with contextlib.suppress(OSError):  # gone meanwhile
                if not _remove_if_dead(file.path):
                    ids.add(file.name)
                    with open(file.path, encoding="utf-8", errors="surrogateescape") as stream:
                        entries.update(stream.read().split("\n"))
    return ids, entries - {""}


def _mine(root: str) -> _File | None:
    place = root, os.getpid()
    if place in _files:
        file = _files[place]
        if file is None or file.is_there():
            return file
        _held.difference_update({held for held in _held if held[0] == root})
    try:
        _files[place] = _take_over(root) or _create(root)
    except OSError:  # a cache that this process may only read
        _files[place] = None
    return _files[place]


def _take_over(root: str) -> _File | None:
    """Return the file that a process left when it ended: making one takes longer than all else of a hit."""
    with contextlib.suppress(OSError), os.scandir(f"{root}/live") as files:
        for found in itertools.islice(files, _LOOKED_AT):
            if found.stat(follow_symlinks=False).st_size:
                continue
            fd = os.open(found.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            with contextlib.suppress(OSError):  # somebody was faster, or there are no locks
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stat = os.fstat(fd)
                if stat.st_nlink and not stat.st_size:
                    return _File(fd, found.path, (stat.st_dev, stat.st_ino))
            os.close(fd)
    return None


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
            is_taken = False
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_taken = True
            except OSError:  # no locks here
                os.write(fd, f"{Owner.me().dumps()}\n".encode())
            stat = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        if stat.st_nlink and not is_taken:  # else somebody took it for a dead one's before it was locked
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
    else:
        os.unlink(path)  # while it is locked, or somebody might take it
        return True
    finally:
        os.close(fd)
    os.unlink(path)
    return True


@atexit.register
def _leave() -> None:
    """Leave the file of this process to the next one, unless a child that it forked holds it."""
    for (_, pid), file in _files.items():
        if pid == os.getpid() and file is not None and file.is_there():
            with contextlib.suppress(OSError):
                os.close(file.fd)
                fd = os.open(file.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.ftruncate(fd, 0)
                finally:
                    os.close(fd)
