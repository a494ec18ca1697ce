"""What `torch.refdev` answers before its library is loaded. Imports nothing but torch, and that in functions.

opkit adds what every device has: `device`, `current_device`, `manual_seed_all`, `Generator`, `Stream`, `Event`. What
is in neither loads the library, see `runtime`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEVICES = 2


def device_count() -> int:
    """Return how many devices there are."""
    return DEVICES


def is_available() -> bool:
    """Whether there is a device: it is software, so there always is."""
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return the dtypes that torch.autocast may use on the device."""
    import torch

    return [torch.bfloat16, torch.float16]
