"""Which plugins are left out because a process died of them, or seems to have.

While a plugin is called there is a file that says so, locked by the process, see `marked`. Python writes
the signal and the stack into it if the process crashes, unless somebody has turned faulthandler on for
another file. Whoever next asks finds the file of a process that is gone:

- With a crash in it, the plugin is quarantined.
- Without, the process was ended from outside, or ended itself: that is counted once for all that ended
  so at one time, as all ranks of a job do. The second time in a row the plugin is quarantined. So is one that was
  interrupted for hanging twice in a row. A call that comes back by itself starts the count anew.

It holds for one version of the plugin, and until `lift`. Nothing here decides what is marked.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from opkit.plugins import records

_STRIKES = 2
_faults: list[int] = []  # files that crashes go to, that of the innermost call last


class Quarantine(NamedTuple):
    """Why a plugin is left out: `evidence` is what the crashed process or the trial left, as text."""

    name: str
    version: str
    reason: str
    evidence: str
    since: float


def remedy(name: str) -> str:
    """Return what to do about a plugin that is left out, with the command that lifts it."""
    return f"Upgrade it, or try it once more: opkit plugins enable {name}."


class _Event(NamedTuple):
    reason: str
    evidence: str
    strikes: int


def find_all(plugins: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Quarantine]:
    """Return which of these plugins, given as names and versions, are left out, and why.

    Looks at what dead processes have left. Where nobody has left anything it costs two looks into folders.
    """
    if not (_listed("calls") or _listed("quarantine")):
        return {}
    return {plugin: found for plugin in plugins if (found := find(*plugin))}


def find(name: str, version: str) -> Quarantine | None:
    """Return why this version of a plugin is left out, or None."""
    file = _file(name, version)
    if _gone(name, version):
        with records.turn(file):
            for event in _collect(name, version):
                _add(name, version, event)
    content = records.read(file)
    if content.get("strikes", 0) < _STRIKES:
        return None
    reason, evidence = content.get("reason", "it broke a process"), content.get("evidence", "")
    return Quarantine(name, version, reason, evidence, content.get("since", 0.0))


def put(name: str, version: str, reason: str, evidence: str = "") -> None:
    """Leave the plugin out from the next start on."""
    with records.turn(_file(name, version)):
        _add(name, version, _Event(reason, evidence, _STRIKES))


def suspect(name: str, version: str, reason: str, evidence: str = "") -> None:
    """Leave the plugin out if this happens once more before it works."""
    with records.turn(_file(name, version)):
        _add(name, version, _Event(reason, evidence, 1))


def clear(name: str, version: str) -> None:
    """Start the count anew: the plugin hurts nobody."""
    file = _file(name, version)
    if os.path.exists(file):
        with records.turn(file), contextlib.suppress(OSError):
            if records.read(file).get("strikes", 0) < _STRIKES:
                os.unlink(file)


def lift(name: str) -> bool:
    """Forget everything about a plugin, in all its versions; return whether there was something."""
    start, found = f"{records.key(name)}.", False
    for kind in ("calls", "quarantine"):
        for entry in _listed(kind):
            if entry.startswith(start):
                with contextlib.suppress(OSError):
                    os.unlink(records.path(kind, entry))
                    found = True
    return found


@contextlib.contextmanager
def marked(name: str, version: str, doing: str) -> Iterator[None]:
    """Have it known, should this process not survive what is done now, that it was the plugin's doing."""
    import json

    pid, fd, file = os.getpid(), -1, ""
    with contextlib.suppress(OSError):  # nothing can be remembered
        file = records.path("calls", f"{_stem(name, version)}.{os.urandom(6).hex()}")
        records.make(os.path.dirname(file))
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        with contextlib.suppress(OSError):  # no locks here: then it counts if a crash is written in it
            _lock(fd)
        os.write(fd, json.dumps({"doing": doing, "pid": pid, "time": time.time()}).encode() + b"\n")
    try:
        with _faults_into(fd):
            yield
    finally:
        if fd >= 0 and pid == os.getpid():  # a forked child leaves it to the parent
            with contextlib.suppress(OSError):
                os.unlink(file)
            os.close(fd)


def _lock(fd: int) -> None:
    """Lock a new file, which another process may have locked for a moment, to see whether somebody else has."""
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.001)


@contextlib.contextmanager
def _faults_into(fd: int) -> Iterator[None]:
    """Let Python write crashes into the file, unless somebody else has told it where to."""
    if fd < 0 or (faulthandler.is_enabled() and not _faults):
        yield
        return
    _faults.append(fd)
    faulthandler.enable(fd, all_threads=False)
    try:
        yield
    finally:
        _faults.remove(fd)
        if _faults:
            faulthandler.enable(_faults[-1], all_threads=False)
        else:
            faulthandler.disable()


def _add(name: str, version: str, event: _Event) -> None:
    """Count what happened; the caller has its turn with the file."""
    file = _file(name, version)
    before = records.read(file).get("strikes", 0)
    if before < _STRIKES:
        records.write(
            file,
            {
                "reason": event.reason,
                "evidence": event.evidence,
                "strikes": before + event.strikes,
                "since": time.time(),
            },
        )


def _collect(name: str, version: str) -> list[_Event]:
    """Take away the files of processes that are gone, and return what they tell: crashes, else one end."""
    crashes, ends = [], []
    for file in _gone(name, version):
        with contextlib.suppress(OSError):
            content, crash = _read(file)
            os.unlink(file)
            doing = content.get("doing", "calling it")
            if crash:
                what = crash.partition("\n")[0].removeprefix("Fatal Python error: ")
                crashes.append(_Event(f"{doing} crashed the process ({what})", crash, _STRIKES))
            else:
                ends.append(
                    _Event(f"{doing} ended the process, {_STRIKES} times in a row, without a crash", "", 1)
                )
    return crashes or ends[:1]


def _gone(name: str, version: str) -> list[str]:
    """Return the files of calls whose process is no more."""
    start = f"{_stem(name, version)}."
    files = [records.path("calls", entry) for entry in _listed("calls") if entry.startswith(start)]
    return [file for file in files if _is_gone(file)]


def _listed(kind: str) -> list[str]:
    try:
        return os.listdir(records.path(kind))
    except OSError:
        return []


def _is_gone(file: str) -> bool:
    try:
        fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # the call was over just now
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(fd).st_nlink > 0 and os.fstat(fd).st_size > 0  # empty: it begins just now
    except OSError:  # its process lives, or a child that it forked does, or there are no locks
        return bool(_read(file)[1])
    finally:
        os.close(fd)


def _read(file: str) -> tuple[dict[str, Any], str]:
    """Return what was being done, and the crash."""
    import json

    with open(file, encoding="utf-8", errors="replace") as stream:
        first, _, crash = stream.read().partition("\n")
    try:
        content = json.loads(first)
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}, crash.strip()


def _stem(name: str, version: str) -> str:
    return f"{records.key(name)}.{records.key(version)}"


def _file(name: str, version: str) -> str:
    return records.path("quarantine", f"{_stem(name, version)}.json")
