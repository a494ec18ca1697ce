"""`opkit build`: compile the native kernels of ops ahead of time."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

from opkit.cli import _imports, _ops
from opkit.errors import BackendError, BuildError, OpkitError

HELP = "compile the native kernels of ops now, for this machine or with nvcc for another one's GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help="namespace::name, * allowed (default: what --import defines)"
    )
    _imports.add_argument(parser)
    parser.add_argument(
        "--backend", action="append", default=[], metavar="NAME", help="only this backend's; may be repeated"
    )
    parser.add_argument(
        "--compdb",
        nargs="?",
        const=".",
        metavar="FOLDER",
        help="compile nothing; write compile_commands.json for clangd (default folder: this one)",
    )
    parser.add_argument(
        "--headers", action="store_true", help="precompile torch's headers, which extensions include"
    )
    parser.add_argument(
        "--native", action="store_true", help="the native core, which makes calls of every op cheap"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    if arguments.headers:
        from opkit.cpp import _pch

        _pch.prepare()
    if arguments.native:
        from opkit.dispatch import native

        print(f"native core: {native.build()}", file=sys.stderr if arguments.json else sys.stdout)
    if (arguments.headers or arguments.native) and not (arguments.ops or arguments.imports):
        return 0
    kernels = _kernels(arguments)
    if arguments.compdb is not None:
        return _write_commands(kernels, Path(arguments.compdb))
    rows: list[dict[str, Any]] = []
    for op, kernel in kernels:
        row = {
            "op": op.name,
            "backend": kernel.backend,
            "device": kernel.device,
            "library": None,
            "reason": "",
        }
        rows.append(row)
        if (reason := kernel.function.unavailable()) and kernel.backend not in arguments.backend:
            row["reason"] = f"skipped: {reason}"
        else:
            try:
                (path,) = op.build(kernel.backend)[:1]
                row["library"] = str(path)
            except BuildError as error:
                row["reason"] = str(error)
        if not arguments.json:
            label = f"{op.name} [{kernel.backend}]"
            told = row["library"] or row["reason"].removeprefix(f"building {label}: ")
            print(f"{label} {told}", file=sys.stdout if row["library"] else sys.stderr)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    return int(any(not row["library"] and not row["reason"].startswith("skipped") for row in rows))


def _kernels(arguments: argparse.Namespace) -> list[tuple[Any, Any]]:
    """Return every native kernel that the command line names, with its op."""
    import opkit

    before = set(opkit.list_ops())
    _imports.run(arguments.imports)
    known = opkit.list_ops()
    if arguments.ops:
        names = _ops.matching(arguments.ops, known, doing="building")
    elif arguments.imports:
        names = [name for name in known if name not in before]
    else:
        raise OpkitError(
            "building kernels: no op is named; expected namespace::name, or --import MODULE for all that it "
            "defines. Write for instance: opkit build 'opkit::*'."
        )
    kernels = [
        (opkit.get(name), kernel)
        for name in names
        for kernel in opkit.get(name).native_kernels()
        if not arguments.backend or kernel.backend in arguments.backend
    ]
    if not kernels:
        wanted = f" of the backend {', '.join(arguments.backend)}" if arguments.backend else ""
        raise BackendError(
            f"building {', '.join(names) or 'kernels'}: there are no native kernels{wanted}; expected one that "
            "opkit.cpp.kernel made. Register it before the module's end."
        )
    return kernels


def _write_commands(kernels: list[tuple[Any, Any]], folder: Path) -> int:
    target = folder / "compile_commands.json"
    found = {entry["file"]: entry for op, kernel in kernels for entry in op.compile_commands(kernel.backend)}
    entries = [*_foreign(target, found), *found.values()]
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(entries, indent=2) + "\n")
    os.replace(unfinished, target)
    print(f"{target}: {len(found)} files of {len(kernels)} kernels")
    return 0


def _foreign(target: Path, own: Container[str]) -> list[Any]:
    """Return the entries that are there and about other files: another build tool's."""
    if not target.exists():
        return []
    try:
        entries = json.loads(target.read_text())
    except ValueError:
        entries = None
    if not isinstance(entries, list):
        raise OpkitError(
            f"writing {target}: what is there is no list of compile commands; expected one, to which to add. Remove "
            "the file, or name another folder."
        )
    return [entry for entry in entries if not (isinstance(entry, dict) and entry.get("file") in own)]
