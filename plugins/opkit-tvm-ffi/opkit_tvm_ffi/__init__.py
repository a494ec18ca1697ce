"""opkit-tvm-ffi: CPU kernels for ops of opkit, in C++ over tvm-ffi, which link neither torch nor Python.

`opkit-plugin.toml` beside this file says which there are, and names the functions here. opkit calls one of them when
its kernel is selected; only then tvm-ffi is imported, and the library with the kernel compiled or found in opkit's
cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward"]


def rms_norm() -> Callable[..., Any]:
    """Return the kernel of `opkit::rms_norm`."""
    from opkit_tvm_ffi import kernels

    return kernels.rms_norm()


def rms_norm_backward() -> Callable[..., Any]:
    """Return the kernel of `opkit::rms_norm_backward`."""
    from opkit_tvm_ffi import kernels

    return kernels.rms_norm_backward()


def swiglu() -> Callable[..., Any]:
    """Return the kernel of `opkit::swiglu`."""
    from opkit_tvm_ffi import kernels

    return kernels.swiglu()


def swiglu_backward() -> Callable[..., Any]:
    """Return the kernel of `opkit::swiglu_backward`."""
    from opkit_tvm_ffi import kernels

    return kernels.swiglu_backward()
