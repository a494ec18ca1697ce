"""What is installed, found without reading what has not changed since some process of this environment read it.

Installing, removing and upgrading change the time of the folder in `sys.path`. What an author edits in a project, after
an editable install or with the metadata beside the code, is looked at file by file. `refresh` forgets it, for what no
time tells, such as a file that somebody edits where an installer has put it.
"""

from __future__ import annotations

import marshal
import os
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

import opkit_boot
from opkit.plugins import store
from opkit.plugins.discovery import Found, Listing, Stamp, normalized, read


class Facts(NamedTuple):
    """What ranges in manifests are compared with."""

    torch: str
    opkit: str
    python: str
    platform: str


_torch: str | None = None  # the version that is installed, as of the last look


def installed() -> list[Found]:
    """Return the installed plugins, ordered by name and then by distribution."""
    global _torch
    found: list[Found] = []
    seen = _torch = ""
    with store.writing():
        for listing in map(_listing, dict.fromkeys(sys.path)):
            _torch = _torch or listing.torch
            found += [one for one in listing.plugins if f"/{normalized(one.distribution)}/" not in seen]
            seen += listing.names
    return sorted(found, key=lambda plugin: plugin[:2])


def in_folder(folder: str) -> Listing:
    """Return what a folder of `sys.path` holds, also what an earlier folder has in its place."""
    with store.writing():
        return _listing(folder)


def facts() -> Facts:
    """Return the versions that are in use; torch is not imported for it."""
    import opkit

    if _torch is None:
        installed()
    loaded = getattr(sys.modules.get("torch"), "__version__", None)
    system = os.uname()
    python = ".".join(map(str, sys.version_info[:3]))
    platform = f"{system.sysname.lower()}-{system.machine}"
    return Facts(str(loaded or _torch), opkit.__version__, python, platform)


def refresh() -> None:
    """Forget everything, so that folders and plugins are looked at anew, by other processes too."""
    store.refresh()


def unchanged(stamps: Iterable[tuple[str, Stamp]]) -> bool:
    """Whether files are as they were."""
    return all(opkit_boot.stamp(path) == before for path, before in stamps)


def _listing(folder: str) -> Listing:
    """Return what a folder of `sys.path` holds, read anew where it changed."""
    try:
        folder = folder if folder.startswith("/") else os.path.abspath(folder)
        changed_at = os.stat(folder).st_mtime_ns
    except OSError:
        return Listing()
    known = store.folder(folder)
    if known is not None and known[0] == changed_at:
        names, torch, plugins, watched = marshal.loads(known[1])
        listing = Listing(names, torch, tuple(map(Found._make, plugins)), watched)
        if unchanged(watched) and all(unchanged(one.watched) for one in listing.plugins):
            return listing
    listing = read(folder)
    held = marshal.dumps((listing.names, listing.torch, tuple(map(tuple, listing.plugins)), listing.watched))
    if (
        listing.names or known is None or known[1] != held
    ):  # programs write into folders that have nothing for us
        store.put_folder(folder, changed_at if _is_settled(changed_at) else -1, held)
    return listing


def _is_settled(changed_at: int) -> bool:
    """Whether a change after now gives a folder another time; file systems count in ticks, some in seconds."""
    tick = 2_000_000_000 if changed_at % 1_000_000_000 == 0 else 50_000_000
    return time.time_ns() - changed_at > tick
