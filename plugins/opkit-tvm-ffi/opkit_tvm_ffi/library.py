"""The libraries with the kernels: built from `csrc` into opkit's cache, one a source, and opened by tvm-ffi.

They are linked with libtvm_ffi alone. What they need of a tensor comes with the call, as DLPack describes it, so one
library serves every torch and every Python.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tvm_ffi

import opkit

_SOURCES = Path(__file__).parent / "csrc"


def build(name: str) -> Path:
    """Compile `csrc/<name>.cpp` if its content is new, and return the library's path.

    Raises:
        BuildError: it does not compile, or there is no compiler.
    """
    folder = Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent
    return opkit.cpp.build(
        f"opkit_tvm_ffi_{name}",
        _SOURCES / f"{name}.cpp",
        extra_include_paths=[_SOURCES, *tvm_ffi.libinfo.include_paths()],
        extra_ldflags=[f"-L{folder}", "-ltvm_ffi"],  # open in every process that has imported tvm_ffi
    )


@functools.cache
def load(name: str) -> Any:
    """Return the module with the functions that `csrc/<name>.cpp` exports."""
    return tvm_ffi.load_module(build(name))
