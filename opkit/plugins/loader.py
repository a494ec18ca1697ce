"""From what is installed to kernels that run: plugins are registered, and what is needed of them is loaded.

A plugin that opkit knows, by its manifest or from the last time, is registered: its kernels stand in their ops'
tables by name, its ops and toolchain are promised, and nothing of it is imported until one of them is needed. A plugin
that opkit does not know is called at once. One thread at a time is in a plugin, and nothing that one does breaks the
caller. Imports torch only when there is a plugin to register.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from opkit import _config, _logs
from opkit import _sources as sources
from opkit.errors import DuplicateOpError, PluginError, did_you_mean
from opkit.plugins import (
    calls,
    catalog,
    conflicts,
    forks,
    promises,
    quarantine,
    remembered,
    report,
    resolve,
    store,
)
from opkit.plugins.registry import Registration, Registry
from opkit.plugins.standin import StandIn
from opkit.plugins.state import State, blame, describe, remedy
from opkit.plugins.watchdog import HungError, Stopped

if TYPE_CHECKING:
    from opkit._op import Op
    from opkit.plugins.natives import Refusal

_LOG = _logs.logger("plugins")
_states: list[State] | None = None
_depth = 0  # of calls that report what failed when they end


def states() -> list[State]:
    """Return the state of every installed plugin, by name and distribution; the first call looks for them.

    Raises:
        ConfigError: a variable or a file has a value that opkit does not know, or the parent process has others.
    """
    global _states
    with sources.lock:
        if _states is None:
            with store.writing():
                _states = resolve.resolve(catalog.installed())
            for state in _states:
                why = f", {state.status}: {state.reason}" if state.is_out else ""
                _LOG.info("%s: found, %s%s", state.found.name, state.found.source, why)
        return _states


def forget() -> None:
    """Look for plugins again when they are next asked for; what is loaded stays."""
    global _states
    _config.refresh()
    _states = None


def load_when_needed() -> None:
    """Register the plugins, as ops or kernels are needed, and call those of which opkit knows nothing.

    Raises:
        FrozenError: plugins would be called, and the process is frozen.
        ConfigError: as `states` does.
        PluginError: OPKIT_STRICT is set, and a plugin is wrong.
    """
    with _at_work():
        register()
        unknown = [s for s in conflicts.ordered(states()) if s.status == "registered" and s.manifest is None]
        unknown = [s for s in unknown if not s.is_loading]
        if unknown:
            _refuse_if_frozen(unknown)
        for state in unknown:
            call(state)
    report.failures(states())


def load(*names: str) -> None:
    """Load plugins now, with everything that they bring, instead of when it is first needed.

    Plugins that fail are reported through `warnings`, unless they are asked for by name. Other threads that need ops
    or kernels meanwhile wait.

    Args:
        *names: of plugins; by default all that policy allows.

    Raises:
        PluginError: a plugin that is named is not installed, is left out, or fails.
        ConfigError: a variable or a file has a value that opkit does not know.

    Example:
        >>> import opkit
        >>> opkit.plugins.load()
    """
    with _at_work():
        chosen = [named(name) for name in names] if names else states()
        register()
        for state in conflicts.ordered(chosen):
            _load_all(state)
    for state in chosen if names else ():
        if state.status != "loaded":
            raise PluginError(report.text(state))
    report.failures(states())


def named(name: str) -> State:
    """Return the state of the plugin `name`.

    Raises:
        PluginError: there is none.
    """
    for state in states():
        if state.found.name == name:
            return state
    known = sorted({state.found.name for state in states()})
    raise PluginError(
        f"loading the plugin {name}: it is not installed; installed are {', '.join(known) or 'none'}."
        f"{did_you_mean(name, known)} Install the distribution that brings it, or name one of these."
    )


def register() -> None:
    """Make known what the plugins bring that are neither left out nor registered."""
    with _at_work():
        for state in conflicts.ordered(states()):
            if state.status == "discovered":
                state.status = "registered"
                _register(state)


def call(state: State) -> None:
    """Import a plugin, call its function, and let what it registered take effect. Once."""
    with _at_work():
        if state.called or state.is_loading or state.is_out:
            return
        for other in conflicts.before(state, states()):
            call(other)
        registry, begun = Registry(state.found.source), time.monotonic()
        before = remembered.snapshot()
        try:
            calls.entry_point(state, registry)
        except Stopped:  # not the plugin's doing: it is called at the next need
            registry.take_back()
            raise
        except BaseException as error:
            registry.take_back()
            state.called = True
            _fail(state, error)
            return
        finally:
            registry.close()
        state.called, state.registry = True, registry
        _LOG.info("%s: called %s in %.2f s", state.found.name, state.found.value, time.monotonic() - begun)
        _accept(state, registry.registrations)
        remembered.note(state, registry, before)


def fetch(stand_in: StandIn) -> None:
    """Put a kernel that a manifest names into its place, or take its stand-in away."""
    state = stand_in.state
    with _at_work():  # whoever comes second finds it there
        if not stand_in.waiting or state.is_loading:
            return
        _refuse_if_frozen([state])
        if not stand_in.entry.factory:
            call(state)
        elif not state.is_out:
            for other in conflicts.before(state, states()):
                call(other)
            _fill(stand_in)
        if stand_in.waiting:
            stand_in.give_up()
    report.failures([state])


def withdraw(state: State) -> None:
    """Take everything back that a plugin has registered; its state says why."""
    from opkit import _registry

    if state.registry is not None:
        state.registry.take_back()
    promises.withdraw(state.manifest)
    for stand_in in state.stand_ins:
        stand_in.give_up()
    for op in _registry.all_ops():
        for kernel in op._table.all():
            if kernel.source == state.found.source:
                op._table.discard(kernel)
    state.stand_ins, state.registrations = [], []


def mark_loaded(state: State) -> None:
    """Note that code of a plugin has run and come to something; of one that failed otherwise that stays."""
    state.has_run = True
    if state.status == "registered":
        state.status = "loaded"


@contextlib.contextmanager
def _at_work() -> Iterator[None]:
    """Be the one thread that changes what is loaded."""
    global _depth
    with sources.lock:
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def _register(state: State) -> None:
    """Put stand-ins for what a manifest names."""
    from opkit import _registry
    from opkit.dispatch import preference

    manifest = state.manifest
    if manifest is None or not state.wants_ops:
        return
    for entry in manifest.kernels:
        _LOG.debug("%s: brings a kernel for %s", state.found.name, entry)
    promises.make(manifest, functools.partial(_define, state))
    state.stand_ins = [StandIn(entry, state, fetch) for entry in manifest.kernels]
    for stand_in in state.stand_ins:
        preference.know(stand_in.entry.backend)  # also where its op is still to come
        _registry.when_defined(stand_in.entry.op, functools.partial(_place, state, stand_in))


def _define(state: State) -> None:
    """Have a plugin define what it promised."""
    _refuse_if_frozen([] if state.called or state.is_loading else [state])
    call(state)
    report.failures([state])


def _load_all(state: State) -> None:
    if state.status not in ("registered", "loaded"):
        return
    if state.found.function or state.manifest is None:
        call(state)
    for stand_in in state.stand_ins:
        if stand_in.waiting and not state.is_loading:
            _fill(stand_in) if stand_in.entry.factory else stand_in.give_up()
    if not state.is_loading:
        mark_loaded(state)


def _fill(stand_in: StandIn) -> None:
    """Put what a kernel's factory makes into its place."""
    try:
        stand_in.fill(calls.factory(stand_in))
    except Stopped:
        raise
    except BaseException as error:
        stand_in.give_up()
        _fail(stand_in.state, error)
        return
    mark_loaded(stand_in.state)
    _LOG.info("%s: made its kernel for %s", stand_in.state.found.name, stand_in.entry)


