"""What a build says on stderr: one live line on a terminal, plain lines elsewhere, nothing on a hit.

    opkit: building fused [cpp] [2/3] 4.1 s     redrawn, and at the end replaced by
    opkit: built fused [cpp] in 4.2 s

Of the processes of one job only the first speaks. Nothing here raises: a build does not fail
because nobody reads about it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

_QUIET = 1.0  # seconds until a plain line says that something takes long
_REDRAWN = 0.2  # seconds between two pictures of the live line
# torchrun, Slurm, Open MPI, MPICH
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")

_screen = threading.Lock()  # held by the build that has the live line: two would overwrite each other
_writing = threading.RLock()


class Progress:
    """One build as it is shown."""

    def __init__(self, label: str, steps: int, stream: TextIO | None, live: bool) -> None:
        self._label = label
        self._steps = steps
        self._done = 0
        self._stream = stream
        self._live = live
        self._drawn = 0  # characters of the live line that are on the screen
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="opkit-progress", daemon=True)

    def step(self, done: int, of: int | None = None) -> None:
        """Take note that `done` steps are finished, of as many as are known by now."""
        self._done, self._steps = done, of or self._steps

    def say(self, line: str) -> None:
        """Write a line of its own; the live line goes on below it."""
        with _writing, contextlib.suppress(OSError, ValueError):  # a closed stream, a pipe without a reader
            if self._stream is not None:
                erased = f"\r{' ' * self._drawn}\r" if self._drawn else ""
                self._stream.write(f"{erased}{line}\n")
                self._stream.flush()
            self._drawn = 0

    def _begin(self) -> None:
        if self._stream is not None:
            self._thread.start()

    def _end(self, text: str) -> None:
        self._over.set()
        if self._stream is not None:
            self._thread.join()
        self.say(f"opkit: {text} {time.monotonic() - self._started:.1f} s")

    def _show(self) -> None:
        if not self._live:
            if not self._over.wait(_QUIET):
                self.say(f"opkit: building {self._label} ...")
            return
        while not self._over.wait(_REDRAWN):
            self._draw()

    def _draw(self) -> None:
        steps = f" [{self._done}/{self._steps}]" if self._steps > 1 else ""
        line = f"opkit: building {self._label}{steps} {time.monotonic() - self._started:.1f} s"
        line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be redrawn
        with _writing, contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(f"\r{line.ljust(self._drawn)}")  # no escape codes: any terminal does it
                self._stream.flush()
                self._drawn = len(line)


@contextlib.contextmanager
def building(label: str, *, steps: int = 1) -> Iterator[Progress]:
    """Say on stderr that `label` is being built, and how long it took.

    >>> with building("fused [cpp]", steps=3) as progress:
    ...     progress.step(1)
    """
    stream = _stream()
    live = _is_terminal(stream) and _screen.acquire(blocking=False)
    progress = Progress(label, steps, stream, live)
    progress._begin()
    try:
        yield progress
    except BaseException:
        progress._end(f"failed to build {label} after")
        raise
    else:
        progress._end(f"built {label} in")
    finally:
        if live:
            _screen.release()


def say(line: str) -> None:
    """Write a line on stderr, where this process is the one that speaks."""
    with _writing, contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        if (stream := _stream()) is not None:
            print(line, file=stream, flush=True)


def speaks() -> bool:
    """Whether this process is the one of its job that speaks."""
    return _stream() is not None


def _stream() -> TextIO | None:
    """Return stderr in the first rank of a job; it is None under pythonw, too."""
    first = all(os.environ.get(name, "").strip() in ("", "0") for name in _RANKS)
    return sys.stderr if first else None


def _is_terminal(stream: TextIO | None) -> bool:
    if stream is None or os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # closed, or no real file
        return False
