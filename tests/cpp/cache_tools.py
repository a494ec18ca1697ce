"""What the tests of the cache have in common."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from opkit.cpp import cache


class Builder:
    """Builds a library with given content, and counts."""

    def __init__(self, content: bytes = b"library", *, depends=()) -> None:
        self.content = content
        self.depends = depends
        self.count = 0

    def __call__(self, work: cache.Workspace) -> Path:
        self.count += 1
        library = work.folder / "it.so"
        library.write_bytes(self.content)
        work.depend_on(self.depends)
        return library


def obtain(build, key="k", label="f") -> Path:
    return cache.obtain(lambda: key, label=label, build=build)


def python(code: str, cache_dir: Path, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OPKIT_CACHE_DIR": str(cache_dir), "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
        **kwargs,
    )


def forked(function) -> int:
    """Run `function` in a forked process and return its pid; exit code 0 where it returned, else 1."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(120)  # nothing outlives a test that failed
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def exit_code(pid: int, seconds: float = 60) -> int | None:
    """Wait for a forked process and return its exit code; None where it had to be killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def until(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return bool(condition())


def temporaries(cache_dir: Path) -> list[str]:
    return sorted(os.listdir(cache_dir / "tmp"))
