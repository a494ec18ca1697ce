"""What was measured on: what a reader of a report must know, and what must agree for two reports to be compared."""

from __future__ import annotations

import platform
import threading

import torch

import opkit
from opkit.dispatch import measured, native


def described(device: str) -> dict[str, str | int]:
    """Return the processor or GPU, the versions and the number of threads."""
    found: dict[str, str | int] = {
        "processor": measured.model(device),
        "architecture": platform.machine(),
        "device": device,
        "threads": torch.get_num_threads(),
        "calls": "Python" if native.core() is None else "native core",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "opkit": opkit.__version__,
    }
    if torch.version.cuda and device == "cuda":
        found["cuda"] = torch.version.cuda
    return found


MUST_AGREE = ("processor", "architecture", "device", "threads", "calls")
"""What makes another machine; other versions are what one may want to compare."""


def shown(machine: dict[str, str | int]) -> str:
    """Return a machine as one line."""
    threads = machine.get("threads", "?")
    by = ", ops run by Python" if machine.get("calls") == "Python" else ""
    return (
        f"{machine.get('processor', '?')}, {threads} thread{'' if threads == 1 else 's'}, "
        f"torch {machine.get('torch', '?')}{by}"
    )


def settle() -> None:
    """Wait until it is decided whether the native core runs ops: its build would disturb, and it changes the times."""
    native.need()
    ready = threading.Event()
    native.when_ready(ready.set)
    while not (ready.is_set() or native.is_off()):
        ready.wait(0.2)
