"""Where compiled libraries live: one folder per key, published whole, shared by all processes.

    <OPKIT_CACHE_DIR>/lib/<name>/      a published library with its manifest, never changed afterwards
                     /failed/<name>/   what a failed build left: log, command, generated sources
                     /tmp/             builds in progress, each in a folder of its own
                     /locks/           lock files, so that two processes do not do the same work twice

Being right does not depend on the locks: a build happens in a private folder and appears by one
rename. This module knows nothing of compilers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from opkit import _config
from opkit.errors import BuildError

_MANIFEST = "manifest.json"
_SAY_AFTER = 2.0  # seconds of waiting for another process before a line on stderr
_PATIENCE = 1800.0  # a builder that was stopped, not killed, keeps its lock: then build it too
_FAILED_FOR = 7 * 86400.0  # seconds that the remains of a failed build are kept
_ATTEMPTS = 3


class Workspace:
    """The private folder of one build; it is gone afterwards unless published or kept."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name

    def keep(self) -> Path:
        """Move the folder to where failed builds are found, and return where that is."""
        target = root() / "failed" / self.name
        for _ in range(_ATTEMPTS):
            shutil.rmtree(target, ignore_errors=True)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(self.folder, target)
            except OSError:  # another process keeps the same failure right now
                continue
            self.folder = target
            break
        return self.folder


def root() -> Path:
    """Return the cache folder: OPKIT_CACHE_DIR.

    By default `opkit` in the first of TORCH_EXTENSIONS_DIR, XDG_CACHE_HOME and ~/.cache that is set.
    """
    folder: Path = _config.get("OPKIT_CACHE_DIR")
    return folder.absolute()


def slug(text: str) -> str:
    """Return `text` as part of a file name.

    >>> slug("demo::rms_norm [cpp]")
    'demo-rms_norm-cpp'
    """
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")[:80] or "kernel"


def digest(*parts: object) -> str:
    """Return a short hash of `parts`, which are anything that `repr` tells apart.

    >>> digest("a", 1) == digest("a", 1), digest("a", 1) == digest("a1")
    (True, False)
    """
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def find(name: str) -> Path | None:
    """Return the library published as `name`, or None where there is none or it is damaged."""
    folder = root() / "lib" / name
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        library = folder / manifest["library"]
        whole = hashlib.sha256(library.read_bytes()).hexdigest() == manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return library if whole else None


def obtain(key: Callable[[], str], *, label: str, build: Callable[[Workspace], Path]) -> Path:
    """Return the library for `key()`, calling `build` only where no process has built it yet.

    Args:
        key: computes the key from the sources as they are now. It is called again after a build:
            where sources changed in the meantime, what was built is thrown away and built anew.
        label: what is built, for texts: `demo::rms_norm [cpp]`.
        build: builds in the workspace it is given and returns the library in it.

    Raises:
        BuildError: `build` raised it, the cache folder cannot be written, or the sources keep changing.
    """
    prefix = slug(label)
    name = f"{prefix}-{key()}"
    for _ in range(_ATTEMPTS):
        if library := find(name):
            return library
        with _lock(name, label):
            if library := find(name):
                return library
            with _workspace(name, label) as work:
                library = build(work)
                now = f"{prefix}-{key()}"
                if now == name:
                    return _publish(work, library, label)
        name = now
    raise BuildError(
        f"building {label}: its sources changed during each of {_ATTEMPTS} builds; "
        "expected them to hold still for one. Build again when nothing writes them."
    )


def _publish(work: Workspace, library: Path, label: str) -> Path:
    """Make the workspace the entry of its name, all of it at once."""
    entry = root() / "lib" / work.name
    with _writing(label):
        content = library.read_bytes()
        manifest = work.folder / _MANIFEST
        sha256 = hashlib.sha256(content).hexdigest()
        manifest.write_text(json.dumps({"library": library.name, "sha256": sha256, "label": label}))
        for file in (library, manifest):  # else a power cut after the rename leaves empty files
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        entry.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            try:
                os.rename(work.folder, entry)
            except OSError:
                if theirs := find(work.name):  # somebody was faster: the same content
                    return theirs
                if not entry.exists():
                    raise
                damaged = root() / "tmp" / f"damaged-{uuid.uuid4().hex}"
                with contextlib.suppress(OSError):
                    os.rename(entry, damaged)
                shutil.rmtree(damaged, ignore_errors=True)
            else:
                return entry / library.name
    raise BuildError(
        f"building {label}: {entry} is damaged and cannot be replaced. Remove it, or set OPKIT_CACHE_DIR "
        "to another folder."
    )


@contextlib.contextmanager
def _writing(label: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(
            f"building {label}: the cache folder {root()} cannot be written ({error.strerror or error}); "
            "expected a folder that this user may write and that has room. Set OPKIT_CACHE_DIR to one."
        ) from error


@contextlib.contextmanager
def _lock(name: str, label: str) -> Iterator[None]:
    """Hold the lock of `name`, which the system releases when its holder dies."""
    folder = root() / "locks"
    with _writing(label):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        try:
            lock.acquire(timeout=_SAY_AFTER)
        except Timeout:
            if sys.stderr:
                print(f"opkit: waiting for another process that builds {label}", file=sys.stderr, flush=True)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=_PATIENCE)
    except (OSError, NotImplementedError):
        pass  # a file system without locks: two processes may build the same, one of them is kept
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _workspace(name: str, label: str) -> Iterator[Workspace]:
    """Give a folder to build in, whose owner is known to live as long as its lock is held."""
    _collect()
    own = root() / "tmp" / f"{name}-{uuid.uuid4().hex[:12]}"
    lock = FileLock(f"{own}.lock")
    with _writing(label):
        own.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, NotImplementedError):  # no locks here: then nobody collects either
            lock.acquire(timeout=0)  # before the folder exists: a folder without a held lock has no owner
        own.mkdir()
    try:
        yield Workspace(own, name)
    finally:
        shutil.rmtree(own, ignore_errors=True)
        lock.release()
        Path(f"{own}.lock").unlink(missing_ok=True)


def _collect() -> None:
    """Remove what killed builds left, and what failed ones left long ago."""
    with contextlib.suppress(OSError):
        for folder in (root() / "tmp").iterdir():
            if folder.suffix == ".lock" or not folder.is_dir():
                continue
            lock = FileLock(f"{folder}.lock")
            with contextlib.suppress(Timeout, OSError, NotImplementedError):
                lock.acquire(timeout=0)
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()
                Path(f"{folder}.lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for folder in (root() / "failed").iterdir():
            if time.time() - folder.stat().st_mtime > _FAILED_FOR:
                shutil.rmtree(folder, ignore_errors=True)
