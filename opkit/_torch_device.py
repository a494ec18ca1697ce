"""What opkit touches of torch's private interfaces for devices of plugins: the one slot that torch has for them.

Imports torch inside functions only, as it is called while torch itself is being imported.
"""

from __future__ import annotations

from types import ModuleType

FREE = "privateuseone"
"""What the slot is called while nobody has it."""


def slot() -> str:
    """Return the name of the device that has the slot, or `FREE`."""
    import torch

    # torch.utils.backend_registration keeps a copy of the name, which is private too.
    return str(torch._C._get_privateuse1_backend_name())


def take_slot(name: str, module: ModuleType) -> None:
    """Give the slot to the device `name`, with `module` as `torch.<name>`. It cannot be given back."""
    import torch
    from torch.utils import backend_registration

    backend_registration.rename_privateuse1_backend(name)
    torch._register_device_module(name, module)  # the documented way, private as it is (torch/__init__.py)
    backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)
