"""Documents as tests: their Python runs, and their text is what it printed."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A piece of a document: its language, the file that it is, if it is one, and its text."""

    kind: str
    title: str
    body: str
    line: int


def blocks(path: Path) -> list[Block]:
    """Return the code of a Markdown file, in order."""
    text = path.read_text()
    return [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start(3)) + 1) for m in _FENCE.finditer(text)]


def is_output(wanted: str, printed: str) -> bool:
    """Whether a program printed what is written, in which `...` stands for anything."""
    return doctest.OutputChecker().check_output(wanted, printed, _FLAGS)


def run(path: Path) -> None:
    """Run the Python of a document as one program, and compare each text with what was printed before it."""
    namespace: dict[str, object] = {"__name__": path.stem}
    printed = ""
    for block in blocks(path):
        if block.kind == "python" and not block.title:
            out = io.StringIO()
            code = compile("\n" * (block.line - 1) + block.body, str(path), "exec")
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            printed = out.getvalue()
        elif block.kind == "text":
            assert is_output(block.body, printed), f"{path.name}:{block.line}: it printed\n{printed}"
