"""opkit-triton: ops with kernels in Triton. The manifest beside this file says which, and where the kernels are.

opkit calls `register` when one of the ops is first asked for. Triton is imported when a kernel is selected, which
happens on CUDA alone; elsewhere the ops run their references.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opkit.plugins import Registry

__all__ = ["register"]


def register(registry: Registry) -> None:
    """Declare the ops.

    Example:
        >>> import torch, opkit
        >>> opkit.get("opkit_triton::scaled_softmax")(torch.tensor([[0.0, 0.0]]), 0.5)
        tensor([[0.5000, 0.5000]])
    """
    from opkit_triton import ops

    ops.declare(registry)
