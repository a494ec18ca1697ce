"""Where compiled libraries live: found by their content, published whole, shared by all processes.

    <OPKIT_CACHE_DIR>/lib/<name>/<variant>/   a published library, its manifest beside it, see _manifest
                     /failed/<name>/          what a failed build left: log, command, generated sources
                     /tmp/                    builds in progress, each in a folder of its own
                     /locks/                  who builds what, see _turn
                     /live/                   what live processes hold, see _live
                     /size                    of all of lib/, about, see tidy
                     /tuned/                  what was measured of ops, see dispatch/measured

A name is a label and a key, which the caller computes from content. What a library depends on beside
that is in its manifest, and libraries that differ only there are variants of one name.

Being right does not depend on locks: a build happens in a private folder and appears by one rename.
This module knows nothing of compilers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from opkit import _config, _logs
from opkit.cpp import _live, _manifest, _roots
from opkit.cpp._manifest import Manifest, Record
from opkit.errors import BuildError

_LOG = _logs.logger("cache")
_BUILDS = _logs.logger("build")
_NO_NAME = re.compile(r"[^A-Za-z0-9_.]+")
_ATTEMPTS = 3
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Workspace:
    """The private folder of one build; it is gone afterwards unless published or kept."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self._started = folder.stat().st_ctime_ns
        self._depends: dict[str, None] = {}

    def depend_on(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Say that what is built depends on the content of `paths`, beside what the key stands for.

        Relative paths are in the folder. What is within the folder itself is left out.
        """
        own = f"{self.folder}/"
        for path in paths:
            text = os.path.join(own, path)
            if text.startswith(own):  # out of the folder again by `..`, and the folder will not be there
                text = os.path.realpath(text)
            if not text.startswith(f"{os.path.realpath(own)}/"):
                self._depends[text] = None

    def keep(self) -> Path:
        """Move the folder to where failed builds are found, and return where that is."""
        target = root() / "failed" / self.name
        for _ in range(_ATTEMPTS):
            shutil.rmtree(target, ignore_errors=True)
            try:
                target.parent.mkdir(mode=0o755, exist_ok=True)
                os.rename(self.folder, target)
            except OSError:  # another process keeps the same failure right now
                continue
            self.folder = target
            break
        return self.folder

    def _records(self, seen: dict[str, int]) -> list[Record] | None:
        """Return what the build depended on, or None where some of it changed while it ran.

        `seen` has the times of change that earlier attempts met: a file that was not touched since is
        good, whatever the clock of its file system says.
        """
        records, good = [], True
        for path in self._depends:
            try:
                changed = os.stat(path).st_ctime_ns
                records.append(Record.of(path, _manifest.portable(path)))
                good &= changed == os.stat(path).st_ctime_ns
            except OSError:
                return None
            good &= changed <= self._started or changed == seen.get(path)
            seen[path] = changed
        return records if good else None


def root() -> Path:
    """Return the cache folder: OPKIT_CACHE_DIR.

    By default `opkit` in the first of TORCH_EXTENSIONS_DIR, XDG_CACHE_HOME and ~/.cache that is set.
    """
    return Path(_roots.own())


def roots() -> list[Path]:
    """Return every folder that is looked in: `root()`, then those of OPKIT_CACHE_PATH.

    Raises:
        BuildError: somebody else may write one of them.
    """
    return [Path(folder) for folder in _roots.readable("opening the cache")]


def slug(text: str) -> str:
    """Return `text` as part of a file name.

    >>> slug("demo::rms_norm [cpp]")
    'demo-rms_norm-cpp'
    """
    return _NO_NAME.sub("-", text).strip("-.")[:80] or "kernel"


def digest(*parts: object) -> str:
    """Return a short hash of `parts`, which are anything that `repr` tells apart.

    >>> digest("a", 1) == digest("a", 1), digest("a", 1) == digest("a1")
    (True, False)
    """
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def find(name: str) -> Path | None:
    """Return the library published as `name`; None where it is absent, damaged or out of date.

    Looks in OPKIT_CACHE_DIR, then in each folder of OPKIT_CACHE_PATH.

    Raises:
        BuildError: somebody else may write one of the folders.
    """
    return _find(name, f"looking for {name}")


def obtain(key: Callable[[], str], *, label: str, build: Callable[[Workspace], Path]) -> Path:
    """Return the library for `key()`, calling `build` only where no process has built it yet.

    Args:
        key: computes the key from the sources as they are now. It is called again after a build:
            where sources changed in the meantime, what was built is thrown away and built anew.
        label: what is built, for texts: `demo::rms_norm [cpp]`.
        build: builds in the workspace it is given and returns the library in it.

    Raises:
        BuildError: `build` raised it, here or in the process that this one waited for; the cache folder
            cannot be written, or others may write it; or the sources keep changing.
    """
    doing, prefix = f"building {label}", slug(label)
    name = f"{prefix}-{key()}"
    if library := _find(name, doing):
        _LOG.info("%s: found in %s", label, library.parent)
        return library
    _LOG.info("%s: in no cache", label)
    _LOG.debug("%s: looked for %s in %s", label, name, ", ".join(map(str, roots())))
    from opkit import _frozen
    from opkit.cpp import _turn, tidy  # a hit needs none of these

    _frozen.refuse_build(label)
    seen: dict[str, int] = {}
    for _ in range(_ATTEMPTS):
        folder = _roots.make(doing)
        with contextlib.ExitStack() as stack:
            with writing(doing):
                try:
                    turn = stack.enter_context(_turn.take(Path(folder, "locks", f"{name}.lock"), label))
                except FileNotFoundError:  # the cache folder went away
                    continue
            if library := _find(name, doing):
                _LOG.info("%s: built meanwhile by another process, in %s", label, library.parent)
                return library
            if turn.failure:
                raise turn.failure
            try:
                library = _fetch(name, label) or _build(name, label, build, key, seen)
            except BuildError as error:
                turn.failed(error)
                raise
        if library:
            if (events := _frozen.events()) is not None:
                events.append(_frozen.Event("built", label, ""))
            with contextlib.suppress(OSError):  # what was built is there all the same
                tidy.evict(folder, _config.get("OPKIT_CACHE_LIMIT"), f"{name}/{library.parent.name}")
            return library
        name = f"{prefix}-{key()}"
    raise BuildError(
        f"building {label}: its sources, or the cache folder {root()}, changed during each of {_ATTEMPTS} builds; "
        "expected them to hold still for one. Build again when nothing writes them."
    )


@contextlib.contextmanager
def workspace(name: str, label: str) -> Iterator[Workspace]:
    """Give a folder to build in; it is collected after this process is gone."""
    from opkit.cpp import tidy

    doing = f"building {label}"
    folder = _roots.make(doing)
    tidy.collect(folder)
    with writing(doing):
        own = Path(folder, "tmp", tidy.folder_name(name, _live.own_id(folder)))
        own.mkdir(mode=0o755)
        work = Workspace(own, name)
    try:
        yield work
    finally:
        shutil.rmtree(own, ignore_errors=True)


def publish(work: Workspace, library: str, label: str, depends: list[Record]) -> Path:
    """Make the workspace an entry of its name, all of it at once, and return the library in it."""
    doing, folder = f"building {label}", _roots.own()
    with writing(doing):
        with os.scandir(work.folder) as found:
            names = sorted(file.name for file in found if file.is_file(follow_symlinks=False))
        files = [_settled(work.folder / name, name == library) for name in names]
        manifest = Manifest(work.name, label, library, files, depends)
        _manifest.write(str(work.folder), manifest)
        entry = Path(folder, "lib", work.name, manifest.variant)
        _live.hold(folder, f"{work.name}/{manifest.variant}")
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):  # the folder around it was empty and is removed
                entry.parent.mkdir(mode=0o755, exist_ok=True)
                try:
                    os.rename(work.folder, entry)
                    return entry / library
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                        raise
                theirs = _manifest.read(str(entry), work.name)
                if theirs and _manifest.Check().holds(theirs.files, str(entry)):  # somebody was faster
                    return entry / theirs.library
                from opkit.cpp import tidy

                tidy.discard(folder, str(entry))
    raise BuildError(
        f"building {label}: {entry} is damaged and cannot be replaced. Remove it, or set OPKIT_CACHE_DIR "
        "to another folder."
    )


def _find(name: str, doing: str) -> Path | None:
    check = _manifest.Check()
    for is_other, folder in enumerate(_roots.readable(doing)):
        try:
            variants = os.listdir(f"{folder}/lib/{name}")
        except OSError:
            continue
        for variant in variants:
            entry = f"{folder}/lib/{name}/{variant}"
            manifest = _manifest.read(entry, name)
            check.found_other_times = False
            if manifest is None or not (check.holds(manifest.files, entry) and check.holds(manifest.depends)):
                continue
            if not is_other and not _take(folder, entry, manifest, check.found_other_times):
                continue
            return Path(entry, manifest.library)
    return None


def _take(folder: str, entry: str, manifest: Manifest, found_other_times: bool) -> bool:
    """Say that this process has the entry and when; return whether it is still there."""
    file = f"{entry}/{_manifest.NAME}"
    if _live.hold(folder, f"{manifest.name}/{os.path.basename(entry)}"):
        try:
            os.utime(file)
        except FileNotFoundError:
            return False
        except OSError:  # a cache that this process may only read
            return os.path.exists(file)
    if found_other_times:
        _manifest.refresh(entry, manifest, f"{folder}/tmp")
    return True


def _build(
    name: str,
    label: str,
    build: Callable[[Workspace], Path],
    key: Callable[[], str],
    seen: dict[str, int],
) -> Path | None:
    """Build and publish; None where sources changed meanwhile, or the folder went away."""
    with workspace(name, label) as work:
        _BUILDS.info("%s: building in %s", label, work.folder)
        begun = time.monotonic()
        try:
            library = build(work)
            _BUILDS.info("%s: built in %.2f s", label, time.monotonic() - begun)
            if f"{slug(label)}-{key()}" != name:
                return None
            depends = work._records(seen)
            return None if depends is None else publish(work, library.name, label, depends)
        except Exception as error:
            _BUILDS.error("%s: failed: %s", label, str(error).partition("\n")[0])
            if not work.folder.is_dir():
                return None
            if isinstance(error, OSError) and error.errno in _NO_ROOM:
                raise _roots.unwritable(f"building {label}", error) from error
            raise


def _fetch(name: str, label: str) -> Path | None:
    if not (url := _config.get("OPKIT_CACHE_REMOTE")):
        return None
    from opkit.cpp import remote

    found = remote.fetch(url, name, label)
    _LOG.info("%s: %s %s", label, "fetched from" if found else "not in", url)
    return found


def _settled(path: Path, is_library: bool) -> Record:
    """Return the record of a file that is complete: of an earlier time, so that any write to it shows."""
    path.chmod(path.stat().st_mode & ~0o022)
    now = int(time.time()) - 10
    os.utime(path, (now, now))
    if is_library:  # else a power cut after the rename leaves an empty file
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    return Record.of(str(path), path.name)


@contextlib.contextmanager
def writing(doing: str) -> Iterator[None]:
    """Turn a failure to write the cache folder into an error that names it."""
    try:
        yield
    except OSError as error:
        raise _roots.unwritable(doing, error) from error