def _accept(state: State, registrations: Sequence[Registration]) -> None:
    """Let the kernels that a plugin's function registered take effect."""
    from opkit import _registry
    from opkit.dispatch import preference

    mark_loaded(state)
    promises.withdraw(state.manifest)
    awaited = {stand_in.key: stand_in for stand_in in state.stand_ins if stand_in.waiting}
    for registration in registrations:
        preference.know(registration.backend)
        stand_in = awaited.pop((registration.op, registration.device, registration.backend), None)
        if stand_in is None:
            state.registrations.append(registration)
            _registry.when_defined(registration.op, functools.partial(_apply, state, registration))
        else:
            _guarded(state, str(registration), functools.partial(stand_in.fill, registration))
    for stand_in in awaited.values():
        if not stand_in.entry.factory:
            stand_in.give_up()
            state.notes.append(f"its function did not register a kernel that is expected: {stand_in.entry}")


def _apply(state: State, registration: Registration, op: Op[..., Any]) -> None:
    """Give a kernel to its op; called again when the op is redefined."""
    if not state.is_out:
        _guarded(state, str(registration), functools.partial(registration.apply, op, state.found.source))


def _place(state: State, stand_in: StandIn, op: Op[..., Any]) -> None:
    """Give a stand-in to its op; called again when the op is redefined."""
    if not state.is_out:
        _guarded(state, str(stand_in.entry), functools.partial(stand_in.place, op))


def _guarded(state: State, kernel: str, register: Callable[[], None]) -> None:
    try:
        register()
    except Exception as error:
        known = state.reason
        state.fail(f"its kernel for {kernel} does not fit: {describe(error)}", blame(state.found), error)
        if state.reason != known and _depth == 0:  # else the caller reports
            state.reported = False
            report.failures([state])


def _fail(state: State, error: BaseException) -> None:
    _LOG.error("%s: %s raised %s", state.found.name, state.doing, describe(error))
    if isinstance(error, DuplicateOpError):
        other = next(
            (s for s in states() if s is not state and s.registry and error.op in s.registry.ops), None
        )
        if other is not None:
            conflicts.over(error.op or "", [other, state])
            withdraw(other)
            withdraw(state)
            return
    if state.refusals:
        _refuse(state, state.refusals[0])
    elif isinstance(error, HungError):
        state.traceback = state.traceback or error.where
        state.fail(str(error), blame(state.found))
    elif type(error) is PluginError:
        state.fail(str(error).rstrip("."), blame(state.found))
    else:
        state.fail(f"{state.doing} raised {describe(error)}", remedy(state.found, error), error)
    if state.called or state.is_out:  # else its function may still keep what was promised
        promises.withdraw(state.manifest)


def _refuse(state: State, refusal: Refusal) -> None:
    """Leave a plugin out that cannot do without a library that must not be opened."""
    state.traceback = state.traceback or refusal.said
    if refusal.cause == "conflict":
        advice = (
            f"Use only one of the two: OPKIT_PLUGINS_DENY={state.found.name}, or do not import the other."
        )
        state.reject(
            "conflict", rule="torch takes one definition of each", reason=str(refusal), remedy=advice
        )
    else:
        state.quarantine(str(refusal), quarantine.remedy(state.found.name), rule="the trial of its library")


def _refuse_if_frozen(waiting: Sequence[State]) -> None:
    if waiting:
        from opkit.dispatch import frozen

        frozen.refuse_plugins([state.found.name for state in waiting])


forks.install(lambda: _states or (), withdraw)
