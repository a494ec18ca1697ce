"""Native source as a kernel of an op: a plain C++ or CUDA function in the light tier, or one over torch's tensors.

`kernel(...)` only remembers the source. `Source.bind` writes boxed glue from the schema and the shape
line, compiles both as one unit, and registers the entry point with torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opkit.cpp import _arguments, _aten, _boxed, _glue, _includes, cache, compilers, nvrtc, prebuilt
from opkit.cpp import tier as tiers
from opkit.cpp import toolchain as toolchains
from opkit.cpp._native import Loaded, register
from opkit.cpp._unit import Unit
from opkit.cpp.compile import Job
from opkit.cpp.toolchain import Toolchain
from opkit.errors import BuildError, did_you_mean
from opkit.spec.plan import OutputMeta, Plan
from opkit.spec.schema import Schema

# In the name of a file these end what compilers' messages are parsed for, or the string after #line.
_UNREADABLE = re.compile(r'[:()"\\\x00-\x1f]')


@dataclasses.dataclass(frozen=True)
class Source:
    """Native source that becomes a kernel when an op first needs it. Made by `opkit.cpp.kernel`."""

    path: Path | None
    text: str | None
    symbol: str | None
    toolchain: Toolchain
    where: str
    place: str
    """What the compiler calls source text; without the colons and parentheses that its messages use."""
    line: int = 1
    """The line of `place` where source text begins."""
    tier: str | None = None
    """`light`, `stable` or `aten`; None where what the source includes tells."""
    extra_cflags: tuple[str, ...] = ()
    extra_cuda_cflags: tuple[str, ...] = ()
    extra_ldflags: tuple[str, ...] = ()
    extra_include_paths: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return self.where

    @property
    def backend(self) -> str:
        """The backend that such source is registered under when nothing else is said."""
        return self.toolchain.name

    def identity(self) -> str:
        """Return what tells it from edited source: its own text and flags; headers are left out."""
        flags = self.extra_cflags, self.extra_cuda_cflags, self.extra_ldflags
        return cache.digest(self._read(), self.symbol, self.toolchain.name, self.tier, flags)

    def unavailable(self) -> str | None:
        """Return why it cannot be built on this machine, or None."""
        if not sys.platform.startswith("linux"):
            return f"opkit builds native kernels on Linux, this is {sys.platform}"
        used = self._compiled_by()
        if used.find() is None:
            return used.why_none()
        if compilers.find_cxx() is None:  # it links, and nvcc needs it too
            return compilers.why_no_cxx()
        return None

    def is_carried(self, schema: Schema, plan: Plan | None, backend: str) -> bool:
        """Whether the package brings the kernel along compiled, so that it needs no compiler here."""
        if self.path is None or not (self.path.parent / prebuilt.FOLDER).is_dir():
            return False
        try:
            job = self.job(schema, plan, backend)
        except BuildError:  # without a compiler, the aten tier cannot say what it builds
            return False
        return isinstance(job, Job) and job.prebuilt() is not None

    def _compiled_by(self) -> Toolchain:
        """Return the toolchain; where it is nvcc, which is not there, NVRTC for a light kernel."""
        if self.toolchain is not toolchains.CUDA or toolchains.CUDA.find() or not nvrtc.TOOLCHAIN.find():
            return self.toolchain
        return nvrtc.TOOLCHAIN if self._tier() == tiers.LIGHT else self.toolchain

    def _tier(self) -> str:
        return self.tier or tiers.infer(self._spellings())

    def job(self, schema: Schema, plan: Plan | None, backend: str) -> Job | _aten.Job:
        """Return what is to be built for an op.

        Raises:
            BuildError: the source cannot become a kernel of the op.
        """
        symbol, label = self.symbol or schema.symbol, f"{schema.name} [{backend}]"
        text = f'#include "{self.path}"' if self.path else f'#line {self.line} "{self.place}"\n{self.text}'
        spellings = self._spellings()
        used = self.tier or tiers.infer(spellings)
        if tiers.TIERS.index(used) < tiers.TIERS.index(tiers.infer(spellings)):
            raise BuildError(
                f"building {label}: it is said to be of the {used} tier and includes headers of the "
                f"{tiers.infer(spellings)} tier; expected only headers of its own. Leave tier= out.",
                op=schema.name,
            )
        if used != tiers.LIGHT:
            _boxed.refuse_registrations(self._read(), schema)
        if used == tiers.ATEN:
            return _aten.Job.of_kernel(
                _boxed.aten_unit(text, symbol, schema),
                op=schema.name,
                backend=backend,
                with_cuda=self.toolchain is toolchains.CUDA,
                extra_cflags=self.extra_cflags,
                extra_cuda_cflags=self.extra_cuda_cflags,
                extra_ldflags=self.extra_ldflags,
                extra_include_paths=self.extra_include_paths,
            )
        if used == tiers.STABLE:
            unit = _boxed.stable_unit(text, symbol, schema)
        else:
            unit = _glue.unit_source(
                text, symbol, schema, plan, prelude=self.toolchain.prelude, guard=self.toolchain.guard
            )
        meaning = (
            f"{self.text or ''}\n// {schema} {plan and plan.meaning} {symbol} {used} {self.toolchain.guard}"
        )
        return Job(
            label=label,
            units=(Unit(f"unit{self.toolchain.suffixes[0]}", unit, self._compiled_by(), meaning),),
            op=schema.name,
            tier=used,
            include_paths=self.extra_include_paths,
            cflags=self.extra_cflags,
            cuda_cflags=self.extra_cuda_cflags,
            ldflags=self.extra_ldflags,
            carried=self.path.parent / prebuilt.FOLDER if self.path else None,
            spellings=frozenset({*spellings, "opkit/glue.h"}),
        )

    def build(self, schema: Schema, plan: Plan | None, backend: str) -> Path:
        """Compile the kernel with its glue for an op, and return the library's path."""
        return self._library(self.job(schema, plan, backend), schema)

    def find(self, schema: Schema, plan: Plan | None, backend: str) -> Path | None:
        """Return the library if it need not be built: the package's own, or one in a cache."""
        job = self.job(schema, plan, backend)
        carried = job.prebuilt() if isinstance(job, Job) else None
        return carried or cache.find(f"{cache.slug(job.label)}-{job.key()}")

    def _library(self, job: Job | _aten.Job, schema: Schema) -> Path:
        try:
            return job.library()
        except BuildError as err:
            if any(d.file.startswith("opkit glue") for d in err.diagnostics):
                symbol, used = self.symbol or schema.symbol, job.tier
                form = (
                    _glue.signature(symbol, schema)
                    if used == tiers.LIGHT
                    else _boxed.signature(symbol, schema, used)
                )
                raise BuildError(
                    f"{err}\nThe kernel must be a function of this form:\n    {form}",
                    op=schema.name,
                    diagnostics=err.diagnostics,
                    log_path=err.log_path,
                    command=err.command,
                ) from None
            raise

    def bind(
        self,
        schema: Schema,
        plan: Plan | None,
        device: str,
        metas: Callable[[Sequence[Any]], tuple[Sequence[OutputMeta], torch.device | None]],
        backend: str,
    ) -> Bound:
        """Return the built kernel, ready to be called; `metas` describes outputs without a plan."""
        job = self.job(schema, plan, backend)
        allocates = job.tier != tiers.LIGHT
        library = register(
            self._library(job, schema),
            schema,
            device,
            with_outputs=plan is None and not allocates,
            unload=job.tier == tiers.LIGHT and self.toolchain is toolchains.CPP and not self.extra_ldflags,
        )
        call = library.call
        if plan is not None or allocates or not schema.results:
            return Bound(call, allocates, library)

        def with_metas(*values: Any) -> Any:
            described, common = metas(values)
            outputs = [
                [_allocate(one, common) for one in m] if isinstance(m, list) else _allocate(m, common)
                for m in described
            ]
            call(*values, *outputs)
            return schema.raw(outputs)

        return Bound(with_metas, allocates, library)

    def _spellings(self) -> set[str]:
        """Return what the source includes, and what the user's headers that it includes do."""
        scan = _includes.Scan([*self.extra_include_paths, *_includes.include_folders(self.extra_cflags)])
        if self.path and self.path.is_file():
            scan.add_file(self.path, self.path.name)
        elif self.text:
            scan.add_text(self.text, "text")
        return scan.spellings

    def _read(self) -> str:
        if self.text is not None:
            return self.text
        assert self.path is not None
        return self.path.read_text(errors="replace") if self.path.is_file() else ""


