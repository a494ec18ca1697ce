"""Fresh processes, in which a plugin is looked at as a user's program meets it.

A probe is a file of the folder `probes` with a function `main`, which gets words and returns what JSON can hold. It
chooses itself what it imports, and when.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

PROBES = Path(__file__).parent / "probes"

_START = """
import json, runpy, sys
found = runpy.run_path(sys.argv[2])["main"](*sys.argv[3:])
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""

_KEPT = ("OPKIT_CACHE_DIR", "OPKIT_CACHE_PATH", "OPKIT_CACHE_REMOTE", "OPKIT_NATIVE")


class Seen(NamedTuple):
    """What a probe found; or, where it did not come to its end, what became of its process."""

    found: Any
    ended: str
    printed: str


def run(probe: str, *words: str, limit: float, **environment: str) -> Seen:
    """Run a probe in a new process that has this one's `sys.path`; ask for the same again and get the same answer.

    Variables of opkit are not handed on, but those that say where its cache is: what the user's environment turns off
    is no fault of a plugin's.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return _run(probe, words, limit, tuple(sorted(environment.items())), path)


@functools.cache
def _run(
    probe: str, words: tuple[str, ...], limit: float, environment: tuple[tuple[str, str], ...], path: str
) -> Seen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPKIT_") or k in _KEPT}
    with tempfile.TemporaryDirectory(prefix="opkit-probe-") as folder:
        answer = Path(folder, "answer")
        command = [sys.executable, "-c", _START, str(answer), str(PROBES / f"{probe}.py"), *words]
        own = {"PYTHONPATH": path, "XDG_CONFIG_HOME": folder, **dict(environment)}
        try:
            done = subprocess.run(
                command, cwd=folder, env={**kept, **own}, capture_output=True, text=True, timeout=limit,
                errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Seen(None, f"took more than {limit:.0f} s", "")
        if answer.is_file():
            return Seen(json.loads(answer.read_text()), "", done.stdout)
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    last = "\n".join(done.stderr.strip().splitlines()[-15:])
    return Seen(None, f"ended with {ended}\n{last}".rstrip(), done.stdout)
