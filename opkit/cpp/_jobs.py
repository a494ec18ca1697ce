"""How many compilers may run at once: as many as there are cores and memory for.

A container's limits (control groups, version 2) count; the machine's own figures do not show them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from opkit.errors import ConfigError

CXX_MEMORY = 2 << 30  # bytes of a C++ compiler that reads torch's headers
NVCC_MEMORY = 4 << 30

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")


def limit(memory_each: int) -> int:
    """Return how many compilers that need `memory_each` bytes may run at once; MAX_JOBS wins.

    >>> limit(2 << 30) >= 1
    True

    Raises:
        ConfigError: MAX_JOBS is no number from 1.
    """
    text = os.environ.get("MAX_JOBS", "").strip()
    if text:
        if not re.fullmatch(r"0*[1-9][0-9]*", text):
            raise ConfigError(
                f"reading MAX_JOBS: found {text!r}; expected how many compilers may run at once, from 1. "
                "Write for instance MAX_JOBS=2."
            )
        return int(text)
    return max(1, min(_cores(), _free_memory() // memory_each))


def _cores() -> int:
    cores = len(os.sched_getaffinity(0))
    for folder in _cgroups():
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _free_memory() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(_MEMINFO), re.MULTILINE)
    free = int(found[1]) << 10 if found else 1 << 62
    for folder in _cgroups():
        most, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if most.isdigit() and used.isdigit():
            # What is cached of files is given up when a compiler asks for it.
            cached = re.search(r"^inactive_file (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
            free = min(free, int(most) - int(used) + (int(cached[1]) if cached else 0))
    return free


def _cgroups() -> Iterator[Path]:
    """Yield the folders whose limits hold for this process: its own control group's and those above."""
    own = re.search(r"^0::/(.*)$", _read(_OWN_CGROUP), re.MULTILINE)
    if own:
        folder = _CGROUPS / own[1]
        yield folder
        for parent in folder.parents:
            if parent == _CGROUPS.parent:
                break
            yield parent


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
