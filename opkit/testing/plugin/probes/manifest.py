"""Compares a plugin's manifest with the plugin."""

from __future__ import annotations

from pathlib import Path


def main(path: str, *apart: str) -> list[str]:
    """Return the differences, without those that begin with one of `apart`."""
    from opkit.plugins import reality

    return [one for one in reality.differences(Path(path)) if not one.startswith(apart)]
