"""Plugins that cannot be used together, and the order of those that can.

Two plugins of one name, two that define one op, and those that a manifest excludes: neither is loaded, and both are
named. Which one the user wants, policy says, which comes before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opkit.plugins.state import State


def apply(states: Sequence[State]) -> None:
    """Leave out plugins that are in each other's way."""
    named: dict[str, list[State]] = {}
    defining: dict[str, list[State]] = {}
    excluding: list[tuple[State, str]] = []
    for state in states:
        named.setdefault(state.found.name, []).append(state)
        if manifest := state.manifest:
            for op in manifest.ops:
                defining.setdefault(op, []).append(state)
            excluding += [(state, name) for name in manifest.conflicts]
    for name, both in named.items():
        if len(both) > 1:
            _reject(both, "one name, one plugin", f"have the plugin name {name!r}")
    for op, both in defining.items():
        if len(both) > 1:
            over(op, both)
    for state, name in excluding:
        for other in named.get(name, ()):
            rule = f"conflicts in {state.found.manifest_path}"
            _reject([state, other], rule, "cannot be used together")
    for state in _in_circle(states):
        state.reject(
            "conflict",
            rule=f"order in {state.found.manifest_path}",
            reason=f"its manifest and those of others have it load both before and after "
            f"{', '.join(sorted(_behind(state, states)))}",
            remedy=_deny([state]),
        )


def over(op: str, both: Sequence[State]) -> None:
    """Leave out plugins that define one op."""
    _reject(both, "one definition of an op", f"define the op {op}")


def ordered(states: Iterable[State]) -> list[State]:
    """Return plugins in the order in which they are loaded, where all are needed."""
    left, done = list(states), list[State]()
    while left:
        free = [s for s in left if not _behind(s, left)] or left
        done.append(free[0])
        left.remove(free[0])
    return done


def before(state: State, states: Sequence[State]) -> list[State]:
    """Return the plugins that must be loaded before one."""
    names = _behind(state, states)
    return [other for other in ordered(states) if other.found.name in names and other is not state]


def _behind(state: State, states: Sequence[State]) -> set[str]:
    """Return the names of the plugins that a plugin says it comes after, or that say they come before it."""
    named = set(state.manifest.after) if state.manifest else set()
    for other in states:
        if other.manifest and state.found.name in other.manifest.before:
            named.add(other.found.name)
    return named & {other.found.name for other in states if other is not state}


def _in_circle(states: Sequence[State]) -> list[State]:
    if not any((manifest := state.manifest) and (manifest.after or manifest.before) for state in states):
        return []
    left = [state for state in states if state.status == "discovered"]
    while True:
        waited_for = {name for state in left for name in _behind(state, left)}
        free = [s for s in left if not _behind(s, left) or s.found.name not in waited_for]
        if not free:
            return left
        left = [state for state in left if state not in free]


def _reject(both: Sequence[State], rule: str, reason: str) -> None:
    whose = " and ".join(f"{s.found.name} of {s.found.distribution} {s.found.version}" for s in both)
    for state in both:
        others = [other for other in both if other is not state]
        state.reject("conflict", rule=rule, reason=f"{whose} {reason}", remedy=_deny(others))


def _deny(unwanted: Sequence[State]) -> str:
    names = ",".join(state.found.distribution for state in unwanted)
    return f"To use this one: OPKIT_PLUGINS_DENY={names}, or pip uninstall {names.replace(',', ' ')}."
