"""`opkit stubs`: what type checkers are to know of ops and modules that a package reaches by name, as .pyi files."""

from __future__ import annotations

import argparse
from pathlib import Path

from opkit.cli import _imports

HELP = "write .pyi stubs for ops that a package reaches by name, and for modules of opkit.cpp.load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE|FILE", help="a package or a module, which is imported")
    parser.add_argument(
        "-o",
        "--out",
        metavar="FOLDER",
        help="write the stubs of all of its modules there; default: beside them",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if a stub is missing or not up to date",
    )


def run(arguments: argparse.Namespace) -> int:
    _imports.run([arguments.package])
    from opkit import stubs

    package = _imports.module_name(arguments.package)
    into = Path(arguments.out) if arguments.out else None
    if arguments.check:
        return _check(stubs.stubs(package, into))
    written = stubs.write(package, into)
    for path in written:
        print(path)
    if not written:
        print(f"{package} reaches nothing by name: type checkers see all there is in its source")
    return 0


def _check(texts: dict[Path, str]) -> int:
    wrong = [p for p, text in texts.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    for path in wrong:
        print(f"{path}: {'not up to date' if path.is_file() else 'missing'}; write it with opkit stubs")
    return int(bool(wrong))
