"""Calling plugins: once each, one after the other, none of them able to break the caller.

Keeps what became of every plugin. It imports torch only when there is a plugin to call.
"""

from __future__ import annotations

import functools
import os
import traceback
from typing import TYPE_CHECKING, Any

from opkit import _config
from opkit import _sources as sources
from opkit.errors import warn
from opkit.plugins import discovery
from opkit.plugins.discovery import Found
from opkit.plugins.registry import Registration, Registry

if TYPE_CHECKING:
    from opkit._op import Op

_ROOM = os.path.dirname(__file__)


class State:
    """What became of one plugin."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.status = "not loaded"  # then "loaded" or "failed"
        self.reason = ""
        self.remedy = ""
        self.traceback = ""
        self.registrations: list[Registration] = []
        self.calling = False
        self.reported = False

    def fail(self, reason: str, remedy: str, trace: str = "") -> None:
        """Note a failure; of several, all reasons and the first traceback are kept."""
        self.status = "failed"
        self.reason = f"{self.reason}; {reason}" if self.reason else reason
        self.remedy = self.remedy or remedy
        self.traceback = self.traceback or trace


_states: list[State] | None = None


def states() -> list[State]:
    """Return the state of every installed plugin; the scan happens once, here or in `load`."""
    global _states
    with sources.lock:
        if _states is None:
            _states = [State(found) for found in discovery.scan()]
        return _states


def load_when_needed() -> None:
    """Call the plugins, as ops or kernels are needed; in a frozen process that is an error, if there are some.

    Raises:
        FrozenError: plugins would be called.
        ConfigError: OPKIT_AUTOLOAD has a value that opkit does not know.
    """
    if _config.get("OPKIT_AUTOLOAD"):
        waiting = [
            state.found.name for state in states() if state.status == "not loaded" and not state.calling
        ]
        if waiting:
            from opkit.dispatch import frozen

            frozen.refuse_plugins(waiting)
    load()


def load() -> None:
    """Call every installed plugin that has not been called, unless OPKIT_AUTOLOAD turns that off.

    Other threads that need ops or kernels meanwhile wait. Failures are reported through `warnings`
    after the last plugin, and never raised.

    Raises:
        ConfigError: OPKIT_AUTOLOAD has a value that opkit does not know.
    """
    with sources.lock:
        if not _config.get("OPKIT_AUTOLOAD"):
            return
        for state in states():
            if state.status == "not loaded" and not state.calling:
                state.calling = True
                try:
                    _call(state)
                finally:
                    state.calling = False
    for state in states():
        if state.status == "failed" and not state.reported:
            state.reported = True  # first, as the warning may be raised as an error
            _warn(f"loading {state.found}", state)


def _call(state: State) -> None:
    """Import a plugin, call its function, and let what it registered take effect."""
    from opkit import _registry
    from opkit.dispatch import preference

    found, registry = state.found, Registry(state.found.source)
    if found.entry_point is None:
        state.fail(found.problem, f"Reinstall {found.distribution}.")
        return
    doing = f"importing {found.value}"
    try:
        function = found.entry_point.load()
        if not callable(function):
            kind = type(function).__name__
            state.fail(f"{found.value} is of type {kind}; expected a function of one argument", _blame(found))
            return
        doing = f"calling {found.value}"
        function(registry)
    except (Exception, SystemExit) as error:
        registry.take_back()
        state.fail(f"{doing} raised {_describe(error)}", _remedy(found, error), _format(error))
        return
    except BaseException:  # such as Ctrl-C, which is not the plugin's doing: it is called at the next need
        registry.take_back()
        raise
    finally:
        registry.close()
    state.status = "loaded"
    state.registrations = registry.registrations
    for registration in registry.registrations:
        preference.know(registration.backend)  # also where its op is still to come
        _registry.when_defined(registration.op, functools.partial(_apply, state, registration))


def _apply(state: State, registration: Registration, op: Op[..., Any]) -> None:
    """Give a kernel to its op; called again when the op is redefined."""
    try:
        registration.apply(op, state.found.source)
    except Exception as error:
        reason = f"its kernel for {registration} does not fit: {_describe(error)}"
        if reason not in state.reason:  # a redefined op has it tried again
            state.fail(reason, _blame(state.found), _format(error))
            if not state.calling:
                state.reported = True
                _warn(f"registering a kernel of {state.found}", state)


def _warn(doing: str, state: State) -> None:
    rest = "What else it registered is in force." if state.registrations else "opkit goes on without it."
    more = f"opkit.plugins.why({state.found.name!r}) shows {'the traceback' if state.traceback else 'where it is'}."
    warn(f"{doing}: {state.reason}. {rest} {state.remedy} {more}")


def _describe(error: BaseException) -> str:
    try:
        text = str(error).strip().partition("\n")[0]
    except Exception:
        text = "its text cannot be shown"
    return f"{type(error).__name__}: {text}".removesuffix(": ").rstrip(".")


def _blame(found: Found) -> str:
    return f"Report it to the authors of {found.distribution}, or take it out: pip uninstall {found.distribution}."


def _remedy(found: Found, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        own = found.value.partition(":")[0].strip().partition(".")[0]
        if missing != own:
            return f"Install what provides the module {missing!r}, or take it out: pip uninstall {found.distribution}."
        return f"Reinstall {found.distribution}: its entry point names a module that is not there."
    return _blame(found)


def _format(error: BaseException) -> str:
    """Return the traceback as text, from the plugin's first frame on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def _is_ours(filename: str) -> bool:
    inside = ("importlib/__init__.py", "importlib/metadata/__init__.py")
    return filename.startswith((_ROOM, "<frozen importlib")) or filename.endswith(inside)
