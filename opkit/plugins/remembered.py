"""What plugins without a manifest registered, kept in the catalog, so that the next time they are lazy too.

It holds while the plugin's files, the versions around it and the accelerators that are visible stay the same. What
depends on anything else, such as a variable, belongs in a manifest; `opkit plugins refresh` forgets it. A plugin that
does more than register is not remembered, and called at the first need in every process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import opkit_boot
from opkit.plugins import catalog, store
from opkit.plugins.discovery import Found, Stamp
from opkit.plugins.manifest import KernelEntry, Manifest, ToolchainEntry, pack
from opkit.plugins.registry import Registration, Registry
from opkit.plugins.state import State

_FILES = 100  # that are watched at most; the module of the entry point is among them
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/accel", "/dev/davinci_manager")

Ops = dict[str, set[tuple[str, str]]]


class Record(NamedTuple):
    """What is kept of a plugin."""

    around: tuple[Any, ...]
    files: tuple[tuple[str, Stamp], ...]
    manifest: tuple[Any, ...]


def apply(states: Iterable[State]) -> None:
    """Give plugins without a manifest what they registered the last time, where that still holds."""
    here = None
    for state in states:
        kept = None if state.found.plain is not None else store.kept(_key(state.found))
        if kept is not None:
            record, here = Record._make(kept), here or _around()
            if record.around == here and catalog.unchanged(record.files):
                state.remembered = Manifest.from_plain(record.manifest)


def snapshot() -> Ops:
    """Return the ops that are defined and the kernels that they have by now."""
    from opkit import _registry

    return {op.name: {(k.device, k.backend) for k in op._table.all()} for op in _registry.all_ops()}


def note(state: State, registry: Registry, before: Ops) -> None:
    """Keep what a plugin without a manifest has registered since `before`."""
    if state.found.manifest is not None or state.status != "loaded":
        return
    made = _derive(state, registry, before)
    if made is not None and made != state.remembered:
        record = Record(_around(), _files(state.found), made.plain())
        store.keep(_key(state.found), tuple(record))


def _derive(state: State, registry: Registry, before: Ops) -> Manifest | None:
    """Return a manifest that says what was registered, or None where one cannot."""
    toolchains = _toolchains(registry)
    if not registry.lasting or len(toolchains) > 1 or _is_done_otherwise(state, registry, before):
        return None
    registered = [*state.registrations, *(s.registration for s in state.stand_ins if s.registration)]
    made = Manifest(
        name=state.found.name,
        version=state.found.version,
        ops=tuple(sorted(registry.ops)),
        packed=pack(map(_entry, registered)),
        toolchain=toolchains[0] if toolchains else None,
    )
    return made if made.ops or made.kernels or made.toolchain else None


def _is_done_otherwise(state: State, registry: Registry, before: Ops) -> bool:
    """Whether ops or kernels are there now that neither the registry was asked for nor somebody else brought."""
    from opkit import _registry

    own = state.found.module.partition(".")[0]
    for op in _registry.all_ops():
        if op.name not in before and op.name not in registry.ops:
            if getattr(op.reference, "__module__", "").partition(".")[0] == own:
                return True
            continue
        for kernel in op._table.all():
            new = (kernel.device, kernel.backend) not in before.get(op.name, {("any", "reference")})
            if new and "(plugin " not in kernel.source:
                return True
    return False


def _entry(registration: Registration) -> KernelEntry:
    dtypes = registration.dtypes
    inplace: Any = registration.inplace
    return KernelEntry(
        registration.op,
        registration.device,
        registration.backend,
        None if dtypes is None else tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        priority=registration.priority,
        properties=registration.properties,
        inplace=tuple(inplace.items()) if isinstance(inplace, dict) else inplace,
    )


def _toolchains(registry: Registry) -> list[ToolchainEntry]:
    from opkit.cpp import toolchain as toolchains

    known = (toolchains.find(name) for name in registry.toolchains)
    return [ToolchainEntry(one.name, tuple(one.suffixes)) for one in known if one is not None]


def _key(found: Found) -> tuple[str, ...]:
    return ("plugin", *found[:5])


def _around() -> tuple[Any, ...]:
    visible = tuple(os.environ.get(name) for name in _VISIBLE)
    return (*catalog.facts(), visible, tuple(map(os.path.exists, _NODES)))


def _files(found: Found) -> tuple[tuple[str, Stamp], ...]:
    """Return the files that the plugin's modules come from, that of its entry point first."""
    own = found.module.partition(".")[0]
    names = [found.module, *sorted(name for name in sys.modules if name.partition(".")[0] == own)]
    paths = (getattr(sys.modules.get(name), "__file__", None) for name in names)
    return tuple((path, opkit_boot.stamp(path)) for path in list(dict.fromkeys(filter(None, paths)))[:_FILES])
