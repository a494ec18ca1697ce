"""`opkit doctor`: whether what opkit needs is here and works, and what to do where it does not."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opkit.cli import _imports, _output

if TYPE_CHECKING:
    from rich.console import Console

    from opkit.cli._health import Finding

HELP = "say whether torch, compilers, the cache, plugins and the native core work here; exits with 1 if one does not"
_STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _imports.add_argument(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    from opkit.cli import _health

    found = list(_health.findings(arguments.imports))
    worst = max((finding.status for finding in found), key=list(_STYLES).index)
    if arguments.json:
        _output.print_json({"status": worst, "checks": [finding._asdict() for finding in found]})
    elif console := _output.console():
        _print_table(console, found)
    else:
        rows = [(f.status, f.check, f"{f.found}\n{f.remedy}".strip()) for f in found]
        for line in _output.lines(rows, width=_output.terminal_width() or _output.WIDTH):
            print(line)
        print(f"\n{_summary(found)}")
    return int(worst == "failure")


def _print_table(console: Console, found: Sequence[Finding]) -> None:
    from rich.text import Text

    table = _output.table("", "check", "found")
    for finding in found:
        status = Text(finding.status, style=_STYLES[finding.status])
        told = Text(finding.found)
        if finding.remedy:
            told.append(f"\n{finding.remedy}", style="cyan")
        table.add_row(status, Text(finding.check), told)
    console.print(table)
    console.print(f"\n{_summary(found)}")


def _summary(found: Sequence[Finding]) -> str:
    count = Counter(finding.status for finding in found)
    parts = [f"{count[s]} {s}{'' if count[s] == 1 else 's'}" for s in ("failure", "warning") if count[s]]
    return f"{' and '.join(parts)} in {len(found)} checks" if parts else f"{len(found)} checks, all ok"
