"""What a compiler said, reduced to its errors on the user's lines.

Understands g++, clang++, nvcc, ptxas and the linkers. It reads text and builds a `BuildError`;
it runs nothing.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opkit.errors import BuildError, Diagnostic

_SHOWN = 5  # errors in the message; the log has all
_LINES = 14  # of each error: excerpt, caret and notes

# k.cpp:12:3: error: text        (g++, clang++; the assembler writes Error)
_GNU = re.compile(
    r"^(?P<file>[^\s:][^:]*):(?P<line>\d+):(?:(?P<column>\d+):)? "
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

_NO_FILE = re.compile(
    r"^(?P<a>[^\s:]+): No such file or directory|^'(?P<b>[^']+)' file not found"
    r"|cannot open source file \"(?P<c>[^\"]+)\""
)
_NO_LIBRARY = re.compile(r"cannot find -l(?P<name>\S+?):?(?:$|\s)")
_NO_ARCHITECTURE = re.compile(
    r"Unsupported gpu architecture '(?P<a>\w+)'|Value '(?P<b>sm_\w+)' is not defined for option"
)
_UNDEFINED = re.compile(r"undefined symbol: (?P<name>\w+)")
# What a symbol belongs to, by its demangled name, and what to do where it is missing.
_MISSING = (
    (
        re.compile(r"^cuda[A-Z]|^__cuda|^cu[A-Z]"),
        "It is of CUDA's runtime: pass with_cuda=True, or name the library in extra_ldflags (-lcudart, -lcuda).",
    ),
    (
        re.compile(r"^(?:cublas|cudnn|cufft|curand|cusparse|cusolver|nccl)"),
        "It is of one of CUDA's libraries: name that in extra_ldflags, such as -lcublas.",
    ),
    (
        re.compile(r"\b(?:at|c10|caffe2|torch)::|^(?:aoti_torch|torch)_|^THP"),
        "It is torch's, and the torch of this process ({torch}) does not export it: the library was compiled for "
        "another torch, or the function is internal. Build it again with this torch, or call a public function.",
    ),
    (
        re.compile(r"^_?Py[A-Z]|^_Py_"),
        "It is Python's: the library was compiled for another Python. Build it again with this one.",
    ),
)


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
    if findings and (advice := _advice(findings[0].diagnostic.message)):
        lines.append(advice)
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


def unloadable(error: Exception, *, label: str, op: str | None = None) -> BuildError:
    """Return the BuildError for a library that was built and does not load.

    >>> print(unloadable(OSError("k.so: undefined symbol: _Z3fooi"), label="k [cpp]"))
    loading k [cpp]: it needs foo(int), which no library of this process defines; expected every function that it \
calls to be defined. Add the source that defines it to the sources, or name its library in extra_ldflags.

    Args:
        error: what the loader raised.
        label: what was loaded: `demo::f [cpp]`.
        op: the op's qualified name, if it is one op's.
    """
    found = _UNDEFINED.search(str(error))
    if found is None:
        return BuildError(f"loading {label}: {error}.", op=op)
    name = demangled(found["name"])
    advice = "Add the source that defines it to the sources, or name its library in extra_ldflags."
    for pattern, what in _MISSING:
        if pattern.search(name):
            advice = what.format(torch=_torch_version())
            break
    return BuildError(
        f"loading {label}: it needs {name}, which no library of this process defines; expected every function "
        f"that it calls to be defined. {advice}",
        op=op,
    )


def demangled(symbol: str) -> str:
    """Return a symbol as it reads in C++.

    >>> demangled("_ZN4demo3addEfi"), demangled("cudaMalloc")
    ('demo::add(float, int)', 'cudaMalloc')
    """
    status = ctypes.c_int()
    try:
        function = _demangler()
    except (OSError, AttributeError):
        return symbol
    text = function(symbol.encode(), None, None, ctypes.byref(status))
    if status.value or not text:
        return symbol
    try:
        return ctypes.string_at(text).decode(errors="replace")
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(text))


@functools.cache
def _demangler() -> Any:
    function = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return function


def _torch_version() -> str:
    import torch

    return torch.__version__


def _advice(message: str) -> str:
    """Return what to do about an error whose cause is outside the source."""
    if found := _NO_FILE.search(message):
        name = found["a"] or found["b"] or found["c"]
        if name.startswith(("c10/cuda/impl/", "ATen/cuda/")) or name.endswith("cuda_cmake_macros.h"):
            return f"{name} is missing from a torch without CUDA. Install a torch for CUDA, or do without ATen/cuda."
        if name == "Python.h":
            return "Install Python's headers: apt install python3-dev, dnf install python3-devel."
        return f"Name the folder that has {name} in extra_include_paths, or correct the #include."
    if found := _NO_LIBRARY.search(message):
        return f"Name the folder of lib{found['name']}.so in extra_ldflags: -L<folder>."
    if found := _NO_ARCHITECTURE.search(message):
        return (
            f"This nvcc does not know {found['a'] or found['b']}. Set TORCH_CUDA_ARCH_LIST to architectures that "
            "it knows (nvcc --list-gpu-arch), such as '9.0', or install another CUDA toolkit."
        )
    return ""


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
