"""The kernels: outputs allocated by torch, then a function of a library over all tensors.

tvm-ffi takes torch's tensors as they are, through the exchange table of DLPack that `torch.Tensor` has, and lets the
GIL go meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opkit_tvm_ffi import library

Pair = tuple[Tensor, Tensor]


def rms_norm() -> Callable[..., Pair]:
    """Return y = x rstd weight and rstd = 1 / sqrt(mean(x^2) + eps), row by row."""
    function = library.load("rms_norm").rms_norm

    def kernel(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Pair:
        y = torch.empty(x.shape, dtype=x.dtype)
        rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
        function(_plain(x), _plain(weight.to(x.dtype)), eps, y, rstd)
        return y, rstd

    return kernel


def rms_norm_backward() -> Callable[..., Pair]:
    """Return grad_x and grad_weight, see `csrc/rms_norm.cpp`."""
    function = library.load("rms_norm").rms_norm_backward

    def kernel(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> Pair:
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float64)
        function(_plain(grad_y), _plain(x), _plain(weight.to(x.dtype)), eps, grad_x, grad_weight)
        return grad_x, grad_weight.to(weight.dtype)

    return kernel


def swiglu() -> Callable[..., Tensor]:
    """Return y = gate sigmoid(gate) up, element by element."""
    function = library.load("swiglu").swiglu

    def kernel(gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty(gate.shape, dtype=gate.dtype)
        function(_plain(gate), _plain(up), y)
        return y

    return kernel


def swiglu_backward() -> Callable[..., Pair]:
    """Return grad_gate and grad_up, see `csrc/swiglu.cpp`."""
    function = library.load("swiglu").swiglu_backward

    def kernel(grad_y: Tensor, gate: Tensor, up: Tensor) -> Pair:
        grad_gate = torch.empty(gate.shape, dtype=gate.dtype)
        grad_up = torch.empty(gate.shape, dtype=gate.dtype)
        function(_plain(grad_y), _plain(gate), _plain(up), grad_gate, grad_up)
        return grad_gate, grad_up

    return kernel


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor that is only memory: DLPack has neither gradients nor lazy negations."""
    return tensor.detach().resolve_neg().contiguous()
