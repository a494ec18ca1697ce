"""Imports modules in an order, and loads a plugin twice; says what was imported too early and what was left behind."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def main(order: str, name: str, package: str, device: str, *foreign: str) -> dict[str, Any]:
    """Return what was imported too early, how the plugin stands after each loading, and its notes.

    Args:
        order: modules that are imported one after the other.
        name: the plugin's.
        package: what must not be imported before it is needed; it may be in `order`.
        device: the plugin's, or nothing.
        *foreign: ops of others that the plugin has kernels for.
    """
    early: list[str] = []

    def look(doing: str) -> None:
        if package in sys.modules and package not in imported and not early:
            early.append(doing)

    imported: list[str] = []
    for module in order.split(","):
        importlib.import_module(module)
        imported.append(module)
        look(f"import {module}")
    import opkit

    opkit.plugins.list()
    opkit.plugins.why(name)
    look("opkit.plugins.list() and why()")
    opkit.list_ops()
    for op in foreign:
        if (known := opkit.find(op)) is not None:
            _ = known.kernels
    look("looking ops and their kernels up")

    loaded = [_load(name), _load(name)]
    import opkit_boot

    for _ in range(2):
        opkit_boot.boot()
    booted = f"{type(opkit_boot.problem).__name__}: {opkit_boot.problem}" if opkit_boot.problem else ""
    used = _use(device) if device else ""
    from opkit.plugins import loader

    state = loader.named(name)
    return {
        "early": early,
        "loaded": loaded,
        "booted": booted,
        "used": used,
        "status": state.status,
        "notes": state.notes,
        "why": opkit.plugins.why(name),
    }


def _load(name: str) -> str:
    """Return how a plugin stands after it was loaded."""
    import opkit

    try:
        opkit.plugins.load(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _use(device: str) -> str:
    """Return what is wrong with what a device computes."""
    import torch

    try:
        there = (torch.arange(6.0).view(2, 3).to(device) + 1) * torch.ones(2, 3, device=device)
        if there.device.type != device:
            return f"the result is on {there.device}"
        if there.t().cpu().tolist() != [[1, 4], [2, 5], [3, 6]]:
            return f"the result is {there.t().cpu().tolist()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
