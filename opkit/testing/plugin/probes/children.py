"""Uses a plugin, and then in children that are started in each way."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any


def main(calls: str, device: str, limit: str) -> dict[str, Any]:
    """Return what `opkit.testing.plugin.children.use` found in this process and in each child, or how the child ended.

    Args:
        calls: a file with calls of ops.
        device: the plugin's, or nothing.
        limit: seconds that a child may take.
    """
    from opkit.testing.plugin import children

    found: dict[str, Any] = {"the parent": children.use(calls, device)}
    for way in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(way)
        queue = context.SimpleQueue()
        child = context.Process(target=children.report, args=(queue, calls, device))  # type: ignore[attr-defined]
        child.start()
        end = time.monotonic() + float(limit)
        while queue.empty() and child.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        if not queue.empty():
            found[way] = queue.get()
            child.join(float(limit))
        elif child.is_alive():
            child.kill()
            found[way] = {"problems": [f"it hangs: it was stopped after {limit} s"], "selected": []}
        else:
            found[way] = {"problems": [f"it ended with the exit code {child.exitcode}"], "selected": []}
    return found
