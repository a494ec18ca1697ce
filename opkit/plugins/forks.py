"""Plugins in forked children: one whose manifest says that it does not survive a fork is left out of them.

Only if it was loaded before the fork. One that the child itself loads works there.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from opkit.plugins.state import State

_unsafe: list[State] = []
_withdraw: Callable[[State], None] | None = None


def watch(state: State, withdraw: Callable[[State], None]) -> None:
    """Have a plugin that was loaded taken back by `withdraw` in forked children, if it does not survive there."""
    global _withdraw
    manifest = state.manifest
    if manifest is None or manifest.fork != "unsafe" or state in _unsafe:
        return
    if _withdraw is None:
        os.register_at_fork(after_in_child=_in_child)
    _withdraw = withdraw
    _unsafe.append(state)


def _in_child() -> None:
    lost, _unsafe[:] = list(_unsafe), []
    for state in lost:
        assert _withdraw is not None
        _withdraw(state)
        state.fail(
            "it was loaded before this process was forked, which it does not survive",
            "Start the process with spawn or forkserver, or use the plugin's kernels only in the children.",
        )
        state.reported = True
