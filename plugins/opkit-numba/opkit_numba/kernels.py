"""The kernels: tensors in, arrays through the loops of `_compiled`, tensors out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opkit_numba import _compiled

if TYPE_CHECKING:
    import numpy


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y = x rstd weight and rstd = 1 / sqrt(mean(x^2) + eps), row by row."""
    y = torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    shape = (rstd.numel(), x.shape[-1])
    _compiled.rms_norm(
        _array(x, x.dtype).reshape(shape),
        _array(weight, x.dtype),
        eps,
        y.numpy().reshape(shape),
        rstd.numpy().reshape(-1),
    )
    return y, rstd


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """grad_x = rstd (g w - xhat mean(g w xhat)) and grad_weight = sum over rows of g xhat, with xhat = x rstd."""
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grad_weight = torch.zeros(weight.shape, dtype=torch.float64)
    n = x.shape[-1]
    shape = (x.numel() // n if n else 0, n)
    _compiled.rms_norm_backward(
        _array(grad_y, x.dtype).reshape(shape),
        _array(x, x.dtype).reshape(shape),
        _array(weight, x.dtype),
        eps,
        grad_x.numpy().reshape(shape),
        grad_weight.numpy(),
    )
    return grad_x, grad_weight.to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = gate sigmoid(gate) up, element by element."""
    y = torch.empty(gate.shape, dtype=gate.dtype)
    _compiled.swiglu(_flat(gate), _flat(up), y.numpy().reshape(-1))
    return y


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """grad_gate = grad_y up s (1 + gate (1 - s)) and grad_up = grad_y gate s, with s = sigmoid(gate)."""
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype)
    grad_up = torch.empty(gate.shape, dtype=gate.dtype)
    _compiled.swiglu_backward(
        _flat(grad_y), _flat(gate), _flat(up), grad_gate.numpy().reshape(-1), grad_up.numpy().reshape(-1)
    )
    return grad_gate, grad_up


def _array(tensor: Tensor, dtype: torch.dtype) -> numpy.ndarray:
    """Return a contiguous array, without a copy where the tensor is one of this dtype.

    numba compiles anew for every layout, so strided tensors are copied. numpy takes neither tensors that
    require grad nor lazy negations, which a caller may have around torch's dispatcher.
    """
    return tensor.detach().resolve_neg().to(dtype).contiguous().numpy()


def _flat(tensor: Tensor) -> numpy.ndarray:
    return _array(tensor, tensor.dtype).reshape(-1)
