"""Which of the installed plugins are used, decided before anything of them is imported.

Each rule looks at those that the rules before it have left: policy, what cannot be read, versions, conflicts. Then
the set is compared with that of the parent process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opkit.plugins import catalog, children, conflicts, policy, quarantine, remembered, requirements
from opkit.plugins.discovery import Found
from opkit.plugins.state import State, blame


def resolve(found: Iterable[Found]) -> list[State]:
    """Return a state for each plugin: `discovered`, or why it is not used.

    Raises:
        ConfigError: a variable or a file has a value that opkit does not know, or the parent process has others.
    """
    states = [State(one) for one in found]
    policy.apply(states)
    for state in _left(states):
        if state.found.problem:
            state.fail(state.found.problem.rstrip("."), _advice(state.found))
    requirements.apply(_left(states))
    remembered.apply(_left(states))
    conflicts.apply(_left(states))
    children.compare(states)
    _leave_out_quarantined(
        _left(states)
    )  # last: that one of several processes crashed makes no two jobs of them
    return states


def called(name: str, states: Sequence[State]) -> list[State]:
    """Return the plugins of a name, or of a distribution."""
    return [state for state in states if name in (state.found.name, state.found.distribution)]


def tried_as(found: Found) -> str:
    """Return what a quarantine of the plugin holds for: with another version, or another torch, it has a new chance."""
    return f"{found.version} with torch {catalog.facts().torch}"


def _leave_out_quarantined(states: Sequence[State]) -> None:
    quarantined = quarantine.find_all((state.found.name, tried_as(state.found)) for state in states)
    for state in states if quarantined else ():
        if known := quarantined.get((state.found.name, tried_as(state.found))):
            state.quarantine(known.reason, quarantine.remedy(state.found.name))
            state.traceback = known.evidence


def _left(states: Sequence[State]) -> list[State]:
    return [state for state in states if state.status == "discovered"]


def _advice(found: Found) -> str:
    return blame(found) if found.manifest_path else f"Reinstall {found.distribution}."
