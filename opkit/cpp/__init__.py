"""How native code is built: kernels for ops, and extensions with torch's headers.

    import opkit.cpp

    SOURCE = '''
    #include <torch/library.h>
    int64_t twice(int64_t n) { return 2 * n; }
    TORCH_LIBRARY(arithmetic, m) { m.def("twice(int n) -> int", &twice); }
    '''
    opkit.cpp.load("arithmetic", SOURCE, is_python_module=False)    # built once, then found by its content
    assert torch.ops.arithmetic.twice(21) == 42

    rms_norm.register_kernel("cpu", opkit.cpp.kernel("rms_norm.cpp"), backend="cpp")

Importing this compiles nothing and looks for no compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opkit.cpp.extension import build as build
    from opkit.cpp.extension import load as load
    from opkit.cpp.extension import load_inline as load_inline
    from opkit.cpp.light import kernel as kernel
    from opkit.cpp.toolchain import Toolchain as Toolchain
    from opkit.cpp.toolchain import register as register_toolchain

# Loaded when used, as `opkit.cpp.setuptools` is imported where there is no torch.
_LAZY = {
    "Toolchain": ("toolchain", "Toolchain"),
    "build": ("extension", "build"),
    "kernel": ("light", "kernel"),
    "load": ("extension", "load"),
    "load_inline": ("extension", "load_inline"),
    "register_toolchain": ("toolchain", "register"),
}

__all__ = ["Toolchain", "build", "kernel", "load", "load_inline", "register_toolchain"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'opkit.cpp' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(importlib.import_module(f"opkit.cpp.{module}"), attribute)
    globals()[name] = value
    return value
