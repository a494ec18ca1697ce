"""What a check found, as values: printed as text or a table, written as JSON or Markdown, shown in notebooks."""

from __future__ import annotations

import html
import importlib.util
import json
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opkit.errors import OpkitError, did_you_mean

# What is checked, in this order, and what it proves where it passes.
CHECKS = {
    "schema": "A call changes only the arguments that the schema says it writes to, and torch is told of each.",
    "meta": "Outputs have the shape, dtype, device and strides that tracers are told of.",
    "results": "What is computed is what the reference computes in float64, to a few roundings of the dtype.",
    "opcheck schema": "Torch watched a call, and saw nothing changed or aliased that the schema does not say.",
    "opcheck autograd": "Gradients are registered where autograd and torch.compile both find them; none is lost.",
    "opcheck fake tensor": "On tensors without data the op describes what it really returns, so it can be traced.",
    "opcheck aot": "Traced with symbolic sizes by AOTAutograd, forward and backward give what eager mode gives.",
    "gradients": "The formula gives the gradients of the reference in float64, in every dtype.",
    "gradcheck": "Gradients are what small steps of the arguments do to what this kernel returns.",
    "second derivatives": "The gradients' own gradients are what small steps do to them.",
    "forward mode": "Tangents are what small steps along a direction do, so torch.func.jvp is right.",
    "vmap": "torch.vmap of the op gives what a loop over the batch gives.",
    "compile": "torch.compile makes one graph for all sizes, without a break, that gives what eager mode gives.",
    "export": "torch.export keeps the op as one node, and the exported program gives what eager mode gives.",
    "determinism": "The same arguments give the same bits, call after call.",
    "thread safety": "Calls from several threads at once give what they give one after another.",
    "properties": "What the kernel states of itself in properties= is so.",
}
STATUSES = ("passed", "failed", "not applicable")
_SHORT = {"passed": "passed", "failed": "FAILED", "not applicable": "n/a"}
_STYLES = {"passed": "green", "failed": "bold red", "not applicable": "yellow"}
_WIDTH = 80
_FAILURES = 3  # of one check of one backend that are told in full


class Record(NamedTuple):
    """One thing that was checked with one input. `backend` is empty where it is not one kernel's doing.

    `status` is `passed`, `failed` or `not applicable`; `found` says why where it is the last. `check` is one of the
    names in `opkit.testing.report.CHECKS`, `input` the call's arguments.
    """

    op: str
    backend: str
    what: str
    status: str
    found: str = ""
    expected: str = ""
    input: str = ""
    check: str = ""

    def __str__(self) -> str:
        who = f"{self.backend or 'op'}: {self.what}"
        if self.status == "not applicable":
            return f"not applicable  {who}: {self.found}"
        where = f" for {self.input}" if self.input else ""
        if self.status == "failed":
            return f"failed  {who}{where}: found {self.found}; expected {self.expected}"
        return f"passed  {who}: {self.found}" if self.found else f"passed  {who}"


