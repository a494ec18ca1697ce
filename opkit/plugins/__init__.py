"""Plugins: installed distributions that bring ops and kernels.

A distribution names a function as an entry point, and the function says what it brings:

    [project.entry-points."opkit.plugins"]
    fast = "opkit_fast:register"

    def register(registry: opkit.plugins.Registry) -> None:
        registry.register_kernel("demo::rms_norm", "cpu", backend="fast")(rms_norm)

It is called when ops are first looked up, a backend is first asked for, or a kernel is first chosen;
never at import. A plugin that fails is reported once and left out. This room finds, calls and reports;
it does not choose kernels. Importing it imports no torch.
"""

from __future__ import annotations

import builtins
from typing import NamedTuple

from opkit import _config
from opkit.errors import did_you_mean
from opkit.plugins import loader as _loader
from opkit.plugins.loader import load as load
from opkit.plugins.registry import Registry as Registry

__all__ = ["Plugin", "Registry", "list", "load", "why"]


class Plugin(NamedTuple):
    """An installed plugin, and what became of it.

    `status` is `loaded`, `failed` or `not loaded`; `reason` says why it is not `loaded`. A plugin can
    fail with some of its kernels only: the others are in force then.
    """

    name: str
    distribution: str
    version: str
    entry_point: str
    location: str
    status: str
    reason: str
    traceback: str


def list() -> builtins.list[Plugin]:
    """Return every installed plugin, by name and distribution. Calls none of them.

    Example:
        >>> import opkit
        >>> [plugin.name for plugin in opkit.plugins.list() if plugin.status == "failed"]
        []
    """
    return [_record(state) for state in _loader.states()]


def why(name: str) -> str:
    """Say where a plugin was found, what happened to it, and what to do. Calls no plugin.

    Args:
        name: the plugin's name, that of its entry point, or of its distribution.

    Example:
        >>> import opkit
        >>> print(opkit.plugins.why("no-such-plugin"))
        No installed distribution has a plugin 'no-such-plugin'...
    """
    states = _loader.states()
    asked = [state for state in states if name in (state.found.name, state.found.distribution)]
    if asked:
        return "\n\n".join(_story(state) for state in asked)
    names = sorted({state.found.name for state in states})
    return (
        f"No installed distribution has a plugin {name!r}; installed are {', '.join(names) or 'none'}."
        f"{did_you_mean(name, names)} Install the distribution that brings it into this Python's environment."
    )


def _record(state: _loader.State) -> Plugin:
    found = state.found
    return Plugin(
        name=found.name,
        distribution=found.distribution,
        version=found.version,
        entry_point=found.value,
        location=found.location,
        status=state.status,
        reason=state.reason or ("" if state.status == "loaded" else _not_called()[0]),
        traceback=state.traceback,
    )


def _not_called() -> tuple[str, str]:
    """Return why a plugin has not been called, and how to have it called."""
    if _config.get("OPKIT_AUTOLOAD"):
        return "no op and no kernel has been asked for yet", "To call it now: opkit.plugins.load()."
    return "OPKIT_AUTOLOAD turns calling plugins off", "Unset OPKIT_AUTOLOAD."


def _story(state: _loader.State) -> str:
    plugin = _record(state)
    waiting = sorted({r.op for r in state.registrations if not r.applied and not r.refused})
    remedy = state.remedy
    if plugin.status == "not loaded":
        remedy = _not_called()[1]
    elif waiting and not remedy:
        remedy = f"Import what defines {waiting[0]}.{_near(waiting[0])}"
    happened = [plugin.reason] if plugin.reason else []
    for what, which in (
        ("kernels in force", [str(r) for r in state.registrations if r.applied]),
        ("kernels waiting until their op is defined", waiting),
    ):
        if which:
            happened.append(f"{what}: {', '.join(which)}")
    lines = [
        f"{plugin.name} of {plugin.distribution} {plugin.version}: {plugin.status}",
        f"  found: {plugin.entry_point or 'entry_points.txt'} in {plugin.location}",
        f"  what happened: {'; '.join(happened) or 'it registered no kernels'}",
        f"  what to do: {remedy or 'Nothing.'}",
    ]
    if plugin.traceback:
        lines += ["", *plugin.traceback.rstrip().splitlines()]
    return "\n".join(lines)


def _near(name: str) -> str:
    from opkit import _registry

    return did_you_mean(name, _registry._ops)
