"""`opkit info`: all that is declared and registered of one op, and the C++ function that a kernel of it must be."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opkit.cli import _imports, _ops, _output
from opkit.errors import BuildError, OpNotFoundError

if TYPE_CHECKING:
    from rich.console import Console

    from opkit._op import Op

HELP = "show what an op declares, its kernels and what else is registered on it"
_STYLES = {"available": "green", "rejected": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", metavar="OP", help="namespace::name")
    _imports.add_argument(parser)
    parser.add_argument(
        "--signature",
        action="store_true",
        help="only the C++ declaration that a light kernel must have, the one with opkit/kernel.h alone",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    _imports.run(arguments.imports)
    op = _named(arguments.op)
    if arguments.json:
        _output.print_json(_record(op))
    elif arguments.signature:
        print(_signature(op))
    elif console := _output.console():
        _print_tables(console, op)
    else:
        _print_lines(op)
    return 0


def _named(text: str) -> Op[..., Any]:
    """Return the op of a name, or that a pattern means."""
    import opkit

    names = _ops.matching([text], opkit.list_ops(), doing="describing")
    if len(names) > 1:
        raise OpNotFoundError(
            f"describing {text}: it means {len(names)} ops, {', '.join(names)}; expected one. Name one of them, or "
            "list them with opkit ops."
        )
    return opkit.get(names[0])


def _record(op: Op[..., Any]) -> dict[str, Any]:
    from opkit.cli import _rules

    try:
        signature = _signature(op)
    except BuildError:  # no light kernel can have it
        signature = None
    return {
        "name": op.name,
        "schema": str(op.schema),
        "shapes": _shapes(op),
        "doc": _doc(op),
        "module": op.__module__,
        "defined": op._table.reference.source,
        "mutates": _mutated(op),
        "inline": op._compiled.inline,
        "rules": _rules.described(op),
        "kernels": [kernel._asdict() for kernel in op.kernels],
        "signature": signature,
    }


def _signature(op: Op[..., Any]) -> str:
    from opkit.cpp import _glue

    return _glue.signature(op.schema.symbol, op.schema)


def _shapes(op: Op[..., Any]) -> str | None:
    plan = op._meta.plan
    return None if plan is None else str(plan.line)


def _doc(op: Op[..., Any]) -> str | None:
    """Return the first line of the docstring; that of an op without a reference is its schema."""
    first = (op.__doc__ or "").strip().partition("\n")[0]
    return first if first and first != str(op.schema) else None


def _mutated(op: Op[..., Any]) -> list[str]:
    return [param.name for param in op.schema.params if param.mutated]


def _facts(op: Op[..., Any]) -> list[tuple[str, str]]:
    """Return what is declared and registered, as rows."""
    from opkit.cli import _rules

    inline = "its reference is what Inductor compiles (inline=True)"
    found = {
        "shapes": _shapes(op) or "no shape line",
        "defined": op._table.reference.source,
        "mutates": ", ".join(_mutated(op)) or "nothing",
        **_rules.described(op),
        **({"compile": inline} if op._compiled.inline else {}),
    }
    return [(what, _here(text)) for what, text in found.items()]


def _kernels(op: Op[..., Any]) -> list[tuple[str, str, str, str]]:
    """Return a row for each kernel: device, backend, status, and its source with the reason why not."""
    return [(k.device, k.backend, k.status, f"{_here(k.source)}\n{k.reason}".strip()) for k in op.kernels]


def _here(text: str) -> str:
    """Return a text with the paths of files in this folder as one would type them."""
    return text.replace(f"{os.getcwd()}{os.sep}", "")


def _print_lines(op: Op[..., Any]) -> None:
    width = _output.terminal_width()
    print(op.schema)
    if doc := _doc(op):
        print(f"  {doc}")
    for found in (_facts(op), _kernels(op)):
        rows: Sequence[Sequence[str]] = found
        print()
        if width is None:  # a line is a record
            rows = [tuple(cell.replace("\n", "; ") for cell in row) for row in rows]
        for line in _output.lines(rows, width=width):
            print(line)


def _print_tables(console: Console, op: Op[..., Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    name, contract = op.name, str(op.schema).removeprefix(op.name)
    console.print(Text.assemble((name, "bold"), contract))
    if doc := _doc(op):
        console.print(Text(doc, style="italic"))
    console.print()
    facts = Table.grid(padding=(0, 2))
    for what, text in _facts(op):
        facts.add_row(Text(what, style="bold"), Text(text, overflow="fold"))
    console.print(facts)
    console.print()
    _print_kernels(console, _kernels(op))


def _print_kernels(console: Console, kernels: Sequence[tuple[str, str, str, str]]) -> None:
    from rich.text import Text

    table = _output.table("device", "backend", "status", "source")
    for device, backend, status, source in kernels:
        table.add_row(Text(device), Text(backend), Text(status, style=_STYLES[status]), Text(source))
    console.print(table)
