"""Keeps the cache small: what the dead left, what failed long ago, and what was not used for longest.

Nothing that a live process holds is removed. Clocks decide only in which order and how long after.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from opkit.cpp import _live, _manifest

_KEPT_FOR = 7 * 86400.0  # seconds that a failed build's remains and an unused lock are kept
_VARIANTS = 8  # of one key: an edited header makes another each time
_TARGET = 0.9  # of the limit, so that not every build after it is reached has to remove something
_CONDEMNED = ".removed"
_SIZE = "size"  # the file with the sum of all entries' sizes
_LOOK_AGAIN = 1 / 64  # of the builds


@dataclass(frozen=True)
class Entry:
    """A published entry, as it lies in the folder."""

    name: str
    variant: str
    folder: str
    size: int
    used: float
    is_removed: bool
    """Its manifest is away: whoever began to remove it did not end."""

    @property
    def id(self) -> str:
        return f"{self.name}/{self.variant}"

    def manifest(self) -> _manifest.Manifest | None:
        """Return what the entry says of itself, or None where that cannot be read."""
        return _manifest.read(self.folder, self.name)

    def is_whole(self) -> bool:
        """Whether every file of the entry is what it was when it was published; reads them all."""
        manifest = self.manifest()
        return manifest is not None and all(
            _manifest.has_content(f"{self.folder}/{file.path}", file) for file in manifest.files
        )


def entries(root: str, name: str | None = None) -> Iterator[Entry]:
    """Give every entry under `root`."""
    names = [name] if name is not None else _list(f"{root}/lib")
    for one in names:
        for variant in _list(f"{root}/lib/{one}"):
            folder = f"{root}/lib/{one}/{variant}"
            size, used, is_removed = 0, 0.0, True
            try:
                with os.scandir(folder) as files:
                    for file in files:
                        stat = file.stat(follow_symlinks=False)
                        size += stat.st_size
                        if file.name == _manifest.NAME:
                            used, is_removed = stat.st_mtime, False
            except OSError:  # no folder, or gone meanwhile
                continue
            yield Entry(one, variant, folder, size, used, is_removed)


def remove(root: str, chosen: Iterable[Entry]) -> list[Entry]:
    """Remove entries that no live process holds, and return those that were removed."""
    condemned = []
    for entry in chosen:
        manifest = f"{entry.folder}/{_manifest.NAME}"
        # From here on nobody is given the entry; who was given it before has said so, see _live.hold.
        with contextlib.suppress(FileNotFoundError):  # a removal that was interrupted
            os.rename(manifest, manifest + _CONDEMNED)
        condemned.append(entry)
    in_use = held(root) if condemned else set()
    removed = []
    for entry in condemned:
        manifest = f"{entry.folder}/{_manifest.NAME}"
        if entry.id in in_use:
            with contextlib.suppress(OSError):
                os.rename(manifest + _CONDEMNED, manifest)
            continue
        if os.path.exists(manifest):  # somebody has built it anew meanwhile
            continue
        discard(root, entry.folder)
        with contextlib.suppress(OSError):  # the last one of its key
            os.rmdir(f"{root}/lib/{entry.name}")
        removed.append(entry)
    return removed


def discard(root: str, folder: str) -> None:
    """Take `folder` away at once, then delete what is in it."""
    away = f"{root}/tmp/removed-{os.urandom(8).hex()}"
    with contextlib.suppress(OSError):
        if not os.path.isdir(f"{root}/tmp"):
            os.mkdir(f"{root}/tmp", 0o755)
        os.rename(folder, away)
    shutil.rmtree(away, ignore_errors=True)


def evict(root: str, limit: int, new: str | None = None) -> list[Entry]:
    """Remove what was not used for longest until `limit` bytes are left; 0 is no limit.

    After the entry `new` was published: then the other entries are looked at only where their size is not
    known or reaches the limit. Of its key, the oldest entries beyond a few are removed too.
    """
    name = new.partition("/")[0] if new else None
    same = _by_use(entries(root, name)) if name else []
    chosen = {entry.id: entry for entry in same[: max(0, len(same) - _VARIANTS)]}
    if limit:
        known = _known_size(root) if new else None
        total = (known or 0) + sum(entry.size for entry in same if entry.id == new)
        if known is None or total > limit:
            found = _by_use(entries(root))
            chosen.update((entry.id, entry) for entry in found if entry.is_removed)
            total = sum(entry.size for entry in found)
            if total > limit:
                in_use = held(root)
                for entry in found:
                    if total <= limit * _TARGET:
                        break
                    if entry.id not in in_use:
                        chosen[entry.id] = entry
                        total -= entry.size
        with contextlib.suppress(OSError), open(f"{root}/{_SIZE}", "w") as stream:
            stream.write(str(total))
    else:
        with contextlib.suppress(OSError):  # nobody adds to it any more
            os.unlink(f"{root}/{_SIZE}")
    return remove(root, chosen.values())


def held(root: str) -> set[str]:
    """Return the ids of the entries that live processes hold."""
    return _live.scan(root)[1]


def collect(root: str, kept_for: float = _KEPT_FOR) -> None:
    """Remove what killed builds left, and failed builds and locks that are older than `kept_for` seconds."""
    # First what there is, then who lives: whoever has a folder has said that it lives before.
    left = _list(f"{root}/tmp")
    alive = _live.scan(root)[0] if left else set()
    for name in left:
        if owner_of(name) not in alive:
            path = f"{root}/tmp/{name}"
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.unlink(path)
    for name in _list(f"{root}/failed"):
        if _is_old(f"{root}/failed/{name}", kept_for):
            shutil.rmtree(f"{root}/failed/{name}", ignore_errors=True)
    for name in _list(f"{root}/locks"):
        if _is_old(path := f"{root}/locks/{name}", kept_for):
            _remove_lock(path)


def _by_use(found: Iterable[Entry]) -> list[Entry]:
    return sorted(found, key=lambda entry: entry.used)


def _known_size(root: str) -> int | None:
    """Return how many bytes the entries have together; None where it is to be found out anew."""
    # Builders that end at once overwrite each other's sum, so that it is too small: not for long.
    if random.random() < _LOOK_AGAIN:
        return None
    try:
        with open(f"{root}/{_SIZE}") as stream:
            return int(stream.read())
    except (OSError, ValueError):
        return None


def folder_name(name: str, owner: str) -> str:
    """Return a unique name for a folder in which the process `owner` builds."""
    return f"{name}-{owner}-{os.urandom(6).hex()}"


def owner_of(folder: str) -> str:
    parts = folder.rsplit("-", 2)
    return parts[1] if len(parts) == 3 else ""


def _remove_lock(path: str) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)  # whoever waits for it sees that it is gone and makes another
        finally:
            os.close(fd)


def _is_old(path: str, age: float) -> bool:
    try:
        return time.time() - os.stat(path).st_mtime > age
    except OSError:
        return False


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
