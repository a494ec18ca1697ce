"""torch.distributed between refdev devices: the backend `refdev`, gloo on the same memory."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch


def register(native: Any) -> None:
    """Let `init_process_group("refdev")` make the backend, where this torch has torch.distributed."""
    if not torch.distributed.is_available():
        return

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        gloo = torch.distributed.ProcessGroupGloo(store, rank, size, timeout)
        return native.collectives_over(gloo)

    torch.distributed.Backend.register_backend("refdev", create, devices=["refdev", "cpu"])
