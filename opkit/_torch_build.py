"""What opkit uses of torch's private build machinery, and nothing else.

Stands on torch/utils/cpp_extension.py of torch 2.13, and runs on 2.11 and 2.15. Keyword arguments are
filtered by each function's signature, because `with_sycl` and `extra_sycl_cflags` came in 2.7 and
what follows them is not announced. Drop this module when torch has a public function that
writes a build file without building.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opkit.errors import BuildError

_patching = threading.Lock()


def write_build_file(
    folder: Path,
    *,
    name: str,
    sources: Sequence[Path],
    cxx: Sequence[str],
    launchers: Sequence[str],
    extra_cflags: Sequence[str],
    extra_cuda_cflags: Sequence[str],
    extra_ldflags: Sequence[str],
    extra_include_paths: Sequence[Path],
    cuda_home: Path | None,
) -> None:
    """Write `build.ninja` in `folder`, which builds `<name>.so` there as torch would.

    torch runs ninja itself in `_write_ninja_file_and_build_library`; the two steps before that are
    called here instead, because that one throws the compiler's output away where the build succeeds
    and prints to file descriptor 1 where it is verbose.
    """
    try:
        from torch.utils import cpp_extension
    except ImportError as error:  # it imports setuptools, which torch does not require everywhere
        raise BuildError(
            f"building {name}: torch.utils.cpp_extension does not import ({error}); expected setuptools "
            "beside torch. Install it: pip install setuptools."
        ) from error
    with _cuda_home(cpp_extension, cuda_home):
        with_cuda = cuda_home is not None
        ldflags = _call(
            cpp_extension._prepare_ldflags,
            extra_ldflags=list(extra_ldflags),  # torch appends to it
            with_cuda=with_cuda,
            with_sycl=False,
            verbose=False,
            is_standalone=False,
        )
        _call(
            cpp_extension._write_ninja_file_to_build_library,
            path=str(folder / "build.ninja"),
            name=name,
            sources=[str(path) for path in sources],
            extra_cflags=list(extra_cflags),
            extra_cuda_cflags=list(extra_cuda_cflags),
            extra_sycl_cflags=[],
            extra_ldflags=ldflags,
            extra_include_paths=[str(path) for path in extra_include_paths],
            with_cuda=with_cuda,
            with_sycl=False,
            is_standalone=False,
        )
    _set_compiler(folder / "build.ninja", cxx, launchers)


def cflags(build_file: Path) -> list[str]:
    """Return the words of the C++ compiler's flags."""
    found = re.search(r"^cflags = (.*)$", build_file.read_text(), re.MULTILINE)
    return shlex.split(found[1].replace("$$", "$")) if found else []


def search_first(build_file: Path, folder: Path) -> None:
    """Make the compilers look for headers in `folder` before anywhere else."""
    flag = shlex.quote(f"-I{folder}").replace("$", "$$")
    text = build_file.read_text()
    text = re.sub(r"^(cflags|cuda_cflags) =", lambda found: f"{found[0]} {flag}", text, flags=re.MULTILINE)
    build_file.write_text(text)


def _call(function: Callable[..., Any], **kwargs: Any) -> Any:
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in kwargs.items() if name in known})


@contextlib.contextmanager
def _cuda_home(cpp_extension: Any, home: Path | None) -> Iterator[None]:
    """Let torch know of the CUDA toolkit: a torch for the CPU sets CUDA_HOME to None (2.13, line 359)."""
    if home is None or cpp_extension.CUDA_HOME:
        yield
        return
    with _patching:
        before = cpp_extension.CUDA_HOME
        cpp_extension.CUDA_HOME = str(home)
        try:
            yield
        finally:
            cpp_extension.CUDA_HOME = before


def _set_compiler(build_file: Path, cxx: Sequence[str], launchers: Sequence[str]) -> None:
    """Build with `cxx`: torch takes `c++` where $CXX is unset, and CXX="ccache g++" as one word (2.13)."""

    def line(found: re.Match[str]) -> str:
        words = shlex.split(found[1])
        launcher = words[:1] if Path(words[0]).name in launchers and len(cxx) == 1 else []
        return f"cxx = {shlex.join([*launcher, *cxx])}"

    text = build_file.read_text()
    build_file.write_text(re.sub(r"^cxx = (.+)$", line, text, count=1, flags=re.MULTILINE))
