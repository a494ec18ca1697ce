"""A plugin's own code, run in isolation: the function of its entry point, and the factories of its kernels.

Everything of a plugin that opkit runs, but its kernels, runs in here. What that means for the plugin is the part of
whoever calls.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from opkit import _config
from opkit.errors import PluginError
from opkit.plugins import resolve
from opkit.plugins.registry import Registration, Registry
from opkit.plugins.standin import StandIn
from opkit.plugins.state import State

if TYPE_CHECKING:
    from opkit.plugins.isolation import Subject

T = TypeVar("T")


def entry_point(state: State, registry: Registry) -> None:
    """Import a plugin and call its function; raise what that raises."""

    def doing() -> None:
        state.doing = f"importing {state.found.value}"
        function = _function(state)
        state.doing = f"calling {state.found.value}"
        function(registry)

    run(state, f"loading {state.found.value}", doing)


def factory(stand_in: StandIn) -> Registration:
    """Import and call the factory of a kernel, and return what it makes; raise what that raises."""
    state, entry = stand_in.state, stand_in.entry

    def doing() -> tuple[Any, Any]:
        state.doing = f"importing {entry.factory}"
        make = _object(*entry.factory.split(":"))
        when = _object(*entry.when.split(":")) if entry.when else None
        state.doing = f"calling {entry.factory}"
        return make(), when

    function, when = run(state, f"loading {state.found.value}", doing)
    state.doing = f"registering its kernel for {entry}"
    return Registration(
        entry.op, entry.device, function, entry.backend, stand_in.dtypes(), when, entry.priority,
        entry.properties, stand_in.inplace(),
    )  # fmt: skip


def run(state: State, doing: str, function: Callable[[], T], *, limit: float | None = None) -> T:
    """Run code of a plugin, and return what it returns; raise what that raises.

    Args:
        state: the plugin's.
        doing: what the code does, for texts: `loading opkit_fast:register`.
        function: the code.
        limit: seconds that it may take, 0 for any number; by default what OPKIT_PLUGINS_TIMEOUT says.
    """
    from opkit.plugins import isolation

    state.enter()
    try:
        outcome = isolation.call(_subject(state, limit), doing, function)
    finally:
        state.leave()
    state.refusals = outcome.refusals
    state.notes += [note for note in outcome.notes if note not in state.notes]
    if outcome.error is not None:
        raise outcome.error
    state.notes += [f"{refusal}; it gets along without" for refusal in outcome.refusals]
    return cast("T", outcome.value)


def _subject(state: State, limit: float | None) -> Subject:
    """Return the plugin as isolation knows it."""
    from opkit.plugins.isolation import Subject
    from opkit.plugins.natives import Natives

    found, usual = state.found, _config.get("OPKIT_PLUGINS_TIMEOUT")
    if state.natives is None:
        state.natives = Natives(found.name, found.module, limit=usual)
    declared = state.manifest.patches if state.manifest is not None else ()
    return Subject(
        found.name, resolve.tried_as(found), state.natives, declared, usual if limit is None else limit
    )


def _function(state: State) -> Callable[[Registry], object]:
    found = state.found
    if not found.function:
        raise PluginError(
            f"{found.value or 'its entry point'} names no function; expected module:function, which takes the registry"
        )
    function = _object(found.module, found.function)
    if not callable(function):
        raise PluginError(
            f"{found.value} is of type {type(function).__name__}; expected a function of one argument"
        )
    made: Callable[[Registry], object] = function
    return made


def _object(module: str, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
