"""Which folders are the cache: the one that is written, then those that are only read.

Libraries from them run in the user's process. So nobody else may be able to write them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from opkit import _config
from opkit.errors import BuildError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_safe: set[tuple[str, int]] = set()  # folder and user


def own() -> str:
    """Return the folder that is written."""
    return _absolute(_config.get("OPKIT_CACHE_DIR"))


def read_only() -> tuple[str, ...]:
    """Return the folders that are only read."""
    return tuple(map(_absolute, _config.get("OPKIT_CACHE_PATH")))


def readable(doing: str) -> list[str]:
    """Return the folders to look in, the own one first.

    Raises:
        BuildError: others may write one of them.
    """
    folders = [own(), *read_only()]
    for folder in folders:
        if (folder, os.geteuid()) not in _safe:
            _check(folder, doing, is_own=folder == folders[0])
    return folders


def make(doing: str) -> str:
    """Return the own folder, and make it where there is none yet.

    Raises:
        BuildError: others may write it, or this user may not.
    """
    folder = own()
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        if (folder, os.geteuid()) not in _safe:
            _check(folder, doing, is_own=True)
        for name in ("lib", "tmp", "failed", "locks", "live"):
            if not os.path.isdir(path := f"{folder}/{name}"):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o755)  # under umask 0 it would be everyone's
    except OSError as error:
        raise unwritable(doing, error) from error
    return folder


def unwritable(doing: str, error: OSError) -> BuildError:
    """Return the error for a cache folder that could not be written."""
    return BuildError(
        f"{doing}: the cache folder {own()} cannot be written ({error.strerror or error}); "
        "expected a folder that this user may write and that has room. Set OPKIT_CACHE_DIR to one."
    )


def _check(folder: str, doing: str, *, is_own: bool) -> None:
    for path in (folder, f"{folder}/lib"):
        try:
            found = os.stat(path)
        except OSError:  # nothing there to be read
            return
        variable = "OPKIT_CACHE_DIR" if is_own else "OPKIT_CACHE_PATH"
        if is_own and found.st_uid != os.geteuid():
            raise BuildError(
                f"{doing}: the cache folder {path} belongs to {_user(found.st_uid)}, and this process runs as "
                f"{_user(os.geteuid())}; expected a folder of its own, because libraries in it are run. Set "
                "OPKIT_CACHE_DIR to one; a folder of others that is only read is named in OPKIT_CACHE_PATH."
            )
        if found.st_mode & _OTHERS_WRITE:
            raise BuildError(
                f"{doing}: the cache folder {path} may be written by others than {_user(found.st_uid)} (its mode "
                f"is {stat.S_IMODE(found.st_mode):04o}); expected one that only its owner writes, because "
                f"libraries in it are run. Run chmod go-w {path}, or name another folder in {variable}."
            )
    _safe.add((folder, os.geteuid()))


def _user(number: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


def _absolute(folder: Path) -> str:
    return os.path.abspath(folder)
