"""`python -m opkit`, the same as the command `opkit`."""

from __future__ import annotations

import sys

from opkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
