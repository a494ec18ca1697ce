"""What a built library needs of the machine that loads it, held against what opkit promises.

A light or stable library is to load on every torch from 2.10 and on every Python. Nothing checks
that when it is linked, as torch's symbols are looked up in the process that loads it: a library
that breaks it works where it was built and ends in `undefined symbol` elsewhere. So its symbol table
is read here, with readelf, and torch's own headers say since when there is each function.

This module does not decide what is audited, and changes no library.
"""

from __future__ import annotations

import functools
import inspect
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opkit.cpp import diagnostics
from opkit.errors import BuildError, did_you_mean

TARGET = (2, 10)  # the torch that light and stable sources are compiled for

_HEADERS = ("stable/c", "inductor/aoti_torch/c", "inductor/aoti_torch/generated")
_SINCE = re.compile(r"#\s*if\b.*TORCH_FEATURE_VERSION\s*>=\s*TORCH_VERSION_(\d+)_(\d+)_\d+")
_SHIM = re.compile(r"(?:aoti_)?torch_\w+")
_DECLARED = re.compile(r"\b((?:aoti_)?torch_\w+)\s*\(")
_VERSION = re.compile(r"([A-Z_]+?)_(\d[\d.]*)")
# Libraries that are wherever torch is; a kernel may need them without saying so.
_EVERYWHERE = re.compile(
    r"lib(torch|torch_cpu|torch_cuda|c|m|dl|rt|pthread|stdc\+\+|gcc_s|gomp|cuda)\.so(\.\d+)?|ld-linux.*"
)
_BOUND = {
    "libcudart": "CUDA's runtime of one major version; link it statically, without -lcudart",
    "libc10": "torch's C++ library, which changes with every torch",
    "libtorch_python": "torch's library for one version of Python",
    "libpython": "one version of Python",
}
_ATEN = (
    "Include only opkit/kernel.h or torch/csrc/stable, or name the source in an Extension of this module, "
    "which is built for one version of torch and Python"
)


@dataclass(frozen=True)
class Audit:
    """What a library needs: versions of symbols, by their kind, and libraries that torch does not bring."""

    torch: tuple[int, int]
    versions: Mapping[str, str]
    libraries: tuple[str, ...]

    def __str__(self) -> str:
        needs = [f"torch {self.torch[0]}.{self.torch[1]}"]
        needs += [f"{kind} {version}" for kind, version in self.versions.items()]
        return ", ".join([*needs, *self.libraries])


def audit(library: Path, *, label: str, target: tuple[int, int] = TARGET) -> Audit:
    """Return what `library` needs, once it is known to load on every torch from `target`.

    Args:
        library: a shared library of the light or the stable tier.
        label: what was built, for the error: `demo::rms_norm [cpp]`.
        target: the oldest torch that it must load on, as (major, minor).

    Raises:
        BuildError: it needs a symbol or a library that is not there on each of those.
    """
    needed, undefined = _read(library, label)
    known = _shim_functions()
    foreign = tuple(name for name in needed if not _EVERYWHERE.fullmatch(name))
    problems = [
        f"it is linked against {name}, which is {why}"
        for name in needed
        for bound, why in _BOUND.items()
        if re.match(rf"{re.escape(bound)}[._\d]", name)
    ]
    versions: dict[str, tuple[int, ...]] = {}
    since = TARGET
    for symbol in undefined:
        name, _, version = symbol.partition("@")
        if found := _VERSION.fullmatch(version.lstrip("@")):
            number = tuple(int(part) for part in found[2].strip(".").split("."))
            versions[found[1]] = max(versions.get(found[1], (0,)), number)
        elif name in known:
            since = max(since, known[name])
            if known[name] > target:
                problems.append(
                    f"it calls {name}, which torch has since {_dotted(known[name])}. Do without it, or have the "
                    f"kernel compiled where it runs: leave it out of the modules"
                )
        elif problem := _unknown(name, known, bool(foreign)):
            problems.append(problem)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise BuildError(
            f"auditing {label}: {'; '.join(problems[:3])}{more}. Expected a library that loads on every torch "
            f"from {_dotted(target)} and every Python."
        )
    floors = {kind: _dotted(number) for kind, number in sorted(versions.items())}
    return Audit(since, floors, foreign)


def _unknown(name: str, known: Mapping[str, tuple[int, int]], has_foreign: bool) -> str | None:
    """Return what is wrong with a symbol without a version that no stable header declares."""
    if name.startswith(("Py", "_Py")):
        return f"it calls {name}, of one version of Python. {_ATEN}"
    if _SHIM.fullmatch(name):
        return (
            f"it calls {name}, which is not in the stable headers of this torch.{did_you_mean(name, known)} "
            "Call what torch/csrc/stable/c/shim.h declares"
        )
    readable = diagnostics.demangled(name)
    if re.search(r"\b(at|c10|caffe2|torch)::", readable):
        return f"it calls {readable}, of torch's C++ interface, which changes with every torch. {_ATEN}"
    if has_foreign:  # one of those libraries may define it
        return None
    return f"it calls {readable}, which nothing defines. Define it, or name its library in extra_ldflags"


def _read(library: Path, label: str) -> tuple[list[str], list[str]]:
    """Return the libraries that `library` names, and the symbols that it does not define."""
    command = ["readelf", "--wide", "--dynamic", "--dyn-syms", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(
            f"auditing {label}: readelf does not run ({error.strerror}); expected the one that comes with the "
            "compiler. Install binutils (apt install binutils, dnf install binutils)."
        ) from error
    if done.returncode or "Symbol table" not in done.stdout:
        said = (done.stderr.strip() or "no symbol table").splitlines()[0]
        raise BuildError(
            f"auditing {label}: readelf cannot read {library} ({said}); expected a shared library. Build it again."
        )
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout)
    rows = [line.split() for line in done.stdout.splitlines()]
    # Num: Value Size Type Bind Vis Ndx Name; what is weak may stay undefined.
    undefined = [row[7] for row in rows if len(row) > 7 and row[6] == "UND" and row[4] == "GLOBAL"]
    return needed, undefined


@functools.cache
def _shim_functions() -> Mapping[str, tuple[int, int]]:
    """Return the functions of torch's C shim with the torch that has them first, 2.10 for what is older."""
    import torch

    root = Path(inspect.getfile(torch)).parent / "include" / "torch" / "csrc"
    functions: dict[str, tuple[int, int]] = {}
    for folder in _HEADERS:
        for header in sorted((root / folder).glob("*.h")):
            for name, since in _declared(header.read_text(errors="replace")):
                functions[name] = min(since, functions.get(name, since))
    return functions


def _declared(text: str) -> list[tuple[str, tuple[int, int]]]:
    """Return the functions that a header declares, each with the version of the #if around it."""
    found, around = [], [TARGET]
    for line in text.splitlines():
        code = line.partition("//")[0].strip()
        if re.match(r"#\s*if", code):
            since = _SINCE.match(code)
            around.append((int(since[1]), int(since[2])) if since else around[-1])
        elif re.match(r"#\s*endif", code):
            around.pop()
        elif not code.startswith("#"):
            found += [(name, around[-1]) for name in _DECLARED.findall(code)]
    return found


def _dotted(number: tuple[int, ...]) -> str:
    return ".".join(map(str, number))
