"""Plugins: installed distributions that bring ops, kernels, toolchains and devices.

A distribution names a function as an entry point, and the function says what it brings:

    [project.entry-points."opkit.plugins"]
    fast = "opkit_fast:register"

    def register(registry: opkit.plugins.Registry) -> None:
        registry.register_kernel("demo::rms_norm", "cpu", backend="fast")(rms_norm)

It is called when ops are first looked up, a backend is first asked for, or a kernel is first chosen;
never at import. What it registered is remembered, so that the next process imports it only when one of its kernels
is selected. A manifest in the package, `opkit-plugin.toml`, says it from the beginning, see `opkit.plugins.manifest`.

A plugin that fails is reported once and left out. This room finds, calls and reports; it does not choose kernels.
Importing it imports no torch, and its modules only when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import builtins

    from opkit.plugins.loader import load as load
    from opkit.plugins.registry import Registry as Registry
    from opkit.plugins.story import Plugin as Plugin

__all__ = ["Plugin", "Registry", "list", "load", "why"]

_LAZY = {"Plugin": "story", "Registry": "registry", "load": "loader"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'opkit.plugins' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"opkit.plugins.{_LAZY[name]}"), name)
    return value


def list() -> builtins.list[Plugin]:
    """Return every installed plugin, by name and distribution. Imports none of them.

    Example:
        >>> import opkit
        >>> [plugin.name for plugin in opkit.plugins.list() if plugin.status == "failed"]
        []
    """
    from opkit.plugins import loader, story

    return [story.record(state) for state in loader.states()]


def why(name: str) -> str:
    """Say where a plugin was found, what happened to it, which rule decided, and what to do. Imports none.

    Args:
        name: the plugin's name, that of its entry point, or of its distribution.

    Example:
        >>> import opkit
        >>> print(opkit.plugins.why("no-such-plugin"))
        No installed distribution has a plugin 'no-such-plugin'...
    """
    from opkit.plugins import loader, resolve, story

    states = loader.states()
    asked = resolve.called(name, states)
    if any(state.manifest is not None and state.manifest.device is not None for state in asked):
        from opkit.plugins import boot

        boot.note(asked)
    return "\n\n".join(map(story.tell, asked)) if asked else story.nobody(name, states)
