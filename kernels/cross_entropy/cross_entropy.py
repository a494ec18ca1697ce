"""opkit::cross_entropy and its gradient, opkit::cross_entropy_backward.

    loss = lse - logits[target]        lse = log(sum(exp(logits))), along the last dimension

The negative logarithm of the probability that softmax(logits) gives to target. lse is computed as
m + log(sum(exp(logits - m))) with the greatest logit m, which neither overflows nor loses the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._flags import CFLAGS
from opkit_kernels._floating import require_floating


class CrossEntropy(NamedTuple):
    """What cross_entropy returns, one number per row each."""

    loss: Tensor
    lse: Tensor


@opkit.op("opkit::cross_entropy", shapes="*b n, *b:int64 -> *b:logits, *b:float64")
def cross_entropy(logits: Tensor, target: Tensor) -> CrossEntropy:
    """Return the cross entropy of each row of logits with its target class, and its log-sum-exp.

    loss has the dtype of logits, as torch.nn.functional.cross_entropy(reduction="none") has; native kernels keep
    sums in float32, or in float64 for float64. Any strides. A row of -inf alone has lse -inf and loss nan.
    Where logits are beyond 1e15, lse has no digits left for the sum, so equal ones count as one.

    lse is float64 for every dtype: the gradient is exp(logits - lse), in which an lse rounded to a 16-bit dtype
    would be wrong by percents, and in which float32 would spoil float64. It is one number per row. It is
    differentiable, so a z-loss is `lse.square()`; for a loss that is not rounded to 16 bits take
    `lse - logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)`.

    Raises:
        ShapeError: target does not have the shape of logits without the last dimension.
        DtypeError: target is not int64, or logits are not floating.
        RuntimeError: a target is negative, or not less than the number of logits in a row. On CUDA
            this is a device-side assertion, as in torch.

    Example:
        >>> import torch, opkit_kernels
        >>> opkit_kernels.cross_entropy(torch.tensor([[0.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 1])).loss
        tensor([0.6931, 0.0000])
    """
    require_floating("opkit::cross_entropy", logits=logits)
    wide = logits.to(torch.float64)
    lse = torch.logsumexp(wide, -1)
    at_target = wide.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return CrossEntropy((lse - at_target).to(logits.dtype), lse)


@opkit.op(
    "opkit::cross_entropy_backward", shapes="*b:logits, *b:float64, *b n, *b:int64, *b:float64 -> *b n:logits"
)
def cross_entropy_backward(
    grad_loss: Tensor, grad_lse: Tensor, logits: Tensor, target: Tensor, lse: Tensor
) -> Tensor:
    """Return the gradient of cross_entropy for logits.

    (grad_loss + grad_lse) exp(logits - lse), and grad_loss less at the target.

    Raises:
        ShapeError: grad_loss, grad_lse, target or lse does not have the shape of logits without the last
            dimension.
        DtypeError: a dtype is not one that cross_entropy has there.
        RuntimeError: a target is out of range.

    Example:
        >>> import math, torch, opkit_kernels
        >>> one, zero, lse = torch.ones(1), torch.zeros(1).double(), torch.full((1,), math.log(2)).double()
        >>> opkit_kernels.cross_entropy_backward(one, zero, torch.zeros(1, 2), torch.tensor([0]), lse)
        tensor([[-0.5000,  0.5000]])
    """
    require_floating("opkit::cross_entropy_backward", logits=logits)
    softmax = torch.exp(logits - lse.unsqueeze(-1))
    at_target = torch.zeros_like(softmax).scatter(-1, target.unsqueeze(-1), 1.0)
    grad_loss_wide = grad_loss.to(torch.float64).unsqueeze(-1)
    grad = (grad_loss_wide + grad_lse.unsqueeze(-1)) * softmax - grad_loss_wide * at_target
    return grad.to(logits.dtype)


cross_entropy.register_autograd(cross_entropy_backward, saves=("logits", "target", "lse"))
cross_entropy_backward.register_autograd(opkit.from_reference)
cross_entropy.register_jvp(opkit.from_reference)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
for _op in (cross_entropy, cross_entropy_backward):
    _symbol = _op.name.removeprefix("opkit::")
    _op.register_kernel(
        "cpu",
        opkit.cpp.kernel(
            "cross_entropy.cpp",
            symbol=_symbol,
            extra_cflags=CFLAGS,
            extra_include_paths=("../include",),
        ),
        backend="cpp",
        dtypes=DTYPES,
    )
    _op.register_kernel(
        "cuda",
        opkit.cpp.kernel("cross_entropy.cu", symbol=_symbol, extra_include_paths=("../include",)),
        backend="cuda",
        dtypes=DTYPES,
    )
