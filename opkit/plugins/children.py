"""The plugins that a process uses, told to its children, which must use the same.

Processes of one job that choose among other kernels give other results, or hang in a collective. Those that
`multiprocessing` starts and the ranks of torchrun compare; other programs that a process runs go their own way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from opkit.errors import PluginError
from opkit.plugins.state import State


def compare(states: Sequence[State]) -> None:
    """Compare with what the parent process uses, and tell the children of this one.

    Raises:
        PluginError: this process uses other plugins than its parent.
    """
    used = ",".join(sorted(f"{s.found.name}=={s.found.version}" for s in states if s.status == "discovered"))
    parent, _, told = os.environ.get("OPKIT_PLUGINS_PARENT", "").partition("|")
    if parent == sys.prefix and told != used and _is_worker():
        raise PluginError(_difference(used, told))
    os.environ["OPKIT_PLUGINS_PARENT"] = f"{sys.prefix}|{used}"


def _is_worker() -> bool:
    """Whether this process is part of its parent's job."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


def _difference(used: str, told: str) -> str:
    here, there = (set(filter(None, text.split(","))) for text in (used, told))
    only = [
        f"only {who} has {', '.join(sorted(names))}"
        for who, names in (("this process", here - there), ("its parent", there - here))
        if names
    ]
    return (
        f"finding plugins in a child process: {' and '.join(only)}; expected the same in both. Give the child the "
        "parent's environment, working directory and sys.path, and install or remove nothing meanwhile."
    )
