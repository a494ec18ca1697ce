"""`python -m opkit.dispatch.native FOLDER`: put the core for this torch and this Python into FOLDER, for a wheel."""

from __future__ import annotations

import sys
from pathlib import Path

from opkit.cpp import prebuilt
from opkit.cpp._audit import Audit
from opkit.dispatch.native import library


def main() -> None:
    import torch

    (folder,) = sys.argv[1:]
    built = library.build()
    library.load(built)
    major, minor = torch.__version__.split(".")[:2]
    needs = Audit(
        (int(major), int(minor)), {"torch": torch.__version__, "Python": sys.version.split()[0]}, ()
    )
    print(prebuilt.save(built, Path(folder), library.name(), architectures=(), audit=needs))


if __name__ == "__main__":
    main()
