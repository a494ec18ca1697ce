"""Which plugins the user wants: an allow-list, a deny-list that wins, what may load by itself, and pins.

A variable says more than the project's pyproject, and that more than the user's file; of deny-lists all hold. Nothing
here imports a plugin or torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from opkit.errors import did_you_mean, warn
from opkit.plugins import options
from opkit.plugins.manifest import Manifest
from opkit.plugins.options import Said
from opkit.plugins.pins import Pin
from opkit.plugins.state import State

_warned: set[str] = set()


def apply(states: Sequence[State]) -> None:
    """Leave out the plugins that the user does not want.

    Raises:
        ConfigError: a variable or a file has a value that opkit does not know.
    """
    files = options.files()
    denied = [(name, said.where) for said in options.said("plugins-deny", files) for name in said.value]
    allowed = next(options.said("plugins", files), None)
    loading = autoload(files)
    for state in states:
        _deny(state, denied)
        if state.status == "discovered" and allowed is not None:
            _allow(state, allowed)
        if state.status == "discovered":
            _autoload(state, loading)
    if allowed is not None:
        _warn_of_unknown(states, allowed)


def autoload(files: options.Files | None = None) -> Said:
    """Return which plugins load by themselves: `0`, `ops`, `devices` or `all`."""
    return next(
        options.said("autoload", files), Said("all", "the default, by which installed plugins are used")
    )


def device() -> Said:
    """Return the device that the user chose; its value is empty where that is none."""
    return next(options.said("device"), Said("", "the default"))


def is_strict() -> bool:
    """Whether a plugin that is wrong is an error."""
    return bool(next(options.said("strict"), Said(False, "the default")).value)


def wants_devices() -> bool:
    """Whether devices of plugins may be set up by themselves."""
    return autoload().value in ("all", "devices")


def _deny(state: State, denied: Sequence[tuple[str, str]]) -> None:
    for name, where in denied:
        if Pin(name).names(state.found):
            state.reject(
                "policy",
                rule=where,
                reason=f"{where} turns it off",
                remedy=f"Take {name} out of {where}.",
            )
            return


def _allow(state: State, allowed: Said) -> None:
    wanted = [pin for pin in map(Pin._make, allowed.value) if pin.names(state.found)]
    if not wanted:
        state.reject(
            "policy",
            rule=allowed.where,
            reason=f"{allowed.where} does not name it",
            remedy=f"Add {state.found.name} to {allowed.where}.",
        )
        return
    for pin in wanted:
        if mismatch := pin.mismatch(state.found):
            state.reject(
                "policy",
                rule=allowed.where,
                reason=f"by {allowed.where} {mismatch}",
                remedy="Install what is pinned, or change the pin to what `opkit plugins why` shows.",
            )
            return
    state.rule = allowed.where


def _autoload(state: State, loading: Said) -> None:
    state.wants_ops = loading.value in ("all", "ops")
    if loading.value == "all" or _has(state.found.manifest, loading.value):
        state.rule = state.rule or loading.where
        return
    what = "calling plugins off" if loading.value == "0" else f"plugins without {loading.value} off"
    remedy = f"Unset {loading.where}." if loading.where.startswith("OPKIT_") else f"Take {loading.where} out."
    state.reject("policy", rule=loading.where, reason=f"{loading.where} turns {what}", remedy=remedy)


def _has(manifest: Manifest | None, what: str) -> bool:
    """Whether a plugin brings `ops` or `devices`; one without a manifest may have ops."""
    if what == "devices":
        return manifest is not None and manifest.device is not None
    return what == "ops" and (
        manifest is None or bool(manifest.ops or manifest.kernels or manifest.toolchain)
    )


def _warn_of_unknown(states: Sequence[State], allowed: Said) -> None:
    """Say once that a name in the allow-list is that of no plugin; a misspelt one would go unseen."""
    known = sorted({state.found.name for state in states})
    for pin in map(Pin._make, allowed.value):
        if not any(pin.names(state.found) for state in states) and pin.name not in _warned:
            _warned.add(pin.name)
            warn(
                f"reading {allowed.where}: no installed plugin is called {pin.name!r}; installed are "
                f"{', '.join(known) or 'none'}.{did_you_mean(pin.name, known)} Install it or take it out."
            )
