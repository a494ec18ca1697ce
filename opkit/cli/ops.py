"""`opkit ops`: every op that there is, with its schema, its backends by device and the package that defines it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opkit.cli import _imports, _ops, _output

if TYPE_CHECKING:
    from rich.console import Console

HELP = "list ops with their schemas, their backends by device, and where they are from"
_NOTE = "In parentheses: cannot be built here. opkit info NAME says why."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="OP", help="namespace::name, * allowed (default: all)")
    _imports.add_argument(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    import opkit

    _imports.run(arguments.imports)
    names = opkit.list_ops()
    if arguments.ops:
        names = _ops.matching(arguments.ops, names, doing="listing")
    found = [_record(name) for name in names]
    if arguments.json:
        _output.print_json(found)
    elif console := _output.console():
        _print_table(console, found)
    else:
        _print_lines(found)
    return int(any(record["error"] for record in found))


def _record(name: str) -> dict[str, Any]:
    """Return what is known of an op; one that its plugin cannot define is listed with the reason."""
    import opkit

    op = opkit.find(name)
    if op is None:
        empty = dict.fromkeys(("schema", "shapes", "module"))
        return {"name": name, **empty, "kernels": [], "error": _why_not(name)}
    plan = op._meta.plan
    return {
        "name": name,
        "schema": str(op.schema),
        "shapes": None if plan is None else str(plan.line),
        "module": op.__module__,
        "kernels": [kernel._asdict() for kernel in op.kernels],
        "error": None,
    }


def _why_not(name: str) -> str:
    """Return why an op is listed and not defined: a plugin promises it."""
    from opkit.plugins import loader, story

    for state in loader.states():
        if state.manifest is not None and name in state.manifest.ops:
            plugin = story.record(state)
            return f"the plugin {plugin.name} does not define it: {plugin.reason}. {plugin.remedy}".rstrip()
    return "nothing defines it any more"


def _backends(record: dict[str, Any]) -> list[str]:
    """Return the backends for each device, as in `cpu: cpp`."""
    devices: dict[str, list[str]] = {}
    for kernel in record["kernels"]:
        backend = kernel["backend"]
        shown = f"({backend})" if kernel["status"] == "rejected" else backend
        devices.setdefault(kernel["device"], []).append(shown)
    return [
        ", ".join(backends) if device == "any" else f"{device}: {', '.join(backends)}"
        for device, backends in devices.items()
    ]


def _package(record: dict[str, Any]) -> str:
    return str(record["module"] or "").partition(".")[0]


def _contract(record: dict[str, Any]) -> str:
    """Return the schema without the name, or why there is none."""
    return str(record["error"] or record["schema"].removeprefix(record["name"]))


def _print_lines(found: Sequence[dict[str, Any]]) -> None:
    rows = [(r["name"], "; ".join(_backends(r)), _package(r), _contract(r).partition("\n")[0]) for r in found]
    for line in _output.lines(rows):
        print(line)


def _print_table(console: Console, found: Sequence[dict[str, Any]]) -> None:
    from rich.text import Text

    table = _output.table("op", "backends", "from")
    for record in found:
        named = Text(record["name"], style="bold")
        named.append(f"\n{_contract(record)}", style="not bold red" if record["error"] else "not bold dim")
        table.add_row(named, Text("\n".join(_backends(record))), Text(_package(record)))
    console.print(table)
    if any("(" in line for record in found for line in _backends(record)):
        console.print(f"\n{_NOTE}")
