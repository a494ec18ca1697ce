"""Telling the user of plugins that are wrong: once each, as a warning, or with OPKIT_STRICT as an error."""

from __future__ import annotations

from collections.abc import Sequence

from opkit.errors import PluginError, warn
from opkit.plugins import policy
from opkit.plugins.state import State


def failures(states: Sequence[State]) -> None:
    """Warn of every plugin that is wrong and was not reported.

    Raises:
        PluginError: OPKIT_STRICT is set.
    """
    wrong = [state for state in states if state.is_wrong]
    if wrong and policy.is_strict():
        raise PluginError(text(wrong[0]))
    for state in wrong:
        if not state.reported:
            state.reported = True  # first, as the warning may be raised as an error
            warn(text(state))


def text(state: State) -> str:
    """Return what is wrong with a plugin, in one line."""
    found = state.found
    doing = f"leaving out {found}" if state.status in ("rejected", "quarantined") else f"loading {found}"
    rest = "opkit goes on without it."
    if state.status == "failed" and state.is_in_force:
        rest = "What else it registered is in force."
    shows = "the traceback" if state.traceback else "where it is"
    return f"{doing}: {state.reason}. {rest} {state.remedy} opkit.plugins.why({found.name!r}) shows {shows}."
