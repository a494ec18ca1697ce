"""The file in which processes of one environment keep what they found out of plugins.

It has what the folders of `sys.path` hold, for the catalog, and answers to questions that take long. Whoever changes
something reads what others have written meanwhile, and writes the whole anew: whoever reads sees one or the other.
What is lost when two write at once is found out again.

The file is not trusted: it must belong to this user and have its checksum, and is left out where it cannot be read.
One that cannot be written only costs time.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import opkit_boot

_FORMAT = 4  # of this file, and of what the catalog and others keep in it
_FOLDERS = 64  # that are kept, of all those ever seen
_ANSWERS = 512


class _Content(NamedTuple):
    folders: dict[str, tuple[int, bytes]]
    answers: dict[Any, Any]


_content: _Content | None = None
_changed = _Content({}, {})  # since the file was last written
_depth = 0


def folder(name: str) -> tuple[int, bytes] | None:
    """Return the time of a folder and what it held then, or None where nobody has looked."""
    return _load().folders.get(name)


def put_folder(name: str, changed_at: int, held: bytes) -> None:
    """Keep what a folder holds."""
    with writing():
        for content in (_load(), _changed):
            content.folders[name] = changed_at, held


def answer(key: Any, find: Callable[[], Any]) -> Any:
    """Return what is kept under `key`, or else what `find` gives, and keep that."""
    answers = _load().answers
    if key not in answers:
        keep(key, find())
    return answers[key]


def kept(key: Any) -> Any:
    """Return what is kept under `key`, or None."""
    return _load().answers.get(key)


def keep(key: Any, value: Any) -> None:
    """Keep an answer; key and value are builtins."""
    with writing():
        for content in (_load(), _changed):
            content.answers[key] = value


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Write what changes inside when it ends, and only once."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0 and any(_changed):
            _flush()


def refresh() -> None:
    """Remove the file, and forget what was read of it."""
    forget()
    with contextlib.suppress(OSError):
        os.unlink(_path())


def forget() -> None:
    """Forget what this process has read; the file stays."""
    global _content
    _content = None


def _path() -> str:
    return opkit_boot.path("catalog")


def _load() -> _Content:
    global _content
    if _content is None:
        _content = _read() or _Content({}, {})
    return _content


def _read() -> _Content | None:
    try:
        data = memoryview(opkit_boot.read(_path()) or b"")
        if zlib.crc32(data[4:]) != int.from_bytes(data[:4], "little"):
            return None
        form, version, folders, answers = marshal.loads(data[4:])
        return _Content(folders, answers) if (form, version) == (_FORMAT, sys.version) else None
    except (OSError, EOFError, ValueError, TypeError):
        return None


def _flush() -> None:
    global _content
    content = _read() or _Content({}, {})
    for all_of_it, new in zip(content, _changed, strict=True):
        for key in new:
            all_of_it.pop(key, None)  # the last that were written stay longest
        all_of_it.update(new)
        new.clear()
    _content = content
    _save(content)


def _save(content: _Content) -> None:
    folders = dict(list(content.folders.items())[-_FOLDERS:])
    answers = dict(list(content.answers.items())[-_ANSWERS:])
    data = marshal.dumps((_FORMAT, sys.version, folders, answers))
    target = _path()
    unfinished = f"{target}.{os.getpid()}.{os.urandom(4).hex()}"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(zlib.crc32(data).to_bytes(4, "little") + data)
        os.replace(unfinished, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
