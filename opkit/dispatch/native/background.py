"""The core, built beside a process that goes on: one builder a machine, and a thread here that waits for it.

The builder is a process of its own, so that a program that ends sooner leaves it its work: it ends by itself, and
whoever comes next finds the library, whole or not at all. The lock that says that there is one is the builder's, and
dies with it; waiting processes look for the library, for how building it failed, or for their turn.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from opkit import _config
from opkit.dispatch.native import library
from opkit.errors import BuildError

_LOOK = 0.2  # seconds between two looks
_NICE = 5  # the builder leaves the cores to the program
_NOT_BUILT = "opkit: the native core was not built, and Python runs the ops"
_BUILDER = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from opkit.dispatch.native.background import main; main()"
)


class Watch:
    """A thread that has the core built, or waits for another process that builds it.

    Args:
        ready: called with this and the library, when it is there.
        over: called with this and the reason, when there will be none.
    """

    def __init__(self, ready: Callable[[Watch, Path], None], over: Callable[[Watch, str], None]) -> None:
        self._ready = ready
        self._over = over
        # The process may end while it waits.
        self._thread = threading.Thread(target=self._run, name="opkit-native", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            found = _wait()
        except BuildError as error:  # the cache cannot be used
            found = str(error)
        if isinstance(found, Path):
            self._ready(self, found)
        else:
            self._over(self, found)


def _wait() -> Path | str:
    """Return the library, or why there is none.

    Raises:
        BuildError: the cache folder cannot be written, or others may write it.
    """
    from opkit.cpp import _progress, _roots

    if reason := _why_no_builder():
        return f"it is not built yet, and {reason}"
    lock = Path(_roots.make(f"building {library.LABEL}"), "locks", f"{library.name()}.background.lock")
    said = ""
    while True:
        if found := library.cached():
            return found
        if failure := library.find_failure():
            if _progress.speaks() and failure.first_told():
                log = f" The log is {failure.log}." if failure.log else ""
                _progress.say(
                    f"{_NOT_BUILT}: {_first_line(failure.message)}{log} It is tried again for another torch or "
                    "compiler, or by `opkit build --native`."
                )
            return failure.message
        if said:
            _progress.say(f"{_NOT_BUILT}: {_first_line(said)}")
            return said
        with _turn(lock) as fd:
            if fd is None:
                time.sleep(_LOOK)
            elif not (library.cached() or library.find_failure()):  # since the last look
                _progress.say(
                    f"opkit: building the native core for torch {_torch_version()} in the background, once; until "
                    "it is there Python runs the ops (OPKIT_NATIVE=0 leaves it at that)"
                )
                said = _build(fd)


def _why_no_builder() -> str | None:
    """Return why nothing can be built on this machine, or None."""
    from opkit.cpp import compilers

    if not sys.executable or getattr(sys, "frozen", False):
        return "this program has no Python that would build it"
    if _config.get("OPKIT_CACHE_REMOTE"):  # where it may be found, too
        return None
    if not compilers.find_cxx():
        return compilers.why_no_cxx()
    if not compilers.find_ninja():
        return "ninja was not found (pip install ninja)"
    if importlib.util.find_spec("setuptools") is None:
        return "setuptools, which torch's build files take, was not found (pip install setuptools)"
    return None


def _build(lock: int) -> str:
    """Run the builder to its end, and return what to say where it leaves neither a library nor a failure."""
    from opkit.cpp import cache

    environment = {
        **os.environ,
        "OPKIT_NATIVE": "0",  # the builder calls no op, and must never start another one
        "OPKIT_FROZEN": "0",
        "OPKIT_CACHE_DIR": str(cache.root()),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    paths = json.dumps([os.path.abspath(path) for path in sys.path])
    try:
        builder = subprocess.Popen(
            [sys.executable, "-c", _BUILDER, paths],
            # Not this process's own: it may end before, and whoever reads its output waits for all who hold it.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            cwd="/",
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,  # the terminal's Ctrl-C is not meant for it
        )
    except OSError as error:
        return f"it is not built yet, and {sys.executable} does not start ({error.strerror or error})"
    said = builder.communicate()[0].strip()
    return said or f"building it ended with exit code {builder.returncode}; `opkit build --native` shows more"


def main() -> None:
    """Build the core; this is what the builder runs."""
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    try:
        library.build()
    except Exception as error:
        # Only what the compiler said would be the same another time.
        if isinstance(error, BuildError) and error.log_path:
            library.remember_failure(error)
        else:
            with contextlib.suppress(OSError):  # nobody waits any more
                print(error, flush=True)
        raise SystemExit(1) from None


class _turn:  # noqa: N801
    """The turn to build, or None where another process has it; a builder that is given the file keeps it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> int | None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # some file systems say EACCES of a lock that is held
            return None
        except OSError:  # no locks here: some may build it twice
            pass
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _torch_version() -> str:
    import torch

    return torch.__version__
