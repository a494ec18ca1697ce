"""Who a process is, so that another one can tell whether it still lives.

A pid alone does not say: pids are used again, and mean nothing on another host or in another container.
Nothing here compares clocks of two machines, nor times across a clock that was set.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Owner:
    """A process, as it describes itself to others."""

    pid: int
    host: str
    where: str  # the kernel's run and the pid namespace that `pid` counts in
    born: str  # tells the process from a later one with its pid
    since: float  # on the monotonic clock, which all processes of one kernel share

    @classmethod
    def me(cls) -> Owner:
        pid = os.getpid()
        return cls(pid, os.uname().nodename, _where(), _state(pid)[1], time.monotonic())

    @classmethod
    def parse(cls, text: str | bytes) -> Owner | None:
        """Return the owner that `dumps` wrote, or None where `text` is something else."""
        try:
            data: dict[str, Any] = json.loads(text)
            return cls(**data)
        except (ValueError, TypeError):
            return None

    def dumps(self) -> str:
        return json.dumps(vars(self))

    def is_gone(self) -> bool:
        """Whether it is known to be dead, or stopped; of another host nothing is known."""
        if self.where != _where():
            return False
        state, born = _state(self.pid)
        return state in ("", "T", "X", "Z") or born != self.born

    def __str__(self) -> str:
        since = f" since {time.monotonic() - self.since:.0f} s" if self.where == _where() else ""
        return f"pid {self.pid} on {self.host} builds{since}"


@functools.cache
def _where() -> str:
    run = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as stream:
        run = stream.read().strip()
    with contextlib.suppress(OSError):
        run += os.readlink("/proc/self/ns/pid")
    return run or os.uname().nodename


def _state(pid: int) -> tuple[str, str]:
    """Return the letter of a process's state and its start in ticks since boot; empty where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            fields = stream.read().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    except (OSError, IndexError):
        return "?", ""
