"""opkit::cross_entropy and its gradient, opkit::cross_entropy_backward.

    loss = (1 - label_smoothing) (lse - logits[target]) + label_smoothing (lse - mean(logits)) + z_loss lse^2
    lse = log(sum(exp(logits))), along the last dimension

The first term is the negative logarithm of the probability that softmax(logits) gives to target. Label smoothing
mixes it with the mean of that over all classes (Szegedy et al., 2015, arXiv:1512.00567); z_loss keeps lse near zero
(Chowdhery et al., "PaLM", 2022, arXiv:2204.02311). lse is computed as m + log(sum(exp(logits - m))) with the greatest
logit m, which neither overflows nor loses the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating


class CrossEntropy(NamedTuple):
    """What cross_entropy returns, one number per row each."""

    loss: Tensor
    lse: Tensor


@opkit.op("opkit::cross_entropy", shapes="*b n, *b:int64 -> *b:logits, *b:float64")
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """Return the cross entropy of each row of logits with its target class, and its log-sum-exp.

    loss has the dtype of logits, as torch.nn.functional.cross_entropy(reduction="none") has; native kernels keep
    sums in float32, or in float64 for float64. Any strides. A row of -inf alone has lse -inf and loss nan.
    Where logits are beyond 1e15, lse has no digits left for the sum, so equal ones count as one.

    A row whose target is ignore_index has loss 0, and no gradient comes from it. It has its lse all the same.

    lse is float64 for every dtype: the gradient is exp(logits - lse), in which an lse rounded to a 16-bit dtype
    would be wrong by percents, and in which float32 would spoil float64. It is one number per row. It is
    differentiable; for a loss that is not rounded to 16 bits take
    `lse - logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)`.

    Raises:
        ShapeError: target does not have the shape of logits without the last dimension.
        DtypeError: target is not int64, or logits are not floating.
        RuntimeError: label_smoothing is not between 0 and 1; or a target that is not ignore_index is negative, or
            not less than the number of logits in a row. The latter is a device-side assertion on CUDA, as in torch.

    Example:
        >>> import torch, opkit_kernels
        >>> logits, target = torch.tensor([[0.0, 0.0], [0.0, 100.0], [7.0, 8.0]]), torch.tensor([0, 1, -100])
        >>> opkit_kernels.cross_entropy(logits, target).loss
        tensor([0.6931, 0.0000, 0.0000])
    """
    require_floating("opkit::cross_entropy", logits=logits)
    check_smoothing("opkit::cross_entropy", label_smoothing)
    wide = logits.to(torch.float64)
    lse = torch.logsumexp(wide, -1)
    ignored = target == ignore_index
    at_target = wide.gather(-1, target.where(~ignored, 0).unsqueeze(-1)).squeeze(-1)
    loss = lse - at_target
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - wide.mean(-1))
    if z_loss != 0:
        loss = loss + z_loss * lse.square()
    return CrossEntropy(loss.where(~ignored, 0.0).to(logits.dtype), lse)


@opkit.op(
    "opkit::cross_entropy_backward", shapes="*b:logits, *b:float64, *b n, *b:int64, *b:float64 -> *b n:logits"
)
def cross_entropy_backward(
    grad_loss: Tensor,
    grad_lse: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the gradient of cross_entropy for logits.

    With g = grad_loss, or 0 in a row that is ignored: (g (1 + 2 z_loss lse) + grad_lse) exp(logits - lse), less
    g label_smoothing / n, and less g (1 - label_smoothing) at the target.

    Raises:
        ShapeError: grad_loss, grad_lse, target or lse does not have the shape of logits without the last
            dimension.
        DtypeError: a dtype is not one that cross_entropy has there.
        RuntimeError: label_smoothing or a target is out of range.

    Example:
        >>> import math, torch, opkit_kernels
        >>> one, zero, lse = torch.ones(1), torch.zeros(1).double(), torch.full((1,), math.log(2)).double()
        >>> opkit_kernels.cross_entropy_backward(one, zero, torch.zeros(1, 2), torch.tensor([0]), lse)
        tensor([[-0.5000,  0.5000]])
    """
    require_floating("opkit::cross_entropy_backward", logits=logits)
    check_smoothing("opkit::cross_entropy_backward", label_smoothing)
    ignored = target == ignore_index
    g = grad_loss.to(torch.float64).where(~ignored, 0.0)
    of_lse = grad_lse + g
    if z_loss != 0:
        of_lse = of_lse + (2 * z_loss * g * lse).where(~ignored, 0.0)
    grad = of_lse.unsqueeze(-1) * torch.exp(logits - lse.unsqueeze(-1))
    if label_smoothing > 0:
        grad = grad - (g * (label_smoothing / logits.shape[-1])).unsqueeze(-1)
    place = target.where(~ignored, 0).unsqueeze(-1)
    at_target = torch.zeros_like(grad).scatter(-1, place, 1.0)
    return (grad - at_target * (g * (1 - label_smoothing)).unsqueeze(-1)).to(logits.dtype)


def check_smoothing(op: str, label_smoothing: float) -> None:
    """Raise unless it is a share of one."""
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(
            f"calling {op}: label_smoothing is {label_smoothing}, expected 0 to 1. Take a share of 1."
        )


cross_entropy.register_autograd(
    cross_entropy_backward, saves=("logits", "target", "lse", "label_smoothing", "ignore_index", "z_loss")
)
cross_entropy_backward.register_autograd(opkit.from_reference)
cross_entropy.register_jvp(opkit.from_reference)

for _op in (cross_entropy, cross_entropy_backward):
    register_files(_op)
