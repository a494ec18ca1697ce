"""The devices that this machine has."""

from __future__ import annotations

import torch


def is_there(device: str) -> bool:
    """Whether there is a device of a type."""
    if device == "cpu":
        return True
    module = getattr(torch, device, None)
    return module is not None and bool(module.is_available())
