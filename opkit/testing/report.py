"""What a check found, as values that print as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from opkit.errors import OpkitError


class Record(NamedTuple):
    """One thing that was checked. `backend` is empty where it is not one kernel's doing.

    `status` is `passed`, `failed` or `skipped`; `found` says why where it was skipped.
    """

    op: str
    backend: str
    what: str
    status: str
    found: str = ""
    expected: str = ""

    def __str__(self) -> str:
        text = f"{self.status:8}{self.backend or 'op'}: {self.what}"
        if self.status == "failed":
            return f"{text}: found {self.found}; expected {self.expected}"
        return f"{text}: {self.found}" if self.found else text


@dataclass(frozen=True)
class Report:
    """All that was checked of an op. Prints as one line per record."""

    op: str
    records: tuple[Record, ...]

    @property
    def failed(self) -> tuple[Record, ...]:
        """The records of what is wrong."""
        return tuple(r for r in self.records if r.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether nothing that was checked is wrong; what was skipped does not count."""
        return not self.failed

    def __str__(self) -> str:
        counts = [
            f"{sum(r.status == status for r in self.records)} {status}"
            for status in ("passed", "failed", "skipped")
        ]
        return "\n  ".join([f"{self.op}: {', '.join(counts)}", *map(str, self.records)])


class CheckError(OpkitError, AssertionError):
    """You checked an op, and it is not what it declares; `report` says all that was checked."""

    def __init__(self, report: Report) -> None:
        lines = "".join(f"\n  {record}" for record in report.failed)
        super().__init__(
            f"checking {report.op}: found {len(report.failed)} of {len(report.records)} records failed; expected "
            f"none. Correct the kernels and formulas named:{lines}",
            op=report.op,
        )
        self.report = report
