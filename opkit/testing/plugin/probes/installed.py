"""Has opkit remember the plugins of folders that stand in the place of others."""

from __future__ import annotations

import json
import os
import sys


def main(stand_ins: str) -> list[str]:
    """Return the names of the plugins, with other folders in the place of some of `sys.path`, given as JSON."""
    instead = json.loads(stand_ins)
    sys.path[:] = [instead.get(os.path.realpath(one or "."), one) for one in sys.path]
    import opkit

    return [plugin.name for plugin in opkit.plugins.list()]
