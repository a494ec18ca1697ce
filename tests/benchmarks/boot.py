"""What opkit adds to `import torch`, with 16 plugins among 300 distributions, one of which has a device.

Taken inside of a process that has just imported torch, without what it calls at its end: that is called then, and timed
with the import of its module. A median of many. A *miss* is the first start after an install.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import _measure
import discovery

COUNT, TURNS = 300, 11
CHILD = """
import sys
import torch, time
sys.path[:0] = {paths!r}
import importlib.metadata, importlib.util
importlib.util.find_spec("nothing")  # has the folders listed, as importing torch from one of them has
begun = time.perf_counter()
import opkit_boot
opkit_boot.boot()
ended = time.perf_counter()
assert opkit_boot.problem is None, opkit_boot.problem
assert hasattr(torch, "card") is {expected}
print((ended - begun) * 1e3)
"""
DEVICE = """
[device]
name = "card"
stub = "json"
loader = "json:loads"
probe = {{ variable = "CARD" }}
"""
CASES = {
    "no plugin has a device": (False, {}),
    "a device, and no card for it": (True, {}),
    "plugins are turned off": (True, {"OPKIT_AUTOLOAD": "0"}),
    "a device whose probe says yes": (True, {"CARD": "1"}),
    "a device that is chosen": (True, {"OPKIT_DEVICE": "card"}),
}


def start(paths: list[str], cache: Path, environment: dict[str, str]) -> float:
    """Return the milliseconds of one start."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OPKIT_")}
    own = {"OPKIT_CACHE_DIR": str(cache), "XDG_CONFIG_HOME": str(cache), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    is_set_up = bool(environment) and "OPKIT_AUTOLOAD" not in environment
    code = CHILD.format(paths=paths, expected=is_set_up)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**clean, **own, **environment}, capture_output=True, text=True, check=True, cwd=cache
    )
    return float(done.stdout)


def measure(place: Path) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of each case."""
    library, cache = place / "library", place / "cache"
    discovery.borrow(library)
    cache.mkdir()
    for with_device in (False, True):
        site = place / str(with_device)
        discovery.install(site, COUNT)
        if with_device:
            manifest = site / f"dist_{COUNT - 1}" / discovery.FILE
            manifest.write_text(manifest.read_text() + DEVICE.format())
    found: dict[str, dict[str, float]] = {}
    for name, (with_device, environment) in CASES.items():
        paths, misses, hits = [str(place / str(with_device)), str(library)], [], []
        for turn in range(TURNS):
            if turn % 4 == 0:
                shutil.rmtree(cache / "plugins", ignore_errors=True)
                misses.append(start(paths, cache, environment))
            hits.append(start(paths, cache, environment))
        found[name] = {"miss": statistics.median(misses), "hit": statistics.median(hits)}
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        found = measure(Path(place))
    rows = [[name, *(f"{times[what]:.2f}" for what in ("miss", "hit"))] for name, times in found.items()]
    title = f"what opkit adds to `import torch`, {discovery.PLUGINS} plugins among {COUNT} distributions, ms"
    _measure.table(title, ["", "miss", "hit"], rows)
    _measure.save("boot", {"milliseconds": found})


if __name__ == "__main__":
    main()
