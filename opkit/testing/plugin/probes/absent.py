"""Looks at opkit and torch where a plugin is installed and turned off, or not there any more."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(
    name: str, package: str, backends: str, own: str, foreign: str, stand_ins: str = "{}"
) -> dict[str, Any]:
    """Return how the plugin stands, and what of it is there all the same.

    Args:
        name: the plugin's.
        package: what must not be imported.
        backends: of its kernels, separated by commas.
        own: ops that it defines, separated by commas.
        foreign: ops of others that it has kernels for, separated by commas.
        stand_ins: folders that are used in the place of some of `sys.path`, as JSON.
    """
    instead = json.loads(stand_ins)
    sys.path[:] = [instead.get(os.path.realpath(one or "."), one) for one in sys.path]
    import torch

    import opkit

    left: list[str] = []
    if torch.ones(2).add(1).tolist() != [2, 2]:
        left.append("torch.ones(2) + 1 is not [2, 2]")
    known = opkit.list_ops()
    left += [f"the op {op} is known" for op in own.split(",") if op in known]
    for op in filter(None, foreign.split(",")):
        found = opkit.find(op)
        kernels = found.kernels if found is not None else ()
        left += [
            f"the {k.backend} kernel of {op} is there"
            for k in kernels
            if k.backend in backends.split(",") and f"(plugin {name})" in (k.source or "")
        ]
    if package in sys.modules:
        left.append(f"{package} is imported")
    standing = {p.name: p for p in opkit.plugins.list()}
    here = standing.get(name)
    return {
        "left": left,
        "status": here.status if here else "",
        "cause": here.cause if here else "",
        "found": f"{here.entry_point} in {here.location}" if here else "",
    }
