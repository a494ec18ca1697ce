"""The one line on stderr that a build shows. A hit shows nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def building(label: str) -> Iterator[None]:
    """Say on stderr that `label` is being built, and how long it took."""
    stream = sys.stderr  # None under pythonw
    terminal = stream is not None and stream.isatty()
    started = time.monotonic()
    if stream is not None:
        print(f"opkit: building {label} ...", end=" " if terminal else "\n", file=stream, flush=True)
    done = False
    try:
        yield
        done = True
    finally:
        seconds = f"{time.monotonic() - started:.1f} s"
        if terminal:
            print(seconds if done else f"failed after {seconds}", file=stream, flush=True)
        elif stream is not None:
            text = f"built {label} in {seconds}" if done else f"failed to build {label} after {seconds}"
            print(f"opkit: {text}", file=stream, flush=True)
