"""What a manifest promises: its ops and its toolchain are known by name, and defined when one of them is needed."""

from __future__ import annotations

from collections.abc import Callable

from opkit.plugins.manifest import Manifest


def make(manifest: Manifest, define: Callable[[], None]) -> None:
    """Let `define` be called when an op or a source of the plugin is first needed."""
    from opkit import _registry

    for name in manifest.ops:
        _registry.promise(name, define)
    if manifest.toolchain is not None:
        from opkit.cpp import toolchain as toolchains

        toolchains.promise(manifest.toolchain.name, manifest.toolchain.suffixes, define)


def withdraw(manifest: Manifest | None) -> None:
    """Take back what was promised: it is kept by now, or will not be."""
    if manifest is None:
        return
    from opkit import _registry

    for name in manifest.ops:
        _registry.withdraw(name)
    if manifest.toolchain is not None:
        from opkit.cpp import toolchain as toolchains

        toolchains.withdraw(manifest.toolchain.name)
