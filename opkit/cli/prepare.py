"""`opkit prepare`: what `opkit.prepare` does, for the processes after this one: they find what was built."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Mapping
from typing import Any

from opkit.cli import _imports, _ops
from opkit.errors import OpkitError

HELP = "build, load and run the kernels that calls will need, so that later processes find them in the cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help="namespace::name, * allowed (default: those of --cases, or what --import defines)",
    )
    _imports.add_argument(parser)
    parser.add_argument(
        "--cases",
        metavar="FILE.py:FUNCTION",
        help="a function that returns what to call: a mapping from ops to lists of (args, kwargs) or of tuples of "
        "arguments; given --device if it takes an argument (default: every native kernel, and no call)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="only kernels for this device type, such as cpu or cuda"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    import opkit

    names, cases = _wanted(arguments)
    report = opkit.prepare(names, cases, device=arguments.device)
    if arguments.json:
        records = [record._asdict() for record in report.records]
        print(json.dumps({"seconds": report.seconds, "records": records}, indent=2))
        return 0
    print(report)
    if any(record.did != "skipped" for record in report.records):
        print(
            "What was built is in the cache for later processes. Each of them selects and loads for itself: it calls "
            "opkit.prepare with the same ops and cases, and then opkit.freeze()."
        )
    return 0


def _wanted(arguments: argparse.Namespace) -> tuple[list[str], dict[str, list[Any]] | None]:
    """Return the names of the ops that the command line names, and their cases."""
    import opkit

    before = set(opkit.list_ops())
    _imports.run(arguments.imports)
    cases = _cases(arguments.cases, arguments.device) if arguments.cases else None
    known = opkit.list_ops()
    if arguments.ops:
        names = _ops.matching(arguments.ops, known, doing="preparing")
    elif cases is not None:
        names = list(cases)
    elif arguments.imports:
        names = [name for name in known if name not in before]
    else:
        raise OpkitError(
            "preparing ops: none is named; expected namespace::name, --cases FILE.py:FUNCTION, or --import MODULE for "
            "all that it defines. Write for instance: opkit prepare 'opkit::*'."
        )
    if cases is not None:
        cases = {name: own for name, own in cases.items() if name in names}
    return names, cases


def _cases(text: str, device: str | None) -> dict[str, list[Any]]:
    """Return the cases by the names of ops that a function gives, called in its file or module."""
    function = _imports.find_function("--cases", text, returns="the cases")
    try:
        takes = bool(inspect.signature(function).parameters)
        cases = function(device or "cpu") if takes else function()
    except Exception as error:
        raise OpkitError(
            f"reading --cases {text}: the function failed with {type(error).__name__}: {error}. Expected it to return "
            "cases; call it in Python to see where it fails."
        ) from error
    if not isinstance(cases, Mapping):
        raise OpkitError(
            f"reading --cases {text}: the function returned a {type(cases).__name__}; expected a mapping from ops to "
            "lists of cases. Return {op: [(x, y)]}."
        )
    return {op if isinstance(op, str) else op.name: own for op, own in cases.items()}
