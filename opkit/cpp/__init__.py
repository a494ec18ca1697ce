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

from opkit.cpp.extension import build as build
from opkit.cpp.extension import load as load
from opkit.cpp.extension import load_inline as load_inline
from opkit.cpp.light import kernel as kernel

__all__ = ["build", "kernel", "load", "load_inline"]
