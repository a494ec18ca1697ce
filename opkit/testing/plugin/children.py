"""What a child process does with a plugin: it computes, and tells its parent what was wrong."""

from __future__ import annotations

from typing import Any

import opkit
from opkit.testing.plugin import calls


def use(file: str, device: str) -> dict[str, Any]:
    """Make the calls that a file has, and one on a device; return which backends were selected and what is wrong."""
    problems: list[str] = []
    selected: list[list[str]] = []
    for call in calls.load(file):
        try:
            if opkit.find(call.op) is None:  # it went with the plugin, which does not survive a fork
                selected.append([call.op, call.backend, ""])
                continue
            selected.append([call.op, call.backend, calls.selected(call)])
            problems += calls.wrong(call)
        except Exception as error:
            problems.append(f"calling {call.op} raised {type(error).__name__}: {error}")
    if device:
        import torch

        try:
            if torch.ones(3).to(device).add(1).cpu().tolist() != [2, 2, 2]:
                problems.append(f"ones + 1 on {device} is not 2")
        except Exception as error:
            problems.append(f"computing on {device} raised {type(error).__name__}: {error}")
    return {"selected": selected, "problems": problems}


def report(queue: Any, file: str, device: str) -> None:
    """Put what `use` returns into a queue of the parent, computing on one thread, as torch's own workers do.

    In a forked child GNU OpenMP's threads are not there, and what torch computes in parallel waits for them.
    """
    import torch

    torch.set_num_threads(1)
    queue.put(use(file, device))
