"""Builds the library into the package, for a wheel that carries it: `python -m opkit_refdev.carry`."""

from __future__ import annotations

import shutil
import sys

from opkit_refdev import library


def main() -> int:
    """Build it for the torch that is installed, put it beside the sources, and say where."""
    target = library.prebuilt()
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library.build(), target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
