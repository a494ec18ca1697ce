"""Plugins in forked children: what a fork leaves half done is waited for, and what does not survive one is left out.

A thread that imports a module holds a lock of Python's, which a child forked meanwhile has too, without the thread that
would ever let go of it. So a fork waits until no other thread is in a plugin. A plugin that takes longer than
`PATIENCE` may be what waits for the fork: the child does without it then.

A plugin whose manifest says that it does not survive a fork is left out of children, if it was loaded before. One
that the child itself loads works there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from opkit import _sources as sources
from opkit.plugins.state import State

PATIENCE = 30.0  # seconds

_held: dict[int, bool] = {}  # whether a thread that forks now has the lock


def install(states: Callable[[], Sequence[State]], withdraw: Callable[[State], None]) -> None:
    """Have forks wait for plugins, and have `withdraw` take back in children what does not work there."""
    os.register_at_fork(
        before=_wait,
        after_in_parent=_release,
        after_in_child=lambda: _in_child(states(), withdraw),
    )


def _wait() -> None:
    _held[threading.get_ident()] = sources.lock.acquire(timeout=PATIENCE)


def _release() -> None:
    if _held.pop(threading.get_ident(), False):
        sources.lock.release()


def _in_child(states: Sequence[State], withdraw: Callable[[State], None]) -> None:
    _held.clear()  # the lock is another one in here
    for state in states:
        if state.leave_behind(threading.get_ident()):
            _leave_out(
                state,
                f"another thread was {state.doing or 'in it'} when this process was forked, and may hold what it needs",
                withdraw,
            )
        elif state.has_run and state.manifest is not None and state.manifest.fork == "unsafe":
            _leave_out(
                state, "it was loaded before this process was forked, which it does not survive", withdraw
            )
            state.reported = True


def _leave_out(state: State, reason: str, withdraw: Callable[[State], None]) -> None:
    withdraw(state)
    state.called, state.has_run = True, False  # nothing more is to come of it
    state.fail(
        reason,
        "Start the process with spawn or forkserver, or use the plugin's kernels only in the children.",
    )
