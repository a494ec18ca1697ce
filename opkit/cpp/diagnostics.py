"""What a compiler said, reduced to its errors on the user's lines.

Understands g++, clang++, nvcc, ptxas and the linkers. It reads text and builds a `BuildError`;
it runs nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opkit.errors import BuildError, Diagnostic

_SHOWN = 5  # errors in the message; the log has all
_LINES = 14  # of each error: excerpt, caret and notes

# k.cpp:12:3: error: text        (g++, clang++; the assembler writes Error)
_GNU = re.compile(
    r"^(?P<file>[^\s:(][^:(]*):(?P<line>\d+):(?:(?P<column>\d+):)? "
    r"(?:(?:fatal|internal compiler) )?(?P<kind>[eE]rror|warning|note|remark): (?P<text>.*)$"
)
# k.cu(12): error: text          (nvcc's front end; errors with a number read `error #20014-D: text`)
_NVCC = re.compile(
    r"^(?P<file>[^\s(][^(]*)\((?P<line>\d+)\): (?:catastrophic |internal )?"
    r"(?P<kind>error|warning|note|remark)(?: #[\w-]+)?: (?P<text>.*)$"
)
# g++: error: text; nvcc fatal   : text; ptxas x.ptx, line 4; error   : text; /usr/bin/ld: cannot find -lx
_TOOL = re.compile(
    r"^(?:\S*/)?(?P<tool>(?:[\w.+-]*-)?(?:g\+\+|gcc|c\+\+|clang(?:\+\+)?|ld(?:\.\w+)?)(?:-[\d.]+)?|cc1plus|cc1|collect2"
    r"|nvcc|ptxas|nvlink|cicc|fatbinary|cudafe\+\+)(?P<text>:? .*)$"
)
_TOOL_FAILS = re.compile(
    r"\b(?:error|fatal)\b|cannot find|undefined reference|unrecognized|relocation|not found", re.IGNORECASE
)
_ONLY_SUMS_UP = re.compile(
    r"ld returned \d+ exit status|linker command failed|warnings being treated as errors"
    r"|errors? detected in the comp|use -v to see invocation"
)
# g++: k.cpp:12:20:   required from here; clang++: note: ... requested here; nvcc: ... at line 12 of k.cu
_REQUIRED = re.compile(r"^(?P<file>[^\s:(][^:(]*):(?P<line>\d+):(?:(?P<column>\d+):)?\s+required from ")
_CONTEXT = re.compile(r"^In file included from |: (?:In |At global scope)")  # g++: what follows is elsewhere
_REQUESTED = re.compile(r"requested here")
_AT_LINE = re.compile(r"\bat line (?P<line>\d+)(?: of (?P<file>\S+))?")
_KILLED = re.compile(r"Killed signal|signal 9|signal terminated program|Killed$", re.MULTILINE)


@dataclass
class Finding:
    """An error with the lines that belong to it: excerpt, caret, notes."""

    diagnostic: Diagnostic
    lines: list[str]
    came_from: list[tuple[str, int, int]] = field(default_factory=list)  # instantiation sites, outermost last


def parse(output: str) -> list[Finding]:
    """Return the errors in a compiler's output, in order.

    >>> parse("k.cpp:3:1: error: 'foo' was not declared in this scope")[0].diagnostic.line
    3
    """
    findings: list[Finding] = []
    pending: list[tuple[str, int, int]] = []  # "required from here" stands before the errors it explains
    current: Finding | None = None
    for line in output.splitlines():
        if _CONTEXT.search(line):
            pending, current = [], None
            continue
        if required := _REQUIRED.match(line):
            pending.append(_site(required))
            current = None
            continue
        start = _GNU.match(line) or _NVCC.match(line)
        if start and start["kind"].lower() == "error":
            if _ONLY_SUMS_UP.search(start["text"]):
                continue
            file, number, column = _site(start)
            current = Finding(Diagnostic(file, number, column, start["text"].strip()), [line], list(pending))
            findings.append(current)
        elif start and start["kind"] == "note" and current:
            if _REQUESTED.search(line):
                current.came_from.append(_site(start))
            current.lines.append(line)
        elif current and line[:1].isspace() and line.strip():
            current.lines.append(line)
            if at := _AT_LINE.search(line):
                current.came_from.append((at["file"] or current.diagnostic.file, int(at["line"]), 0))
        elif (tool := _TOOL.match(line)) and _TOOL_FAILS.search(tool["text"]):
            current = None
            if not _ONLY_SUMS_UP.search(line):
                text = re.sub(r"^[\s:]*(?:(?:fatal\s+)?error|fatal)?\s*:?\s*", "", tool["text"])
                findings.append(Finding(Diagnostic("", 0, 0, f"{tool['tool']}: {text}"), [line]))
        elif start or line.strip():
            current = None
    return findings


def failure(
    output: str,
    *,
    label: str,
    op: str | None = None,
    sources: Sequence[Path] = (),
    log_path: Path | None = None,
    command: str | None = None,
    command_path: Path | None = None,
) -> BuildError:
    """Return the BuildError for a failed build.

    >>> print(failure("k.cpp:3:1: error: expected ';'", label="demo::f [cpp]"))
    building demo::f [cpp]: 1 error, at k.cpp:3: expected ';'
    k.cpp:3:1: error: expected ';'

    Args:
        output: everything the compiler printed.
        label: what was built: `demo::f [cpp]`.
        op: the op's qualified name, if it is one op's.
        sources: the user's files. An error inside a header is shown at the line in them that led there.
        log_path: where the whole output is.
        command: the command line that failed.
        command_path: a script that runs it again.
    """
    findings = [_on_users_line(finding, sources) for finding in parse(output)]
    folders = {path.parent for path in sources}
    findings.sort(key=lambda finding: not _is_within(finding.diagnostic.file, folders))  # the user's first
    lines = [f"building {label}: {_headline(findings, output)}"]
    for finding in findings[:_SHOWN]:
        lines += finding.lines[:_LINES]
    if len(findings) > _SHOWN:
        lines.append(f"{len(findings) - _SHOWN} more errors are in the log")
    if not findings:
        lines += output.strip().splitlines()[-8:]
    if log_path:
        lines.append(f"full log: {log_path}")
    if command_path:
        lines.append(f"to repeat it: sh {shlex.quote(str(command_path))}")
    return BuildError(
        "\n".join(lines),
        op=op,
        diagnostics=[finding.diagnostic for finding in findings],
        log_path=log_path,
        command=command,
    )


def _headline(findings: list[Finding], output: str) -> str:
    if _KILLED.search(output):
        return "the compiler was killed, most likely for lack of memory; set MAX_JOBS=1 or free some memory"
    if not findings:
        return "the compiler failed without naming an error; its last lines follow"
    count = "1 error, " if len(findings) == 1 else f"{len(findings)} errors, the first "
    first = findings[0].diagnostic
    where = f"at {first.file}:{first.line}" if first.file else "outside the source"
    return f"{count}{where}: {first.message}"


def _on_users_line(finding: Finding, sources: Sequence[Path]) -> Finding:
    """Return the finding at the user's line that led to it, where the error itself is in a header."""
    error = finding.diagnostic
    names = {str(path) for path in sources}
    if not names or not error.file or _is_within(error.file, {path.parent for path in sources}):
        return finding
    for file, line, column in reversed(finding.came_from):
        if file in names:
            moved = Diagnostic(file, line, column, f"{error.message} (in {error.file}:{error.line})")
            return Finding(moved, [f"{file}:{line}: error: {moved.message}", *finding.lines])
    return finding


def _is_within(file: str, folders: set[Path]) -> bool:
    return bool(file) and any(folder in Path(file).parents for folder in folders)


def _site(match: re.Match[str]) -> tuple[str, int, int]:
    return match["file"], int(match["line"]), int(match.groupdict().get("column") or 0)
