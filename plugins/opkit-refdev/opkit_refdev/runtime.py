"""What `torch.refdev` is once its library is loaded: the current device, streams, random numbers and memory.

Names and meanings are those of `torch.cuda`; streams, events and memory are torch's own, for this device.
"""

from __future__ import annotations

from typing import Any

import torch

from opkit_refdev import collectives, library
from opkit_refdev.stub import device_count

_native = library.native()

Device = torch.device | str | int | None


def _index(device: Device = None) -> int:
    """Return the index of a device: of the current one where none is named."""
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    found = torch.device(device)
    if found.type != "refdev":
        raise ValueError(f"{found} is no refdev device; expected refdev, with or without an index")
    return current_device() if found.index is None else found.index


def current_device() -> int:
    """Return the index of the device that is used where none is named."""
    return int(_native.current_device())


def set_device(device: Device) -> None:
    """Use a device where none is named, in this thread."""
    _native.set_device(_index(device))


def synchronize(device: Device = None) -> None:
    """Wait for the work on a device, which is done already."""
    torch.accelerator.synchronize(_index(device))


def current_stream(device: Device = None) -> torch.Stream:
    """Return the stream that is used in this thread."""
    return torch.accelerator.current_stream(_index(device))


def set_stream(stream: torch.Stream) -> None:
    """Use a stream in this thread."""
    torch.accelerator.set_stream(stream)


def stream(stream: torch.Stream) -> torch.Stream:
    """Return a stream as what a `with` block uses."""
    return stream


def default_generator(device: Device = None) -> torch.Generator:
    """Return the generator that random ops on a device draw from where none is given."""
    found: torch.Generator = _native.default_generator(_index(device))
    return found


def manual_seed(seed: int) -> None:
    """Seed the current device's generator."""
    default_generator().manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed the generators of all devices; `torch.manual_seed` does it too."""
    for index in range(device_count()):
        default_generator(index).manual_seed(int(seed))


def initial_seed() -> int:
    """Return the seed of the current device's generator."""
    return default_generator().initial_seed()


def get_rng_state(device: Device = None) -> torch.Tensor:
    """Return the state of a device's generator, on the CPU."""
    return default_generator(device).get_state()


def set_rng_state(state: torch.Tensor, device: Device = None) -> None:
    """Put a device's generator into a state."""
    default_generator(device).set_state(state.cpu())


def set_memory_limit(limit: int, device: Device = None) -> None:
    """Let a device have no more than `limit` bytes, so that torch.OutOfMemoryError comes where a test wants it."""
    _native.set_memory_limit(_index(device), int(limit))


def memory_allocated(device: Device = None) -> int:
    """Return how many bytes tensors on a device have now."""
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: Device = None) -> int:
    """Return how many bytes tensors on a device have had at most."""
    return torch.accelerator.max_memory_allocated(_index(device))


def memory_stats(device: Device = None) -> dict[str, Any]:
    """Return what is counted of a device's memory, see torch.accelerator.memory_stats."""
    return dict(torch.accelerator.memory_stats(_index(device)))


def reset_peak_memory_stats(device: Device = None) -> None:
    """Count the most bytes from now on."""
    torch.accelerator.reset_peak_memory_stats(_index(device))


def empty_cache() -> None:
    """Give unused memory back, of which there is none: nothing is kept."""


def _is_in_bad_fork() -> bool:
    return False  # no state of the library is lost in a forked child


def __getattr__(name: str) -> Any:
    """Return what torch.compile asks for, see `compiler`; it takes Inductor to import."""
    if name in ("Scheduling", "PythonWrapperCodegen", "CppWrapperCodegen", "WrapperFxCodegen"):
        from opkit_refdev import compiler

        return getattr(compiler, name)
    raise AttributeError(f"module 'torch.refdev' has no attribute {name!r}")


collectives.register(_native)
