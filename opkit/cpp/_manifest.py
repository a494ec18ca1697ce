"""What an entry of the cache consists of and depends on, in the file `manifest.json` beside it.

Every file is listed with its size, its time and the sha256 of its content. The time only saves work:
a file whose time is the recorded one is not read again, any other time leads to its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import sys
import time
from dataclasses import dataclass
from typing import Any

NAME = "manifest.json"
FORMAT = 1
LIMIT = 4 << 20  # bytes that a manifest may have

_BLOCK = 1 << 20
# An edit may leave a file's time as it was when it falls into the same tick of the file system's clock.
_TICK = 2_000_000_000
_UNKNOWN_TIME = 0  # so that the content is looked at
# Folders that lie elsewhere for other users of a shared cache.
_PLACES = {
    "{opkit}": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    "{python}": os.path.abspath(sys.prefix),
}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Record:
    """A file: its name in the entry, or its path outside of it."""

    path: str
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: str, listed_as: str) -> Record:
        """Read the file at `path`.

        Raises:
            OSError: it cannot be read.
        """
        found = os.stat(path)
        return cls(listed_as, found.st_size, _time_of(found), sha256(path))


@dataclass
class Manifest:
    name: str
    label: str
    library: str
    files: list[Record]
    depends: list[Record]

    @classmethod
    def parse(cls, text: bytes, name: str) -> Manifest:
        """Return the manifest of the entry `name` that `dumps` wrote.

        Raises:
            ValueError: it is something else; the text says what.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != FORMAT or data["name"] != name:
                raise ValueError("it is the manifest of another entry or format")
            files = [Record(*record) for record in data["files"]]
            depends = [Record(*record) for record in data["depends"]]
            for file in files:
                if file.path == NAME or not is_plain(file.path):
                    raise ValueError(f"it lists {file.path!r}, which is no plain file name")
                if not _SHA256.fullmatch(file.sha256) or not isinstance(file.size, int):
                    raise ValueError(f"it lists {file.path!r} without a size and a sha256")
            if data["library"] not in [file.path for file in files]:
                raise ValueError(f"its library {data['library']!r} is not listed")
            return cls(name, str(data["label"]), data["library"], files, depends)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no manifest ({type(error).__name__}: {error})") from None

    def dumps(self) -> bytes:
        data = {
            "format": FORMAT,
            "name": self.name,
            "label": self.label,
            "library": self.library,
            "files": [_listed(record) for record in self.files],
            "depends": [_listed(record) for record in self.depends],
        }
        return json.dumps(data).encode("ascii")

    @property
    def variant(self) -> str:
        """The name of the entry among those of one key: what it depends on, and nothing else."""
        text = repr(sorted((record.path, record.sha256) for record in self.depends))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def read(folder: str, name: str) -> Manifest | None:
    """Return the manifest in `folder`, or None where there is none that can be read."""
    try:
        with open(f"{folder}/{NAME}", "rb", buffering=0) as stream:
            return Manifest.parse(stream.read(), name)
    except (OSError, ValueError):
        return None


def write(folder: str, manifest: Manifest) -> None:
    """Write the manifest of a folder that nobody else has seen yet."""
    with open(f"{folder}/{NAME}", "wb", opener=_opener) as stream:
        stream.write(manifest.dumps())
        stream.flush()
        os.fsync(stream.fileno())


def refresh(folder: str, manifest: Manifest, temporary: str) -> None:
    """Replace the manifest of a published entry by one with newer times, where that can be done."""
    own = f"{temporary}/{os.urandom(8).hex()}.json"
    with contextlib.suppress(OSError):
        try:
            with open(own, "xb", opener=_opener) as stream:
                stream.write(manifest.dumps())
            os.replace(own, f"{folder}/{NAME}")
        except OSError:
            os.unlink(own)


class Check:
    """Compares records with the files as they are now, reading each file once at most."""

    def __init__(self) -> None:
        self._hashes: dict[str, str] = {}
        self.found_other_times = False

    def holds(self, records: list[Record], folder: str = "") -> bool:
        """Whether every file has the recorded content; records get the times they have now."""
        stat_, prefix = os.stat, f"{folder}/" if folder else ""
        for record in records:
            path = f"{prefix}{record.path}" if folder else expand(record.path)
            try:
                found = stat_(path)
            except (OSError, ValueError):
                return False
            if found.st_size != record.size:
                return False
            if found.st_mtime_ns != record.mtime_ns and not self._has_content(path, found, record):
                return False
        return True

    def _has_content(self, path: str, found: os.stat_result, record: Record) -> bool:
        if not stat.S_ISREG(found.st_mode):
            return False
        if path not in self._hashes:
            try:
                self._hashes[path] = sha256(path)
            except OSError:
                return False
        if self._hashes[path] != record.sha256:
            return False
        now = _time_of(found)
        if now != record.mtime_ns:
            record.mtime_ns = now
            self.found_other_times = True
        return True


def sha256(path: str) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def has_content(path: str, record: Record) -> bool:
    """Whether the file has the recorded content, whatever its time."""
    try:
        found = os.stat(path)
        return stat.S_ISREG(found.st_mode) and found.st_size == record.size and sha256(path) == record.sha256
    except (OSError, ValueError):
        return False


def is_plain(name: object) -> bool:
    """Whether `name` is the name of a file in a folder, and leads nowhere else."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(letter in name for letter in "/\\\0")
        and len(os.fsencode(name)) <= 255
    )


def portable(path: str) -> str:
    """Return `path` as it is listed: what lies within opkit or this Python does so for others too."""
    for place, folder in _PLACES.items():
        if path.startswith(f"{folder}/"):
            return place + path[len(folder) :]
    return path


def expand(path: str) -> str:
    """Return where a listed path is here.

    >>> expand(portable("/usr/include/math.h")), expand(portable(__file__)) == __file__
    ('/usr/include/math.h', True)
    """
    if path[:1] == "{":
        place, brace, rest = path.partition("}")
        return _PLACES.get(place + brace, place + brace) + rest
    return path


def _time_of(found: os.stat_result) -> int:
    """Return a file's time as it is recorded: only where a later edit cannot have the same."""
    return found.st_mtime_ns if 0 <= found.st_mtime_ns <= time.time_ns() - _TICK else _UNKNOWN_TIME


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o644)  # under umask 0 it would be everyone's


def _listed(record: Record) -> tuple[str, int, int, str]:
    return record.path, record.size, record.mtime_ns, record.sha256
