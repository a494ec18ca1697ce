"""Which device of the installed plugins gets torch's slot, decided when torch is imported and a device may be wanted.

`opkit_boot` comes first and decides whether there is anything to do here at all. A device that the user chose gets
the slot; else the first one, in the order of plugins, of which everything that its probe names exists. The others are
left as they are, and `why` says what kept them out. Nothing of a plugin is imported.
"""

from __future__ import annotations

import functools
import marshal
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import opkit_boot
from opkit.errors import PluginError, did_you_mean
from opkit.plugins import calls, catalog, conflicts, loader, policy
from opkit.plugins import device as devices
from opkit.plugins.device import Device
from opkit.plugins.discovery import Found
from opkit.plugins.manifest import DeviceEntry
from opkit.plugins.state import State, blame, describe, remedy
from opkit.plugins.watchdog import Stopped

T = TypeVar("T")

_SETTLED = 2_000_000_000  # ns after which a folder that changes again surely has another time


def boot() -> None:
    """Look at what is installed if that has changed, and set up the device that is wanted.

    Raises:
        ConfigError: a variable or a file has a value that opkit does not know.
        PluginError: the device that the user chose is not there, or cannot be set up.
    """
    _remember()
    if policy.wants_devices():
        set_up(loader.states())


def set_up(states: Iterable[State]) -> None:
    """Give torch's slot to the device that is wanted of those that plugins name in their manifests.

    Raises:
        PluginError: the device that the user chose is not there, or cannot be set up.
    """
    chosen = policy.device()
    offering = [
        s for s in conflicts.ordered(list(states)) if not s.is_out and s.manifest and s.manifest.device
    ]
    _check_choice(chosen.value, chosen.where, offering)
    taken: State | None = None
    for state in sorted(offering, key=lambda state: _entry(state).name != chosen.value):
        entry = _entry(state)
        reason = "" if entry.name == chosen.value else _kept_out(entry)
        if not reason and (shadow := devices.shadowed_by(entry.name) or (taken and _named(taken))):
            reason = f"torch's one slot for devices of plugins has {shadow}"
        if reason:
            _leave_out(state, reason)
            continue
        devices.install(_device(state))
        taken = state
        state.notes.append(f"its device {entry.name} is set up, as {_why(entry, chosen.value, chosen.where)}")


def note(states: Iterable[State]) -> None:
    """Have `why` say what keeps devices out that `boot` has not looked at, as nothing at all spoke for them."""
    for state in states:
        entry = state.manifest.device if state.manifest is not None and not state.is_out else None
        if entry is None or any(told.startswith(f"its device {entry.name} ") for told in state.notes):
            continue
        reason = _kept_out(entry)
        if not policy.wants_devices():
            reason = f"{policy.autoload().where} turns devices off"
        elif policy.device().value == entry.name or not reason:
            reason = (
                "torch has not asked for it: it does so when it is imported, and opkit's entry point is there"
            )
        state.notes.append(f"its device {entry.name} is not set up: {reason}. {_advice(entry)}")


def offer(name: str, wanted_by_probe: Callable[[], bool | str] | None) -> str:
    """Return what keeps a device that a plugin registers by a call from being set up; nothing where it is wanted."""
    chosen = policy.device()
    if not policy.wants_devices():
        return f"{policy.autoload().where} turns devices off"
    if chosen.value:
        return "" if chosen.value == name else f"{chosen.where} chooses {chosen.value}"
    found = False if wanted_by_probe is None else wanted_by_probe()
    if found is True:
        return ""
    return found or (
        "it has no probe, and nobody chose it" if wanted_by_probe is None else "its probe says no"
    )


def _check_choice(chosen: str, where: str, offering: Iterable[State]) -> None:
    known = [_entry(state).name for state in offering]
    if chosen and chosen not in known and devices.owner() is None:
        raise PluginError(
            f"setting up the device {chosen} that {where} chooses: no plugin that is used brings it; they bring "
            f"{', '.join(known) or 'none'}.{did_you_mean(chosen, known)} Install the plugin, see opkit plugins list, "
            f"or take {chosen} out of {where}."
        )


def _kept_out(entry: DeviceEntry) -> str:
    if chosen := policy.device().value:
        return f"{policy.device().where} chooses {chosen}"
    if not entry.probe:
        return "it has no probe, and nobody chose it"
    absent = opkit_boot.missing(entry.probe)
    return f"its probe does not find {' and '.join(absent)}" if absent else ""


def _why(entry: DeviceEntry, chosen: str, where: str) -> str:
    if entry.name == chosen:
        return f"{where} chooses it"
    return f"there is {' and '.join(f'the {kind} {name}' for kind, name in entry.probe)}"


def _leave_out(state: State, reason: str) -> None:
    manifest = state.manifest
    assert manifest is not None
    name = _entry(state).name
    advice = _advice(_entry(state))
    if manifest.ops or manifest.kernels or manifest.toolchain:
        state.notes.append(f"its device {name} is not set up: {reason}. {advice}")
    else:
        state.reject("probe", rule=f"the device {name}", reason=reason, remedy=advice)


def _advice(entry: DeviceEntry) -> str:
    return f"Choose it: OPKIT_DEVICE={entry.name}."


def _device(state: State) -> Device:
    entry = _entry(state)
    call = functools.partial(_call, state)
    return Device(entry.name, entry.stub, entry.loader, state.found.source, state.found.name, call)


def _call(state: State, function: Callable[[], T]) -> T:
    """Load the library of a plugin's device. It may have to be compiled, so there is no limit of time."""
    entry = _entry(state)
    try:
        value = calls.run(state, f"loading {entry.loader}", function, limit=0)
    except Stopped:  # not the plugin's doing
        raise
    except BaseException as error:
        advice = remedy(state.found, error) if isinstance(error, ImportError) else blame(state.found)
        state.fail(f"loading its device {entry.name} raised {describe(error)}", advice, error)
        raise
    loader.mark_loaded(state)
    state.notes.append(f"the library of its device {entry.name} is loaded")
    return value


def _entry(state: State) -> DeviceEntry:
    entry = state.manifest.device if state.manifest is not None else None
    assert entry is not None  # states without one are not offered
    return entry


def _named(state: State) -> str:
    return f"{_entry(state).name} of {state.found}"


def _remember() -> None:
    """Keep which folders hold plugins with a device, for `opkit_boot`; folders that just changed are left out."""
    settled = time.time_ns() - _SETTLED
    known = {}
    for folder, changed in opkit_boot.folders():
        if changed < settled:
            found = catalog.in_folder(folder)
            offered = [(d.name, d.probe) for plugin in found.plugins if (d := _offered(plugin))]
            watched = [*found.watched, *(one for plugin in found.plugins for one in plugin.watched)]
            known[folder] = changed, opkit_boot.distributions(folder), offered, watched
    target = opkit_boot.path("devices")
    kept = dict(list({**_kept(target), **known}.items())[-opkit_boot.FOLDERS :])
    unfinished = f"{target}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(marshal.dumps(kept))
        os.replace(unfinished, target)
    except OSError:  # it only saves time
        pass


def _offered(plugin: Found) -> DeviceEntry | None:
    return plugin.manifest.device if plugin.manifest is not None else None


def _kept(target: str) -> dict[str, Any]:
    try:
        with open(target, "rb") as file:
            kept: dict[str, Any] = marshal.loads(file.read())
            return kept
    except (OSError, ValueError, EOFError, TypeError):
        return {}