def _allocate(meta: OutputMeta, device: torch.device | None) -> torch.Tensor:
    return torch.empty_strided(meta.shape, meta.stride or (), dtype=meta.dtype, device=meta.device or device)


class Bound(NamedTuple):
    """A kernel that is built and loaded."""

    call: Callable[..., Any]
    """Takes all arguments in schema order."""
    allocates: bool
    """Whether the outputs are the kernel's own, and so to be checked."""
    library: Loaded
    """Keeps the library loaded."""


def kernel(
    source: str | Path,
    *,
    symbol: str | None = None,
    extra_cflags: Sequence[str] = (),
    extra_cuda_cflags: Sequence[str] = (),
    extra_ldflags: Sequence[str] = (),
    extra_include_paths: Sequence[str | Path] = (),
    cuda: bool | None = None,
    tier: str | None = None,
    toolchain: str | None = None,
) -> Source:
    """Name native source as a kernel for `Op.register_kernel`; it is compiled on first use.

    The function is called like the op without its namespace. One that includes only `opkit/kernel.h`, in
    the light tier, takes the inputs in schema order and then the outputs. One that includes headers of torch
    takes tensors and returns tensors, of torch's stable ABI or of ATen.

    Args:
        source: a path, relative to the calling file, or the source text itself.
        symbol: name of the C++ function, where it is not the op's.
        extra_cflags: more flags for the C++ compiler, after `-O3`.
        extra_cuda_cflags: more flags for nvcc.
        extra_ldflags: more flags for the linker.
        extra_include_paths: folders for `#include`, relative to the calling file.
        cuda: whether nvcc compiles it; by default where the path ends in `.cu`.
        tier: `light`, `stable` or `aten`; by default what the source includes tells.
        toolchain: the name of the toolchain that compiles source text, `cpp` or `cuda` or a plugin's;
            a file's suffix tells it.

    Raises:
        BuildError: the file does not exist, or no toolchain has its suffix; or an argument is of the wrong
            kind.

    Example:
        >>> import opkit, torch
        >>> @opkit.op("doc::twice", shapes="*b -> *b")
        ... def twice(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> twice.register_kernel("cpu", opkit.cpp.kernel('''
        ... #include <opkit/kernel.h>
        ... void twice(opkit::Tensor x, opkit::Tensor y) {
        ...   OPKIT_CHECK(x.is_contiguous(), "x is not contiguous");
        ...   for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = 2 * x.data<float>()[i];
        ... }
        ... '''))  # doctest: +ELLIPSIS
        Source(...)
        >>> twice(torch.ones(3))
        tensor([2., 2., 2.])
    """
    frame = sys._getframe(1)

    def here() -> Path:
        return Path(frame.f_globals.get("__file__") or "unnamed").absolute().parent

    doing = "naming a kernel"
    options: dict[str, Any] = {
        "extra_cflags": _arguments.flags(doing, "extra_cflags", extra_cflags),
        "extra_cuda_cflags": _arguments.flags(doing, "extra_cuda_cflags", extra_cuda_cflags),
        "extra_ldflags": _arguments.flags(doing, "extra_ldflags", extra_ldflags),
        "extra_include_paths": tuple(
            (here() / folder).resolve()
            for folder in _arguments.folders(doing, "extra_include_paths", extra_include_paths)
        ),
    }
    tiers.check(doing, tier)
    if not isinstance(source, (str, Path)) or not str(source).strip():
        raise BuildError(
            f"naming a kernel: its source is {source!r}; expected a path to C++ or CUDA source, or the source "
            "text itself. Pass one of them as a str, or a path as a Path."
        )
    if isinstance(source, str) and ("\n" in source or "{" in source):
        file, number = frame.f_code.co_filename, frame.f_lineno
        place, line = _place(source, file, number)
        where = f"source at {file}:{number}"
        compiled_by = _named_toolchain(toolchain or ("cuda" if cuda else "cpp"))
        return Source(None, source, symbol, compiled_by, where, place, line, tier, **options)
    path = here() / source
    if not path.is_file():
        raise BuildError(
            f"naming a kernel: there is no file {path}; expected C++ or CUDA source. Paths are relative to the "
            "file that calls opkit.cpp.kernel; source text itself is told by a newline or a brace in it."
        )
    found = toolchains.for_suffix(path.suffix)
    if found is None:
        raise BuildError(
            f"naming a kernel: {path} has the suffix {path.suffix!r}; expected one of "
            f"{', '.join(toolchains.suffixes())}. Name the C++ or CUDA source itself."
        )
    path = Path(os.path.abspath(path))  # not resolved: a link may come to lead elsewhere
    if '"' in str(path) or not str(path).isprintable() or not _is_utf8(path):
        raise BuildError(
            f"naming a kernel: the path {str(path)!r} has letters that no #include takes; expected printable ones "
            "without quotation marks. Rename the file or its folder."
        )
    if toolchain is not None or cuda is not None:
        found = _named_toolchain(toolchain or ("cuda" if cuda else "cpp"))
    return Source(path, None, symbol, found, str(path), str(path), 1, tier, **options)


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _occurrences(text: bytes, content: bytes) -> Iterator[int]:
    at = content.find(text)
    while at >= 0:
        yield at
        at = content.find(text, at + len(text))


def _named_toolchain(name: str) -> Toolchain:
    if found := toolchains.find(name):
        return found
    known = toolchains.names()
    raise BuildError(
        f"naming a kernel: found toolchain={name!r}; expected one of {', '.join(known)}."
        f"{did_you_mean(name, known)} Install the plugin that registers it, or name another."
    )


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as stream:
            return stream.read()
    except OSError:
        return b""


def _place(text: str, file: str, number: int) -> tuple[str, int]:
    """Return the file and the line where `text`, which is used at line `number` of `file`, is written.

    Where it stands nowhere (a prompt, a text put together), a readable name and 1.
    """
    path = os.path.abspath(file)
    if os.path.isfile(path) and not _UNREADABLE.search(path):
        content = _read(path).replace(b"\r\n", b"\n")
        written = text.encode(errors="replace")
        found = [content.count(b"\n", 0, at) + 1 for at in _occurrences(written, content)]
        if found:  # the same text may be there twice
            return path, min(found, key=lambda line: (line < number, abs(line - number)))
    return f"{_UNREADABLE.sub(' ', Path(file).name).strip()}, kernel at line {number}", 1
