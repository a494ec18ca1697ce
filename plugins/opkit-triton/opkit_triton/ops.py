"""The ops: a softmax of scaled numbers, as attention takes it of its scores, and its gradient.

    y = softmax(scale x)        grad_x = scale y (grad_y - sum(grad_y y)), the sum over the last dimension

In one pass instead of two, as in Megatron-LM's fused kernel (Shoeybi et al., 2019, arXiv:1909.08053). Computed in
float32, or in float64 where x is float64, and rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import opkit

if TYPE_CHECKING:
    from opkit.plugins import Registry


def declare(registry: Registry) -> None:
    """Declare the ops with their shapes, references and gradients."""

    @registry.op("opkit_triton::scaled_softmax", shapes="*b n -> *b n:x")
    def scaled_softmax(x: Tensor, scale: float = 1.0) -> Tensor:
        """Return softmax(scale x) over the last dimension."""
        return (x.to(_wide(x)) * scale).softmax(-1).to(x.dtype)

    @registry.op("opkit_triton::scaled_softmax_backward", shapes="*b n:y, *b n -> *b n:y")
    def scaled_softmax_backward(grad_y: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """Return the gradient of scaled_softmax for x, from its result y."""
        weighted = grad_y.to(_wide(y)) * y.to(_wide(y))
        return ((weighted - y * weighted.sum(-1, keepdim=True)) * scale).to(y.dtype)

    scaled_softmax.register_autograd(scaled_softmax_backward, saves=("out", "scale"))
    scaled_softmax.register_jvp(opkit.from_reference)
    scaled_softmax_backward.register_autograd(opkit.from_reference)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
