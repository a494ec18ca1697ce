"""`opkit check`: what `opkit.testing.check(op)` does, from the shell."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from opkit.cli import _imports, _ops, _output
from opkit.errors import OpkitError

HELP = "check ops: kernels against the reference, meta, gradients, vmap, compile, export; exits with 1 if one fails"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help="namespace::name, * allowed (default: what --import defines)"
    )
    _imports.add_argument(parser)
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="only this backend; may be given more than once"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="CHECK",
        help="only this check, such as results; may be given more than once",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON, for programs")
    form.add_argument("--markdown", action="store_true", help="as Markdown")


def run(arguments: argparse.Namespace) -> int:
    import opkit
    from opkit.testing import checker

    reports: list[Any] = []
    refused: list[tuple[str, str]] = []
    names = _wanted(arguments)
    for name in names:
        try:
            report = checker.examine(opkit.get(name), backends=arguments.backend, checks=arguments.only)
        except OpkitError as error:
            if len(names) == 1:
                raise
            refused.append((name, str(error)))
            continue
        reports.append(report)
        if not (arguments.json or arguments.markdown):
            if len(reports) > 1:
                print()
            report.print()
    if arguments.json:
        failed = [{"op": name, "ok": False, "error": text} for name, text in refused]
        _output.print_json([*(report.to_dict() for report in reports), *failed])
    elif arguments.markdown:
        print("\n".join(report.to_markdown() for report in reports), end="")
    for _, text in refused:
        print(f"opkit: {text}", file=sys.stderr)
    return int(bool(refused) or not all(report.ok for report in reports))


def _wanted(arguments: argparse.Namespace) -> list[str]:
    """Return the names of the ops that the command line names."""
    import opkit

    before = set(opkit.list_ops())
    _imports.run(arguments.imports)
    known = opkit.list_ops()
    if arguments.ops:
        return _ops.matching(arguments.ops, known, doing="checking")
    names = [name for name in known if name not in before]
    if not names:
        raise OpkitError(
            "checking ops: none is named; expected namespace::name, or --import MODULE for all that it defines. Write "
            "for instance: opkit check 'opkit::*'."
        )
    return names
