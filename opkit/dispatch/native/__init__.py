"""Which twin runs ops in this process: the core in C++, or Python.

The core (`core/*.cpp`) is a CPython extension for one torch and one Python. It is loaded where a library of it is at
hand: one that the wheel carries, or one in the cache. Else, when an op is first called, one process of the machine
builds it in the background, and this one goes over to it when it is there. OPKIT_NATIVE=0 stays with Python,
OPKIT_NATIVE=1 waits for the core, or raises. Importing this looks for nothing.

What the core does and where it is asked is the business of its callers.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from opkit import _config, _frozen, _logs
from opkit import _sources as sources
from opkit.errors import BuildError

if TYPE_CHECKING:
    from opkit.dispatch.native.background import Watch

_LOG = _logs.logger("native")
_core: ModuleType | None = None
_looked = False  # for a library that is at hand
_settled = False  # nothing is left to be decided in `need`
_off = False  # there will be no core in this process
_reason: str | None = None  # why there is none
_error: BuildError | None = None  # what OPKIT_NATIVE=1 ran into
_watch: Watch | None = None
_waiting: list[Callable[[], object]] = []
_lock = threading.RLock()


def core() -> ModuleType | None:
    """Return the core, or None where Python runs the ops: for good, or until it is built.

    The first call looks for a library that is at hand; it builds none.

    Raises:
        ConfigError: OPKIT_NATIVE or the cache's variables have values that opkit does not know.
    """
    if not _looked:
        _look()
    return _core


def need() -> None:
    """Say that an op is called: from now on the core is worth building, where it is not at hand.

    Call it without holding a lock that a callback of `when_ready` takes.

    Raises:
        BuildError: OPKIT_NATIVE=1 asks for the core, and there is none.
        FrozenError: the same, and building it is what a frozen process may not do.
        ConfigError: see `core`.
    """
    if not _settled:
        _decide()


def when_ready(callback: Callable[[], object]) -> None:
    """Call `callback` once, as soon as the core is loaded: now, later on the thread that loads it, or never.

    It is called under a lock, so that no two callbacks run at a time.
    """
    with _lock:
        if core() is not None:
            callback()
        elif not _off:
            _waiting.append(callback)


def is_off() -> bool:
    """Whether there will be no core in this process."""
    return _off


def choose_anew() -> None:
    """Have the core ask again which kernels take calls."""
    if _core is not None:
        _core.choose_anew()


def expect_preferences() -> None:
    """Have the core look for what a thread prefers."""
    if _core is not None:
        _core.expect_preferences()


def why_not() -> str | None:
    """Return why Python runs the ops, in one sentence; None where the core does.

    >>> reason = why_not()
    >>> (reason is None) == (core() is not None)
    True
    """
    return None if core() is not None else _reason


def build() -> Path:
    """Build the core for this torch and this Python where none is at hand, and return its library.

    >>> build().name  # doctest: +SKIP
    'opkit_core.so'

    Raises:
        BuildError: it cannot be built here.
    """
    from opkit.dispatch.native import library

    module = core()
    return library.build() if module is None else Path(module.__file__ or "")


# ---------------------------------------------------------------- deciding


def _look() -> None:
    """Load the library that is at hand."""
    global _looked, _reason
    with _lock:
        if _looked:
            return
        from opkit.dispatch.native import library

        mode = _config.get("OPKIT_NATIVE")
        if mode == "0":
            _turn_off("OPKIT_NATIVE is 0")
        elif reason := library.unsupported():
            _turn_off(reason)
        else:
            _reason = "no op was called so far that it would be built for"
            for find in (library.carried, library.cached):
                try:
                    if path := find():
                        _load(path)
                        break
                except BuildError as error:
                    _reason = str(error)
        _looked = True


def _decide() -> None:
    global _settled, _reason
    with _lock:
        core()
        if _settled:
            return
        must = _config.get("OPKIT_NATIVE") == "1"
        if _core is not None or (_off and not must):
            _settled = True
            return
        if must:
            _must()
            return
        if held := _frozen.hold():  # later, where this is taken back
            _reason = f"{held.why}, and nothing is built then; build it before with `opkit build --native`"
            return
        _start()
        _settled = True


def _must() -> None:
    """Load the core now; raise the same each time where that is impossible, without building again."""
    global _error
    from opkit.dispatch.native import library

    if _off:
        raise BuildError(
            f"loading opkit's native core, which OPKIT_NATIVE=1 asks for: {_reason}; expected a process that can have "
            "it. Unset OPKIT_NATIVE, and Python runs the ops."
        )
    if _error is not None:
        raise _error.with_traceback(None)
    try:
        _load(library.build())
    except BuildError as error:
        _error = error
        raise


def _start() -> None:
    """Have the core built by a process of its own, and a thread of this one wait for it."""
    global _watch, _reason
    from opkit.dispatch.native import background

    _reason = "it is being built in the background"
    _LOG.info("Python runs the ops until the core is built, in the background")
    _watch = background.Watch(ready=_arrived, over=_failed)
    _watch.start()


def _arrived(watch: Watch, path: Path) -> None:
    """Go over to the core; called on the thread that waited."""
    with _lock:
        if watch is not _watch or _core is not None:  # the process ends, or was forked
            return
        try:
            _load(path)
        except BuildError as error:
            _turn_off(str(error))


def _failed(watch: Watch, reason: str) -> None:
    with _lock:
        if watch is _watch and _core is None:
            _turn_off(reason)


def _load(path: Path) -> None:
    """Load the library and tell those who wait for it.

    Raises:
        BuildError: it does not load, or was built with the headers of another torch.
    """
    global _core, _looked, _settled, _reason
    from opkit.dispatch.native import library

    module = library.load(path)
    _core, _looked, _settled, _reason = module, True, True, None
    _LOG.info("the core runs ops from now on: %s", path)
    sources.listen(choose_anew)
    while _waiting:
        _waiting.pop(0)()


def _turn_off(reason: str) -> None:
    global _off, _reason
    _off, _reason = True, reason
    _LOG.info("Python runs the ops: %s", reason)
    _waiting.clear()


def _begin_anew() -> None:
    """In a forked child: the thread that waited, and whoever held the lock, are in the parent."""
    global _lock, _looked, _settled, _watch
    _lock = threading.RLock()
    _watch = None
    if _core is None and not _off:
        _looked = _settled = False


@atexit.register
def _close() -> None:
    """Load nothing more: a thread that is stopped inside a library that it loads ends the process badly."""
    global _watch
    with _lock:
        _watch = None


os.register_at_fork(after_in_child=_begin_anew)
