"""What is told of plugins: the record that a program reads, and the text that `why` gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from opkit.errors import did_you_mean
from opkit.plugins import pins
from opkit.plugins.manifest import Manifest
from opkit.plugins.state import State


class Plugin(NamedTuple):
    """An installed plugin, and what became of it.

    `status` is `discovered`, `rejected`, `registered`, `loaded`, `failed` or `quarantined`; `cause` says whether it
    is rejected by `policy`, `version`, `conflict` or `probe`, `rule` what decided, `reason` what happened and
    `remedy` what to do. A plugin can fail with some of its kernels only: the others are in force then.
    """

    name: str
    distribution: str
    version: str
    entry_point: str
    location: str
    status: str
    reason: str
    traceback: str
    cause: str
    rule: str
    remedy: str
    manifest: str


def record(state: State) -> Plugin:
    """Return what is known of a plugin."""
    found = state.found
    reason, remedy = state.reason, state.remedy
    if state.status in ("discovered", "registered") and not reason:
        reason, remedy = _not_needed(state)
    return Plugin(
        name=found.name,
        distribution=found.distribution,
        version=found.version,
        entry_point=found.value,
        location=found.location,
        status=state.status,
        reason=reason,
        traceback=state.traceback,
        cause=state.cause,
        rule=state.rule,
        remedy=remedy,
        manifest=found.manifest_path,
    )


def tell(state: State) -> str:
    """Return where a plugin was found, what happened to it, which rule decided, and what to do."""
    plugin = record(state)
    waiting = _waiting(state)
    advice = plugin.remedy
    if waiting and not advice:
        advice = f"Import what defines {waiting[0]}.{_near(waiting[0])}"
    status = f"{plugin.status} ({plugin.cause})" if plugin.cause else plugin.status
    lines = [
        f"{plugin.name} of {plugin.distribution} {plugin.version}: {status}",
        f"  found: {plugin.entry_point or 'entry_points.txt'} in {plugin.location}",
    ]
    if plugin.rule:
        lines.append(f"  decided by: {plugin.rule}")
    lines.append(f"  what happened: {'; '.join(_events(state, plugin, waiting)) or 'it registered nothing'}")
    lines.append(f"  what to do: {advice or 'Nothing.'}")
    lines += [f"  {what}: {which}" for what, which in _facts(state)]
    if plugin.traceback:
        lines += ["", *plugin.traceback.rstrip().splitlines()]
    return "\n".join(lines)


def nobody(name: str, states: Sequence[State]) -> str:
    """Return what to say where no plugin has a name."""
    names = sorted({state.found.name for state in states})
    return (
        f"No installed distribution has a plugin {name!r}; installed are {', '.join(names) or 'none'}."
        f"{did_you_mean(name, names)} Install the distribution that brings it into this Python's environment."
    )


def _not_needed(state: State) -> tuple[str, str]:
    if state.status == "registered":
        return "none of its ops and kernels has been needed yet", ""
    return "no op and no kernel has been asked for yet", "To load it now: opkit.plugins.load()."


def _waiting(state: State) -> list[str]:
    """Return the ops that kernels of the plugin wait for."""
    ops = {r.op for r in state.registrations if not r.applied and not r.refused}
    return sorted(ops | {s.entry.op for s in state.stand_ins if s.is_homeless})


def _events(state: State, plugin: Plugin, waiting: Sequence[str]) -> Iterator[str]:
    if plugin.reason:
        yield plugin.reason
    fetched = [s.registration for s in state.stand_ins if s.registration is not None]
    standing = [s for s in state.stand_ins if s.waiting and not s.is_homeless]
    for what, which in (
        ("kernels in force", [str(r) for r in (*fetched, *state.registrations) if r.applied]),
        ("kernels loaded when they are selected", [str(s.entry) for s in standing]),
        ("kernels waiting until their op is defined", waiting),
    ):
        if which:
            yield f"{what}: {', '.join(which)}"
    yield from state.notes


def _facts(state: State) -> Iterator[tuple[str, str]]:
    """Yield what else the user may want to know."""
    found, manifest = state.found, state.found.manifest
    if found.manifest_path:
        yield "manifest", found.manifest_path
    elif state.remembered is not None:
        yield (
            "manifest",
            "none; opkit goes by what it registered the last time (opkit plugins refresh forgets it)",
        )
    if manifest is not None:
        yield from _declared(manifest)
    digest = pins.record_digest(found)
    if digest:
        yield "pin", f"{found.name}=={found.version}@sha256:{digest}"


_LOADED_BY = (
    "its library is loaded at the first tensor on it, or by torch.NAME.init(), .Generator(), .Stream() and .Event(); "
    "torch.Generator('NAME') and its like do not load it, and raise until it is"
)


def _declared(manifest: Manifest) -> Iterator[tuple[str, str]]:
    needs = manifest.requires
    texts = [f"{what} {wanted}" for what, wanted in zip(needs._fields, needs[:3], strict=False) if wanted]
    if needs.platforms:
        texts.append(f"one of the platforms {', '.join(needs.platforms)}")
    for what, names in (
        ("requires", texts),
        ("ops", manifest.ops),
        ("patches of torch", manifest.patches),
        ("cannot be used with", manifest.conflicts),
        ("loaded after", manifest.after),
        ("loaded before", manifest.before),
    ):
        if names:
            yield what, ", ".join(names)
    if manifest.device is not None:
        name = manifest.device.name
        yield "device", f"{name}; {_LOADED_BY.replace('NAME', name)}"
    if manifest.fork == "unsafe":
        yield "fork", "unsafe: once it is loaded, its kernels are left out in forked children"


def _near(name: str) -> str:
    from opkit import _registry

    return did_you_mean(name, _registry._ops)
