"""Notebooks: cells of C++ and CUDA that become kernels of ops.

    %load_ext opkit

    %%opkit_cpp demo::scale --dtypes float32
    #include <opkit/kernel.h>
    void scale(opkit::Tensor x, opkit::Tensor factor, opkit::Tensor y) { … }

The cell is compiled when it is run, and run again after an edit it takes its own place. How ops, explanations and
reports look in a notebook is theirs to say, in `_repr_html_`. Importing this imports no IPython.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["load_ipython_extension"]


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Add the cell magics `%%opkit_cpp` and `%%opkit_cuda`; IPython calls it for `%load_ext opkit`."""
    from opkit.notebook import _magics

    shell.register_magics(_magics.Kernels)