@dataclass(frozen=True)
class Report:
    """All that was checked of an op. Prints as text of 80 columns; notebooks show a table.

    `inputs` are the calls that were made, `tolerances` what results may be off by, for each dtype among them.
    """

    op: str
    records: tuple[Record, ...]
    inputs: tuple[str, ...] = ()
    tolerances: tuple[tuple[str, float], ...] = ()

    @property
    def failed(self) -> tuple[Record, ...]:
        """The records of what is wrong."""
        return tuple(r for r in self.records if r.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether nothing that was checked is wrong; what does not apply does not count."""
        return not self.failed

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that ran."""
        return tuple(
            dict.fromkeys(r.backend for r in self.records if r.backend and r.status != "not applicable")
        )

    def of(self, check: str, backend: str | None = None) -> tuple[Record, ...]:
        """Return the records of one check, perhaps of one backend only.

        Raises:
            OpkitError: there is no such check.

        Example:
            >>> import opkit, torch
            >>> report = opkit.testing.check(opkit.get("opkit::swiglu"), torch.ones(3), torch.ones(3))
            >>> report.of("gradcheck", "reference")[0].status
            'passed'
        """
        check_names((check,))
        return tuple(r for r in self.records if r.check == check and backend in (None, r.backend))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        counts = Counter(r.status for r in self.records)
        return {
            "op": self.op,
            "ok": self.ok,
            "backends": list(self.backends),
            "inputs": list(self.inputs),
            "tolerances": dict(self.tolerances),
            "counts": {status: counts[status] for status in STATUSES},
            "checks": {
                name: text for name, text in CHECKS.items() if any(r.check == name for r in self.records)
            },
            "records": [r._asdict() for r in self.records],
        }

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """Return a table with a row for each check, and what failed, as Markdown."""
        names = [b or "op" for b in self._columns()]
        rows = [["check", *names, "what it proves"], ["---"] * (len(names) + 2)]
        for check, cells in self._grid():
            rows.append([check, *cells, CHECKS.get(check, "")])
        lines = [f"**{_escaped(self.op)}**: {self._summary()}", ""]
        lines += [f"| {' | '.join(map(_escaped, row))} |" for row in rows]
        for record, more in self._told():
            lines += ["", f"- **{_escaped(_title(record, more))}**"]
            lines += [f"  - {label}: `{text}`" for label, text in _details(record)]
        for who, text in self._inapplicable():
            lines += ["", f"- {_escaped(who)} not applicable: {_escaped(text)}"]
        return "\n".join(lines) + "\n"

    def _repr_html_(self) -> str:
        colours = {"passed": "#1a7f37", "failed": "#cf222e", "not applicable": "#9a6700"}

        def cell(text: str) -> str:
            status = next((s for s in STATUSES if text.startswith(_SHORT[s])), None)
            style = (
                f' style="text-align:left;color:{colours[status]}"' if status else ' style="text-align:left"'
            )
            return f"<td{style}>{html.escape(text)}</td>"

        head = "".join(
            f"<th>{html.escape(t)}</th>" for t in ("check", *(b or "op" for b in self._columns()), "")
        )
        body = "".join(
            f"<tr>{''.join(map(cell, (check, *cells, CHECKS.get(check, ''))))}</tr>"
            for check, cells in self._grid()
        )
        parts = [f"<p><b>{html.escape(self.op)}</b>: {html.escape(self._summary())}</p>"]
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        for record, more in self._told():
            rows = "".join(
                f"<dt>{html.escape(label)}</dt><dd><code>{html.escape(text)}</code></dd>"
                for label, text in _details(record)
            )
            parts.append(
                f"<p style='color:{colours['failed']}'><b>{html.escape(_title(record, more))}</b></p>"
            )
            parts.append(f"<dl>{rows}</dl>")
        for who, text in self._inapplicable():
            parts.append(f"<p>{html.escape(who)} not applicable: {html.escape(text)}</p>")
        return "\n".join(parts)

    def __str__(self) -> str:
        return "\n".join("".join(text for text, _ in line) for line in self._lines(_WIDTH))

    def print(self) -> None:
        """Print it, in colour where it goes to a terminal and rich is installed."""
        if not sys.stdout.isatty():
            print(self)
            return
        width = max(shutil.get_terminal_size((_WIDTH, 24)).columns, 40)
        if importlib.util.find_spec("rich") is None:
            print("\n".join("".join(text for text, _ in line) for line in self._lines(width)))
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False, width=width)
        for line in self._lines(width):
            console.print(Text.assemble(*line), soft_wrap=True)

    # ---------------------------------------------------------------- the parts of a text

    def _summary(self) -> str:
        counts = Counter(r.status for r in self.records)
        parts = [f"{counts[status]} {status}" for status in STATUSES]
        if not self.inputs:
            return ", ".join(parts)
        inputs = f"{len(self.inputs)} input{'s' * (len(self.inputs) != 1)}"
        return f"{', '.join(parts)}, with {inputs}"

    def _columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.backend for r in self.records))

    def _names(self) -> list[str]:
        """Return the checks that there are records of, in the order of the table."""
        found = dict.fromkeys(r.check for r in self.records)
        return [n for n in (*CHECKS, *(n for n in found if n not in CHECKS)) if n in found]

    def _grid(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each check with its status for each backend."""
        for check in self._names():
            yield check, [_cell([r for r in self._named(check) if r.backend == b]) for b in self._columns()]

    def _named(self, check: str) -> tuple[Record, ...]:
        """Return the records of a check, also of none that is known."""
        return tuple(r for r in self.records if r.check == check)

    def _lines(self, width: int) -> Iterator[list[tuple[str, str]]]:
        """Yield lines, each as pieces of text with the style they have in colour."""
        yield [(self.op, "bold"), (f": {self._summary()}", "")]
        column = max((len(name) for name in self._names()), default=0) + 2
        for check in self._names():
            records = self._named(check)
            yield [("", "")]
            first = True
            for status in STATUSES:
                who = _who(records, status)
                if not who:
                    continue
                title = (check if first else "").ljust(column)
                lead = f"{_SHORT[status]:8}"
                parts = textwrap.wrap(", ".join(who), max(width - 8 - column, 20)) or [""]
                yield [(lead, _STYLES[status]), (title, "bold" if first else ""), (parts[0], "")]
                for rest in parts[1:]:
                    yield [(" " * (8 + column) + rest, "")]
                first = False
            for sentence in textwrap.wrap(self._meaning(check), width - 8):
                yield [(" " * 8 + sentence, "dim")]
        told = list(self._told())
        if told:
            yield [("", "")]
            yield [("What failed", "bold")]
        for record, more in told:
            yield [("", "")]
            for i, part in enumerate(textwrap.wrap(_title(record, more), width - 4)):
                yield [("  " if i == 0 else "    ", ""), (part, "bold red")]
            for label, text in _details(record):
                yield from _labelled(label, text, width)
        unfit = list(self._inapplicable())
        if unfit:
            yield [("", "")]
            yield [("What does not apply", "bold")]
        for whose, why in unfit:
            for i, line in enumerate(_wrapped(f"{whose} {why}", width - 4)):
                yield [("  " if i == 0 else "    ", ""), (line, "")]

    def _meaning(self, check: str) -> str:
        text = CHECKS.get(check, "")
        if check == "results" and self.tolerances:
            text += f" Tolerance: {', '.join(f'{part:g} for {dtype}' for dtype, part in self.tolerances)}."
        if check == "compile":
            counts = dict.fromkeys(r.found for r in self._named(check) if r.status == "passed" and r.found)
            text += "".join(f" Found: {count}." for count in counts)
        return text

    def _told(self) -> Iterator[tuple[Record, int]]:
        """Yield failures, the first few of each check of a backend, and how many more each stands for."""
        groups: dict[tuple[str, str, str], list[Record]] = {}
        for record in self.failed:
            groups.setdefault((record.check, record.backend, record.what), []).append(record)
        seen: Counter[tuple[str, str]] = Counter()
        for (check, backend, _), records in groups.items():
            seen[check, backend] += 1
            if seen[check, backend] <= _FAILURES:
                yield records[0], len(records) - 1

    def _inapplicable(self) -> Iterator[tuple[str, str]]:
        """Yield what does not apply, with the reason: each reason of a check once."""
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in self.records:
            if record.status == "not applicable":
                groups.setdefault((record.check or record.what, record.found), []).append(record)
        for (check, text), records in groups.items():
            backends = [b for b in dict.fromkeys(r.backend for r in records) if b]
            who = f"{check} of {', '.join(backends)}:" if backends else f"{check}:"
            yield who, text


class CheckError(OpkitError, AssertionError):
    """You checked an op, and it is not what it declares; `report` says all that was checked."""

    def __init__(self, report: Report) -> None:
        told = list(report._told())
        lines = "".join(f"\n  {record}{_more(more)}" for record, more in told)
        rest = len(report.failed) - sum(1 + more for _, more in told)
        lines += f"\n  and {rest} more, which print(error.report) shows" if rest else ""
        super().__init__(
            f"checking {report.op}: found {len(report.failed)} of {len(report.records)} records failed; expected "
            f"none. Correct the kernels and formulas named:{lines}",
            op=report.op,
        )
        self.report = report


def check_names(names: Iterable[str], doing: str = "reading a report") -> tuple[str, ...]:
    """Return names of checks, or raise OpkitError for one that there is not."""
    listed = tuple(names)
    for name in listed:
        if name not in CHECKS:
            raise OpkitError(
                f"{doing}: found the check {name!r}; expected some of {', '.join(CHECKS)}."
                f"{did_you_mean(name, CHECKS) if isinstance(name, str) else ''} Name one of these."
            )
    return listed


def _cell(records: Sequence[Record]) -> str:
    """Return the worst status of some records."""
    for status in ("failed", "passed", "not applicable"):
        count = sum(r.status == status for r in records)
        if count:
            return _SHORT[status] + (
                f" {count} of {len(records)}" if status == "failed" and len(records) > 1 else ""
            )
    return ""


def _who(records: Sequence[Record], status: str) -> list[str]:
    """Return the backends whose worst status of a check is this one, with how many records say so."""
    found = []
    for backend in dict.fromkeys(r.backend for r in records):
        own = [r for r in records if r.backend == backend]
        worst = next(s for s in ("failed", "passed", "not applicable") if any(r.status == s for r in own))
        if worst == status:
            alike = sum(r.status == status for r in own)
            total = sum(r.status != "not applicable" for r in own)
            count = (
                ""
                if status == "not applicable"
                else f" ({alike} of {total})"
                if alike != total
                else f" ({alike})"
            )
            found.append(f"{backend or 'op'}{count}")
    return found


def _title(record: Record, more: int) -> str:
    return f"{record.op} {record.backend or 'op'}: {record.what}{_more(more)}"


def _more(count: int) -> str:
    return f" (and for {count} more input{'s' * (count > 1)})" if count else ""


def _details(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the lines below a failure."""
    if record.input:
        yield "input", record.input
    yield "found", record.found
    yield "expected", record.expected


def _labelled(label: str, text: str, width: int) -> Iterator[list[tuple[str, str]]]:
    for i, part in enumerate(_wrapped(text, width - 14)):
        yield [("    ", ""), (f"{label if i == 0 else '':10}", "cyan"), (part, "")]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False) or [""]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
