"""What empties the caches between two calls, so that the second one finds its arguments in memory.

On the CPU a buffer larger than the last cache is read, by all threads; on CUDA one larger than L2 is written.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")  # where Linux says what it has
_MEMORY = Path("/proc/meminfo")
_UNKNOWN = 32 * 2**20  # bytes, where nothing says how large the last cache is
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class Flush:
    """Call it to empty the caches of a device: `cache` bytes, by going through `size`, fewer where memory is short."""

    def __init__(self, device: str) -> None:
        self._writes = device != "cpu"
        self.cache = last_cache(device)
        self.size = _room(self.cache, device)
        self._buffer = torch.ones(self.size // 8, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        if self._writes:
            self._buffer.zero_()
        else:
            self._buffer.sum()  # what is only read need not be written back while the next call is timed


def can_flush(device: str) -> bool:
    """Whether opkit knows how to empty the caches of a device type."""
    return device in ("cpu", "cuda")


def last_cache(device: str) -> int:
    """Return the bytes of the last cache before the memory."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size) or _UNKNOWN
    sizes = [_UNKNOWN]
    for path in _FOLDER.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) * _UNITS.get(text[-1:], 1))
    return max(sizes)


def _room(cache: int, device: str) -> int:
    """Return the bytes to walk: a quarter more than the cache, and no more than a quarter of the free memory."""
    free = torch.cuda.mem_get_info(device)[0] if device != "cpu" else _free()
    return min(cache * 5 // 4, free // 4) // 8 * 8


def _free() -> int:
    """Return the bytes that a program may still have."""
    with contextlib.suppress(OSError):
        for line in _MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 2**10
    return 4 * 2**30  # macOS
