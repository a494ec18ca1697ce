"""A page whose steps are typed into a terminal: its files are written, its commands run, and what they print compared.

    ```python title="op.py"      a file of that name, written or written over
    ```python title=">> op.py"   what is added at its end
    ```console                   commands after `$ `, and what the terminal shows after each

Times, figures, paths and keys differ from run to run, and are compared as such. To write what a page's commands print
now into the page: `python -m tests.docs.console PAGE`.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import documents

_ROWS, _COLUMNS = 40, 80
_VARYING = (
    (r"\d+(\.\d+)? ?(ns|us|ms|s)\b", "TIME"),
    (r"\b\d+(\.\d+)?x", "TIMES"),
    (r"\b\d+%", "PERCENT"),
    (r"[0-9a-f]{16,}(/[0-9a-f]{16})?", "KEY"),
    (r"linux_\w+", "PLATFORM"),
    (r"(?m)^opkit: building .* \.\.\.\n", ""),  # on a machine that takes long
    (r"(?m)^Measured on (.|\n)*\Z", "MACHINE"),  # its lines break where names are long
    (r"[ \t]+", " "),
    (r"[─━]+", "─"),
    (r" +$", ""),
)


class Step(NamedTuple):
    """A command, what the page says that it prints, and where."""

    command: str
    output: str
    line: int


class Terminal:
    """A shell in a folder, with an environment where opkit is installed and nothing of the user's is set."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.home = folder
        self._at = folder / "first"
        self._at.mkdir()
        environment = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        (site,) = environment.glob("lib/python*/site-packages")
        here, root = Path(torch.__file__).parents[1], Path(documents.__file__).parents[1]
        site.joinpath("here.pth").write_text(f"import site; site.addsitedir({str(here)!r})\n{root}\n")
        for name, module in (("opkit", "opkit"), ("pip", "pip"), ("pytest", "pytest")):
            script = environment / "bin" / name
            script.write_text(f'#!/bin/sh\nexec {environment}/bin/python -m {module} "$@"\n')
            script.chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("OPKIT_", "PYTHON", "PYTEST_"))}
        self._variables = {
            **clean,
            "PATH": f"{environment}/bin:{os.environ['PATH']}",
            "OPKIT_CACHE_DIR": str(folder / "cache"),
            "OPKIT_NATIVE": "0",  # else a line says once a machine that the core is built
            "OMP_NUM_THREADS": "1",  # threads that wait for each other wait long where other tests run
            "TERM": "dumb",  # lines, none of them redrawn
            "NO_COLOR": "1",
            "COLUMNS": str(_COLUMNS),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
        }

    def write(self, name: str, text: str) -> None:
        """Write a file where the shell is, or after `>> ` more into it."""
        path = self._at / name.removeprefix(">> ")
        path.write_text(path.read_text() + text if name.startswith(">> ") else text)

    def run(self, command: str) -> str:
        """Return what a command shows, with the folders named as a user's would be."""
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
        told = self.home / "at"
        shell = ["bash", "-c", f"{command}\npwd > {told}"]
        process = subprocess.Popen(
            shell, cwd=self._at, env=self._variables, stdin=its, stdout=its, stderr=its, start_new_session=True
        )  # fmt: skip
        os.close(its)
        shown = b"".join(iter(lambda: _read(ours), b""))
        process.wait()
        os.close(ours)
        self._at = Path(told.read_text().strip())
        text = shown.decode().replace("\r\n", "\n")
        for folder, name in ((self.home / "cache", "~/.cache/opkit"), (self.home / "environment", "~/env")):
            text = text.replace(str(folder), name)
        return text.replace(str(self.home), "~")


def _read(stream: int) -> bytes:
    try:
        return os.read(stream, 1 << 16)
    except OSError:  # the last process has closed it
        return b""


def steps(block: documents.Block) -> Iterator[Step]:
    """Return the commands of a block with what they print; one goes on in the next line after a backslash."""
    parts = re.split(r"(?m)^\$ ((?:.*\\\n)*.*)\n?", block.body)
    line = block.line
    for command, output in zip(parts[1::2], parts[2::2], strict=True):
        yield Step(command, output, line)
        line += (command + output).count("\n") + 1


def settled(text: str) -> str:
    """Return a text without what differs from run to run."""
    for pattern, name in _VARYING:
        text = re.sub(pattern, name, text, flags=re.MULTILINE)
    return text.strip()


def play(page: Path, terminal: Terminal) -> Iterator[tuple[Step, str]]:
    """Do what a page says, and return each command with what it showed."""
    for block in documents.blocks(page):
        if block.title:
            terminal.write(block.title, block.body)
        elif block.kind == "console":
            for step in steps(block):
                yield step, terminal.run(step.command)


def main() -> None:
    """Write what the commands of a page print into the page."""
    page = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        lines = page.read_text().splitlines(keepends=True)
        for step, shown in reversed([*play(page, Terminal(Path(folder)))]):
            begin = step.line + step.command.count("\n")
            lines[begin : begin + step.output.count("\n")] = [re.sub(r"(?m) +$", "", shown)]
    page.write_text("".join(lines))


if __name__ == "__main__":
    main()
