"""opkit::swiglu and its gradient, opkit::swiglu_backward.

    y = silu(gate) up        silu(gate) = gate sigmoid(gate)

The gated unit of Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, without its three
matrix products: gate = x W, up = x V, and y goes into the product with W2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating


class SwiGLUGradients(NamedTuple):
    """What swiglu_backward returns."""

    gate: Tensor
    up: Tensor


@opkit.op("opkit::swiglu", shapes="*b, *b:gate -> *b:gate")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply up by silu(gate), element by element.

    Computed in float32, or in float64 where gate is float64, and rounded once. Nothing broadcasts. Any
    strides: gate and up may be the halves of one tensor.

    Raises:
        ShapeError: gate and up have different shapes.
        DtypeError: gate and up have different dtypes, or are not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> gate, up = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).chunk(2, -1)
        >>> opkit_kernels.swiglu(gate, up)
        tensor([[0.0000, 2.1932]])
    """
    require_floating("opkit::swiglu", gate=gate)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@opkit.op("opkit::swiglu_backward", shapes="*b:gate, *b, *b:gate -> *b:gate, *b:gate")
def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> SwiGLUGradients:
    """Return the gradients of swiglu for gate and up.

    With s = sigmoid(gate): grad_gate = grad_y up s (1 + gate (1 - s)) and grad_up = grad_y gate s.

    Raises:
        ShapeError: the shapes differ.
        DtypeError: the dtypes differ, or are not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> opkit_kernels.swiglu_backward(torch.ones(1), torch.zeros(1), torch.ones(1))
        SwiGLUGradients(gate=tensor([0.5000]), up=tensor([0.]))
    """
    require_floating("opkit::swiglu_backward", gate=gate)
    wide = torch.promote_types(gate.dtype, torch.float32)
    grad_wide, gate_wide, up_wide = grad_y.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(gate_wide)
    grad_gate = grad_wide * up_wide * s * (1 + gate_wide * (1 - s))
    grad_up = grad_wide * gate_wide * s
    return SwiGLUGradients(grad_gate.to(gate.dtype), grad_up.to(gate.dtype))


swiglu.register_autograd(swiglu_backward, saves=("gate", "up"))
swiglu_backward.register_autograd(opkit.from_reference)
swiglu.register_jvp(opkit.from_reference)

for _op in (swiglu, swiglu_backward):
    register_files(_op)
