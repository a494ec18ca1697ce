"""opkit::vector_add: the smallest op, to copy from.

    y = a + b

The three things that every op has are below: what it computes (the reference), how gradients pass
through it, and kernels that compute the same faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files


@opkit.op("opkit::vector_add", shapes="*b, *b:a -> *b:a")
def vector_add(a: Tensor, b: Tensor) -> Tensor:
    """Add two tensors of one shape and dtype, element by element.

    Nothing broadcasts. The native kernels take float32, float64 and bfloat16, on CUDA also float16, with any
    strides; the reference takes every dtype that torch adds.

    Raises:
        ShapeError: a and b have different shapes.
        DtypeError: a and b have different dtypes.

    Example:
        >>> import torch, opkit_kernels
        >>> opkit_kernels.vector_add(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
        tensor([4., 6.])
    """
    return a + b


@vector_add.register_autograd
def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a and b: that of y, as y = a + b."""
    return grad, grad


vector_add.register_jvp(opkit.from_reference)

# On the CPU, float16 is left to the reference: torch converts it with an instruction that no loop here gets.
register_files(vector_add, cpu_dtypes=(torch.float32, torch.float64, torch.bfloat16))
