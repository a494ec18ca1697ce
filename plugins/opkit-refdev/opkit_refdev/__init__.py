"""opkit-refdev: a complete device for torch in a few hundred lines, whose memory is the host's.

It is there to be read and copied by whoever brings a device of their own, and to test on a machine without one. torch
knows the device once the user chooses it, by OPKIT_DEVICE=refdev; its library is compiled or found, and loaded, at the
first tensor on it. Importing this imports neither torch nor the library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opkit.plugins import Registry

__all__ = ["register"]


def register(registry: Registry) -> None:
    """Register the toolchain and, as the manifest does, the device.

    Example:
        >>> from opkit.plugins import Registry
        >>> registry = Registry("example 1.0")
        >>> register(registry)
        >>> registry.close()
    """
    from opkit_refdev.toolchain import TOOLCHAIN

    registry.register_toolchain(TOOLCHAIN)
    registry.register_device("refdev", stub="opkit_refdev.stub", loader="opkit_refdev.library:load")
