"""What it costs to keep the process whole while a plugin is called: each part, and one call with all of them.

A call is what an import of a plugin, its function, and each factory of its manifest are run in, once each. torch is
imported. A timer of the standard library stands beside the watchdog, as what one would use without it. The *trial* of
a native library is paid once for its content, *remembered* by every process after that.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import _measure

from opkit import _config
from opkit.plugins import isolation, quarantine, trial
from opkit.plugins.isolation import Subject
from opkit.plugins.natives import Natives
from opkit.plugins.patches import Patches
from opkit.plugins.settings import Settings
from opkit.plugins.watchdog import Watchdog

LIMIT = 60.0


def nothing() -> None:
    """Be called."""


def timer() -> None:
    watching = threading.Timer(LIMIT, nothing)
    watching.start()
    nothing()
    watching.cancel()


def marked() -> None:
    with quarantine.marked("fast", "1.0", "loading fast"):
        nothing()


def settings() -> None:
    Settings().put_back()


def patches() -> None:
    Patches().found()


def compiled(folder: Path) -> str:
    """Make a native library."""
    source, library = folder / "it.c", folder / "it.so"
    source.write_text("int it(void) { return 1; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        os.environ["OPKIT_CACHE_DIR"] = f"{place}/cache"
        _config.refresh()
        subject = Subject("fast", "1.0", Natives("fast", "json", limit=LIMIT), (), LIMIT)
        library = compiled(Path(place))
        tried = seconds(lambda: trial.of(library, plugin="fast"))
        plugins = [(f"plugin{n}", "1.0") for n in range(16)]
        found = _measure.medians(
            {
                "watchdog, arm and cancel": lambda: Watchdog("calling", limit=LIMIT).run(nothing),
                "(threading.Timer instead)": timer,
                "mark of the call": marked,
                "torch's settings": settings,
                "what is replaced in torch": patches,
                "one call with all of it": lambda: isolation.call(subject, "loading fast", nothing),
                "start: are 16 plugins quarantined": lambda: quarantine.find_all(plugins),
                "trial of a library, remembered": lambda: trial.of(library, plugin="fast"),
            }
        )
    found["trial of a library, the first"] = tried
    rows = [[name, f"{time_ * 1e3:.3f}"] for name, time_ in found.items()]
    _measure.table("calling a plugin in isolation", ["", "ms"], rows)
    _measure.save("isolation", {"seconds": found})


if __name__ == "__main__":
    main()
