"""opkit::geglu and its gradient, opkit::geglu_backward.

    y = gelu(gate) up        gelu(gate) = gate sigmoid(2 u)        u = sqrt(2 / pi) (gate + 0.044715 gate^3)

The gated unit of Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, without its three
matrix products: gate = x W, up = x V, and y goes into the product with W2.

Of the two functions called GELU (Hendrycks and Gimpel, arXiv:1606.08415) it is the approximation, which
torch.nn.functional.gelu computes with approximate="tanh": language models that have this unit, T5 1.1 and
Gemma among them, were trained with it. 1 + tanh(u) is written as 2 sigmoid(2 u), which is the same number
and does not cancel where gate is negative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating

_SCALE = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715


class GEGLUGradients(NamedTuple):
    """What geglu_backward returns."""

    gate: Tensor
    up: Tensor


@opkit.op("opkit::geglu", shapes="*b, *b:gate -> *b:gate")
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply up by gelu(gate), element by element, with GELU's tanh approximation.

    Computed in float32, or in float64 where gate is float64, and rounded once. Nothing broadcasts. Any
    strides: gate and up may be the halves of one tensor.

    Raises:
        ShapeError: gate and up have different shapes.
        DtypeError: gate and up have different dtypes, or are not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> gate, up = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).chunk(2, -1)
        >>> opkit_kernels.geglu(gate, up)
        tensor([[0.0000, 2.5236]])
    """
    require_floating("opkit::geglu", gate=gate)
    wide = torch.promote_types(gate.dtype, torch.float32)
    x = gate.to(wide)
    return (x * torch.sigmoid(_SCALE * (x + _CUBIC * x * x * x)) * up.to(wide)).to(gate.dtype)


@opkit.op("opkit::geglu_backward", shapes="*b:gate, *b, *b:gate -> *b:gate, *b:gate")
def geglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> GEGLUGradients:
    """Return the gradients of geglu for gate and up.

    With s = sigmoid(2 u): grad_gate = grad_y up (s + gate s (1 - s) 2 u'(gate)) and grad_up = grad_y gate s.

    Raises:
        ShapeError: the shapes differ.
        DtypeError: the dtypes differ, or are not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> opkit_kernels.geglu_backward(torch.ones(1), torch.zeros(1), torch.ones(1))
        GEGLUGradients(gate=tensor([0.5000]), up=tensor([0.]))
    """
    require_floating("opkit::geglu_backward", gate=gate)
    wide = torch.promote_types(gate.dtype, torch.float32)
    grad_wide, x, up_wide = grad_y.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(_SCALE * (x + _CUBIC * x * x * x))
    slope = s + x * s * (1 - s) * (_SCALE * (1 + 3 * _CUBIC * x * x))
    return GEGLUGradients((grad_wide * up_wide * slope).to(gate.dtype), (grad_wide * x * s).to(gate.dtype))


geglu.register_autograd(geglu_backward, saves=("gate", "up"))
geglu_backward.register_autograd(opkit.from_reference)
geglu.register_jvp(opkit.from_reference)

for _op in (geglu, geglu_backward):
    register_files(_op)
