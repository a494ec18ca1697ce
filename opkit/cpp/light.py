"""The light tier: a plain C++ or CUDA function becomes a kernel of an op.

`kernel(...)` only remembers the source. `Source.bind` writes boxed glue from the schema and the shape
line, compiles both as one unit, and registers the entry point with torch.
"""

from __future__ import annotations

import dataclasses
import linecache
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from opkit.cpp import _arguments, toolchain
from opkit.cpp._glue import signature, unit_source
from opkit.cpp._native import register
from opkit.cpp.compile import shared_library
from opkit.errors import BuildError
from opkit.spec.plan import OutputMeta, Plan
from opkit.spec.schema import Schema

_SUFFIXES = (".cpp", ".cc", ".cxx", ".c", ".cu")
# In the name of a file these end what compilers' messages are parsed for, or the string after #line.
_UNREADABLE = re.compile(r'[:()"\\\x00-\x1f]')


@dataclasses.dataclass(frozen=True)
class Source:
    """Native source that becomes a kernel when an op first needs it. Made by `opkit.cpp.kernel`."""

    path: Path | None
    text: str | None
    symbol: str | None
    cuda: bool
    where: str
    place: str
    """What the compiler calls source text; without the colons and parentheses that its messages use."""
    line: int = 1
    """The line of `place` where source text begins."""
    extra_cflags: tuple[str, ...] = ()
    extra_cuda_cflags: tuple[str, ...] = ()
    extra_ldflags: tuple[str, ...] = ()
    extra_include_paths: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return self.where

    @property
    def backend(self) -> str:
        """The backend that such source is registered under when nothing else is said."""
        return "cuda" if self.cuda else "cpp"

    def unavailable(self) -> str | None:
        """Return why it cannot be built on this machine, or None."""
        if not sys.platform.startswith("linux"):
            return f"opkit builds native kernels on Linux, this is {sys.platform}"
        if self.cuda and toolchain.find_nvcc() is None:
            return toolchain.why_no_nvcc()
        if toolchain.find_cxx() is None:  # nvcc needs it too
            return toolchain.why_no_cxx()
        return None

    def build(self, schema: Schema, plan: Plan | None, backend: str) -> Path:
        """Compile the kernel with its glue for an op, and return the library's path."""
        text = f'#include "{self.path}"' if self.path else f'#line {self.line} "{self.place}"\n{self.text}'
        unit = unit_source(text, self.symbol or schema.opname, schema, plan, cuda=self.cuda)
        try:
            return shared_library(
                unit,
                label=f"{schema.name} [{backend}]",
                op=schema.name,
                cuda=self.cuda,
                include_paths=self.extra_include_paths,
                extra_cflags=self.extra_cflags,
                extra_cuda_cflags=self.extra_cuda_cflags,
                extra_ldflags=self.extra_ldflags,
            )
        except BuildError as err:
            if any(d.file.startswith("opkit glue") for d in err.diagnostics):
                form = signature(self.symbol or schema.opname, schema)
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
    ) -> Callable[..., Any]:
        """Return the built kernel as a function of all arguments; `metas` describes outputs without a plan."""
        call = register(self.build(schema, plan, backend), schema, device, with_outputs=plan is None)
        if plan is not None or not schema.results:
            return call

        def with_metas(*values: Any) -> Any:
            described, common = metas(values)
            outputs = [
                torch.empty_strided(m.shape, m.stride or (), dtype=m.dtype, device=m.device or common)
                for m in described
            ]
            call(*values, *outputs)
            return schema.raw(outputs)

        return with_metas


def kernel(
    source: str | Path,
    *,
    symbol: str | None = None,
    extra_cflags: Sequence[str] = (),
    extra_cuda_cflags: Sequence[str] = (),
    extra_ldflags: Sequence[str] = (),
    extra_include_paths: Sequence[str | Path] = (),
    cuda: bool | None = None,
) -> Source:
    """Name native source as a kernel for `Op.register_kernel`; it is compiled on first use.

    The function is called like the op without its namespace, takes the inputs in schema order and
    then the outputs, and includes only `opkit/kernel.h`.

    Args:
        source: a path, relative to the calling file, or the source text itself.
        symbol: name of the C++ function, where it is not the op's.
        extra_cflags: more flags for the C++ compiler, after `-O3`.
        extra_cuda_cflags: more flags for nvcc.
        extra_ldflags: more flags for the linker.
        extra_include_paths: folders for `#include`, relative to the calling file.
        cuda: whether nvcc compiles it; by default where the path ends in `.cu`.

    Raises:
        BuildError: the file does not exist, or is not C++ or CUDA source by its suffix; or an argument is
            of the wrong kind.

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
    here = Path(frame.f_globals.get("__file__") or "unnamed").absolute().parent
    doing = "naming a kernel"
    options: dict[str, Any] = {
        "extra_cflags": _arguments.flags(doing, "extra_cflags", extra_cflags),
        "extra_cuda_cflags": _arguments.flags(doing, "extra_cuda_cflags", extra_cuda_cflags),
        "extra_ldflags": _arguments.flags(doing, "extra_ldflags", extra_ldflags),
        "extra_include_paths": tuple(
            (here / folder).resolve()
            for folder in _arguments.folders(doing, "extra_include_paths", extra_include_paths)
        ),
    }
    if not isinstance(source, (str, Path)) or not str(source).strip():
        raise BuildError(
            f"naming a kernel: its source is {source!r}; expected a path to C++ or CUDA source, or the source "
            "text itself. Pass one of them as a str, or a path as a Path."
        )
    if isinstance(source, str) and ("\n" in source or "{" in source):
        file, number = frame.f_code.co_filename, frame.f_lineno
        place, line = _place(source, file, number)
        where = f"source at {file}:{number}"
        return Source(None, source, symbol, bool(cuda), where, place, line, **options)
    path = here / source
    if not path.is_file():
        raise BuildError(
            f"naming a kernel: there is no file {path}; expected C++ or CUDA source. Paths are relative to the "
            "file that calls opkit.cpp.kernel; source text itself is told by a newline or a brace in it."
        )
    if path.suffix not in _SUFFIXES:
        raise BuildError(
            f"naming a kernel: {path} has the suffix {path.suffix!r}; expected one of {', '.join(_SUFFIXES)}. "
            "Name the C++ or CUDA source itself."
        )
    path = path.resolve()
    is_cuda = path.suffix == ".cu" if cuda is None else cuda
    return Source(path, None, symbol, is_cuda, str(path), str(path), **options)


def _place(text: str, file: str, number: int) -> tuple[str, int]:
    """Return the file and the line where `text`, which is used at line `number` of `file`, is written.

    Where it stands nowhere (a prompt, a text put together), a readable name and 1.
    """
    path = os.path.abspath(file)
    if os.path.isfile(path) and not _UNREADABLE.search(path):
        linecache.checkcache(path)
        content = "".join(linecache.getlines(path))
        found = [content.count("\n", 0, m.start()) + 1 for m in re.finditer(re.escape(text), content)]
        if found:  # the same text may be there twice
            return path, min(found, key=lambda line: (line < number, abs(line - number)))
    return f"{_UNREADABLE.sub(' ', Path(file).name).strip()}, kernel at line {number}", 1
