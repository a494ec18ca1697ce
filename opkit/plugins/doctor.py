"""What is wrong with the plugins of this environment, beyond what became of each: `opkit plugins doctor`.

It asks importlib-metadata what is installed, which is thorough where the catalog is fast, and explains what other
packages have torch load when it is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import importlib_metadata

from opkit.plugins.discovery import GROUP, normalized
from opkit.plugins.state import State

_PROBE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from opkit.plugins import loader, story
name = sys.argv[1]
try:
    loader.load(name)
except Exception:
    pass
sys.stdout.write("\\n" + json.dumps(story.record(loader.named(name))._asdict()))
"""


def probe(state: State, *, limit: float = 300.0) -> dict[str, str]:
    """Load a plugin in a process of its own; return its record there, or what became of the process."""
    command = [sys.executable, "-c", _PROBE, state.found.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=_environment())
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"loading it took more than {limit:.0f} s"}
    try:
        found: dict[str, str] = json.loads(done.stdout.rpartition("\n")[2])
    except ValueError:
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        last = done.stderr.strip().rpartition("\n")[2]
        return {"status": "failed", "reason": f"loading it ended its process with {ended}. {last}".strip()}
    return found


def _environment() -> dict[str, str]:
    """Return the environment for a process that has this one's `sys.path`."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "OPKIT_STRICT": "0"}


def unseen(states: list[State]) -> Iterator[str]:
    """Yield how what importlib-metadata finds differs from what opkit found."""
    here = {(s.found.name, normalized(s.found.distribution)) for s in states if s.found.value}
    there = set()
    for point in entry_points(GROUP):
        there.add((point.name, normalized(point.dist.name if point.dist else "")))
    for name, distribution in sorted(there - here):
        yield f"plugin {name} of {distribution} was not seen. Run opkit plugins refresh."
    for name, distribution in sorted(here - there):
        yield f"plugin {name} of {distribution} is not installed any more. Run opkit plugins refresh."


def autoloaded() -> Iterator[tuple[str, str]]:
    """Yield what other packages have torch load when it is imported, and what is wrong with it, or nothing."""
    for point in entry_points("torch.backends"):
        whose = f"{point.name} of {point.dist.name if point.dist else 'an unknown distribution'}"
        if point.module.partition(".")[0] == "opkit":
            continue
        missing = importlib.util.find_spec(point.module.partition(".")[0]) is None
        wrong = (
            f"its module {point.module} is not there, so `import torch` fails. Uninstall it, or set "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0."
            if missing
            else ""
        )
        yield f"{whose} ({point.value})", wrong


def entry_points(group: str) -> Iterator[importlib_metadata.EntryPoint]:
    """Yield the entry points of a group, those of distributions with damaged metadata left out."""
    seen: set[str] = set()
    for distribution in importlib_metadata.distributions():
        try:
            name = normalized(distribution.name or "")
            if name not in seen:
                seen.add(name)
                yield from distribution.entry_points.select(group=group)
        except Exception:  # of which the scan says what is wrong
            continue
