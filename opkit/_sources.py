"""Who may still have ops and kernels to add when one is needed.

A source is a function without arguments. It is called once, the first time that ops are looked up
by name or a kernel is chosen, and registers what it has; other threads wait until it has. One that
raises is asked again at the next need. Nothing here knows what a plugin is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

_ops: list[Callable[[], None]] = []
_kernels: list[Callable[[], None]] = []
_advisers: list[Callable[[str, str, str | None, bool], str]] = []
_listeners: list[Callable[[], None]] = []
# Sources being called now: by which thread, and the lists that they were taken from.
_running: list[tuple[int, Callable[[], None], list[list[Callable[[], None]]]]] = []
lock = threading.RLock()


def install(source: Callable[[], None], *, ops_only: bool = False) -> None:
    """Call `source` when ops are next looked up, and unless `ops_only` when a kernel is next chosen."""
    with lock:
        _ops.append(source)
        if not ops_only:
            _kernels.append(source)
    for listener in _listeners:
        listener()


def advise(adviser: Callable[[str, str, str | None, bool], str]) -> None:
    """Ask `adviser` who has a kernel for an op, a device and a dtype, where there is none.

    The last argument says whether the op has no kernel at all, as many have none and need none.
    """
    _advisers.append(adviser)


def advice(op: str, device: str, dtype: str | None, *, lone: bool) -> str:
    """Return who has a kernel, as sentences; nothing where nobody has."""
    return next(filter(None, (adviser(op, device, dtype, lone) for adviser in _advisers)), "")


def listen(listener: Callable[[], None]) -> None:
    """Call `listener` whenever a source is installed."""
    _listeners.append(listener)


def consult_for_ops() -> None:
    """Let every source register its ops and kernels."""
    if _ops or _kernels or _running:
        _consult(_ops)


def consult_for_kernels() -> None:
    """Let every source that may have kernels register them."""
    if waiting():
        _consult(_kernels)


def waiting() -> bool:
    """Whether some source has not registered its kernels yet."""
    return bool(_kernels or _running)


def _consult(remaining: list[Callable[[], None]]) -> None:
    with lock:  # re-entrant: a source may look up ops itself, and finds itself gone from the lists
        while remaining:
            source = remaining[0]
            lists = [sources for sources in (_ops, _kernels) if source in sources]
            entry = threading.get_ident(), source, lists
            _running.append(entry)  # before the lists are empty, so that another thread waits for the lock
            for sources in lists:
                sources.remove(source)
            try:
                source()
            except BaseException:
                for sources in lists:
                    sources.insert(0, source)
                raise
            finally:
                _running.remove(entry)


def _in_child() -> None:
    """Do what threads had begun that a fork has left behind."""
    global lock
    lock = threading.RLock()
    for entry in [entry for entry in _running if entry[0] != threading.get_ident()]:
        _running.remove(entry)
        for sources in entry[2]:
            sources.insert(0, entry[1])


os.register_at_fork(after_in_child=_in_child)
