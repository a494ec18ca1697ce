"""A cache that many machines share, at any address that fsspec knows.

    <url>/lib/<name>/<variant>.json    manifests
         /files/<sha256>               the files that they list

Files are named by their content and sent before the manifest that lists them. So a transfer that was
interrupted, or two at once, never make an entry of parts that do not belong together. What comes from
there is looked at before it is published here: sizes, sha256, names. Whoever may write there can run
code here, all the same: a hash tells damage, not intent.

A build fetches and never sends.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from opkit.cpp import _manifest, cache
from opkit.cpp._manifest import Manifest
from opkit.errors import BuildError, warn

T = TypeVar("T")

_LIMIT = 10.0  # seconds that one request may take
_BLOCK = 4 << 20  # bytes of a request for a part of a file

_given_up: set[tuple[int, str]] = set()  # processes and addresses: said once, and not tried again


class RemoteError(BuildError):
    """The shared cache has something else than it says."""


class UnreachableError(RemoteError):
    """The shared cache cannot be asked, or does not answer in time."""


class Remote:
    """A shared cache.

    Raises:
        UnreachableError: fsspec, or what it needs for this address, is not installed; or the cache does
            not answer in time.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            import fsspec
        except ImportError:
            raise UnreachableError(
                f"using the shared cache {url}: fsspec is not installed. "
                "Install it: pip install 'torch-opkit[remote]'."
            ) from None
        self._fs: Any
        self._fs, self._path = self._ask(lambda: fsspec.core.url_to_fs(self.url))

    def names(self) -> list[str]:
        """Return the names of all entries."""
        return sorted(self._list("lib"))

    def variants(self, name: str) -> list[Manifest]:
        """Return the manifests of the entries called `name`."""
        found = []
        for file in sorted(self._list(f"lib/{name}")):
            if file.endswith(".json"):
                text = self._read(f"lib/{name}/{file}", 0, _manifest.LIMIT)
                try:
                    manifest = Manifest.parse(text, name)
                except ValueError as error:
                    raise RemoteError(f"reading {self.url}/lib/{name}/{file}: {error}.") from None
                if not _manifest.is_plain(name):
                    raise RemoteError(f"reading {self.url}/lib: the name {name!r} is no plain file name")
                found.append(manifest)
        return found

    def download(self, manifest: Manifest, folder: Path) -> None:
        """Write the entry's files into `folder`, and verify them on the way.

        Raises:
            RemoteError: they are not what the manifest lists, or cannot be had.
        """
        for record in manifest.files:
            digest, size = hashlib.sha256(), 0
            with (folder / record.path).open("xb") as stream:
                while size < record.size:
                    end = min(size + _BLOCK, record.size)
                    block = self._read(f"files/{record.sha256}", size, end)
                    if not block:
                        break
                    digest.update(block)
                    stream.write(block)
                    size += len(block)
            if digest.hexdigest() != record.sha256:
                raise RemoteError(
                    f"fetching {manifest.name}: {self.url}/files/{record.sha256} is {record.path} with another "
                    f"content; expected the sha256 that it is named after. Remove it there and run opkit cache push."
                )

    def upload(self, manifest: Manifest, folder: Path) -> bool:
        """Send an entry, the manifest last; return whether anything was missing there."""
        target = f"{self._path}/lib/{manifest.name}/{manifest.variant}.json"
        files = [(f"{self._path}/files/{record.sha256}", record) for record in manifest.files]
        missing = [(path, record) for path, record in files if self._size(path) != record.size]
        if not missing and self._size(target) == len(manifest.dumps()):
            return False
        self._ask(lambda: self._fs.makedirs(f"{self._path}/files", exist_ok=True))
        self._ask(lambda: self._fs.makedirs(os.path.dirname(target), exist_ok=True))
        for path, record in missing:
            # A large file takes as long as it takes; the next request is in time again.
            limit = _LIMIT + record.size / (1 << 20)
            self._ask(lambda: self._fs.put_file(str(folder / record.path), path), limit)  # noqa: B023
        self._ask(lambda: self._fs.pipe_file(target, manifest.dumps()))
        return True

    def _list(self, path: str) -> list[str]:
        def ask() -> list[str]:
            self._fs.invalidate_cache()
            return [entry.rstrip("/") for entry in self._fs.ls(f"{self._path}/{path}", detail=False)]

        try:
            return [entry.rpartition("/")[2] for entry in self._ask(ask)]
        except FileNotFoundError:
            return []

    def _read(self, path: str, start: int, end: int) -> bytes:
        try:
            found: bytes = self._ask(lambda: self._fs.cat_file(f"{self._path}/{path}", start=start, end=end))
        except FileNotFoundError:
            raise RemoteError(f"reading {self.url}: {path} is listed and not there.") from None
        return found

    def _size(self, path: str) -> int | None:
        try:
            size: int = self._ask(lambda: self._fs.info(path))["size"]
        except FileNotFoundError:
            return None
        return size

    def _ask(self, request: Callable[[], T], limit: float = 0.0) -> T:
        """Return what `request` returns, in time. File systems have limits of their own, or none."""
        limit = limit or _LIMIT
        result: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                result.append(request())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True, name="opkit-remote")
        thread.start()
        thread.join(limit)
        if result:
            return result[0]
        if not failed:
            raise UnreachableError(
                f"using the shared cache {self.url}: it did not answer within {limit:.0f} s."
            )
        if isinstance(failed[0], FileNotFoundError):
            raise failed[0]
        what = str(failed[0]).strip() or type(failed[0]).__name__
        raise UnreachableError(f"using the shared cache {self.url}: {what}") from failed[0]


def fetch(url: str, name: str, label: str) -> Path | None:
    """Return the library called `name` after publishing it here, or None where it cannot be had.

    What is wrong with the shared cache is a warning, and no reason not to build.
    """
    if (os.getpid(), url) in _given_up:
        return None
    try:
        remote = Remote(url)
        for manifest in remote.variants(name):
            if _manifest.Check().holds(manifest.depends):
                return receive(remote, manifest)
    except UnreachableError as error:
        _given_up.add((os.getpid(), url))
        warn(f"{error} Kernels are built here in this process. Correct OPKIT_CACHE_REMOTE or unset it.")
    except RemoteError as error:
        warn(f"{error} It is not used, and {label} is built here.")
    return None


def receive(remote: Remote, manifest: Manifest) -> Path:
    """Publish an entry of the shared cache here, and return its library.

    Raises:
        RemoteError: it is not what its manifest says, or cannot be had.
        BuildError: the cache folder cannot be written.
    """
    with cache.workspace(manifest.name, manifest.label) as work:
        with cache.writing(f"fetching {manifest.label}"):
            remote.download(manifest, work.folder)
        return cache.publish(work, manifest.library, manifest.label, manifest.depends)
