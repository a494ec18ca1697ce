"""torch's settings for the whole process: what a plugin leaves changed is noticed, and put back.

A plugin that is called in the middle of somebody's program must not change what that program computes.
Each setting goes by the name of the function that sets it, which is how a manifest declares it; declared
ones stay as the plugin has set them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection
from typing import Any


class Settings:
    """The settings as they are now."""

    def __init__(self) -> None:
        self._before = {name: _read(get) for name, (get, _) in _table().items()}

    def put_back(self, declared: Collection[str] = ()) -> list[str]:
        """Undo what changed since, except what is `declared`, and return all that changed, by name.

        What cannot be undone has the reason behind its name.
        """
        changed = []
        for name, (get, put) in _table().items():
            before, now = self._before[name], _read(get)
            if before == now:
                continue
            problem = ""
            if name not in declared and before is not _UNKNOWN:
                try:
                    put(before)
                except Exception as error:
                    problem = f" (in vain: {error})"
            changed.append(name + problem)
        return changed


_UNKNOWN = object()


def _table() -> dict[str, tuple[Callable[[], Any], Callable[[Any], object]]]:
    import torch

    from opkit import _torch

    return {
        "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "torch.set_default_device": (_torch.default_device, torch.set_default_device),
        "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
        "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
        "torch.set_float32_matmul_precision": (
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        "torch.use_deterministic_algorithms": (
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
        ),
        "torch.manual_seed": (_random, _set_random),
        "os.chdir": (os.getcwd, os.chdir),
    }


def _read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except Exception:  # the folder is gone, say: then there is nothing to compare with
        return _UNKNOWN


def _random() -> bytes:
    import torch

    state = torch.get_rng_state()
    # No op on it, as this may run in the middle of a trace.
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _set_random(state: bytes) -> None:
    import torch

    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
