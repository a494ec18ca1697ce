"""The files that a compiler read, from the make rule that it writes under -MD."""

from __future__ import annotations

import re
from pathlib import Path


def read(file: Path) -> set[Path]:
    """Return the files that a depfile names; what is no absolute path is in the folder of the build."""
    try:
        text = file.read_text(errors="surrogateescape")
    except OSError:  # the toolchain writes none
        return set()
    _, _, listed = text.replace("\\\n", " ").partition(": ")
    # Of a backslash before any other letter, make knows nothing.
    names = re.findall(r"(?:\\[ #]|\S)+", listed)
    paths = {Path(re.sub(r"\\([ #])", r"\1", name).replace("$$", "$")) for name in names}
    return {path for path in paths if path.is_absolute()}
