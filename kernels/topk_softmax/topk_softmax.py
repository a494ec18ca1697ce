"""opkit::topk_softmax and its gradient, opkit::topk_softmax_backward: how a mixture of experts routes a token.

    p = softmax(logits)        indices = those of the k greatest p        weights = p[indices]

along the last dimension, and with `normalise` weights divided by their sum. Softmax over all experts first and
then the k best, as Mixtral and Qwen do: Fedus, Zoph and Shazeer, "Switch Transformers", 2021, arXiv:2101.03961;
Jiang et al., "Mixtral of Experts", 2024, arXiv:2401.04088.

softmax keeps the order of the logits, so they decide which are the greatest, also where their probabilities
round to the same number. Normalised weights are the softmax of the k chosen logits alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating


class TopKSoftmax(NamedTuple):
    """What topk_softmax returns: for each row its k greatest probabilities and where they are."""

    weights: Tensor
    indices: Tensor


@opkit.op("opkit::topk_softmax", shapes="*b n -> *b k:logits, *b k:int64")
def topk_softmax(logits: Tensor, k: int, normalise: bool = True) -> TopKSoftmax:
    """Return the k greatest probabilities of each row of logits, the greatest first, and their indices.

    weights have the dtype of logits; they are computed in float32, or in float64 for float64, and rounded once.
    indices are int64. Of equal logits the one with the lowest index comes first, on every device; nan counts as
    greater than all numbers, as in torch.topk. The weights of a row that has nan, inf or -inf alone are nan,
    as torch.softmax has them. Any strides.

    Gradients go to the logits through the weights; indices have none. Without `normalise` all logits get a share,
    with it only the chosen ones.

    Raises:
        DtypeError: logits are not floating.
        RuntimeError: k is negative, or more than a row of logits has.

    Example:
        >>> import torch, opkit_kernels
        >>> opkit_kernels.topk_softmax(torch.tensor([0.0, 1.0, 0.0, 1.0]), 3)
        TopKSoftmax(weights=tensor([0.4223, 0.4223, 0.1554]), indices=tensor([1, 3, 0]))
    """
    require_floating("opkit::topk_softmax", logits=logits)
    check_k(k, logits.shape[-1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # torch.topk promises nothing about which of equal elements it takes
    indices = torch.sort(wide, dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    weights = _weights(wide, indices, normalise)
    return TopKSoftmax(weights.to(logits.dtype), indices)


@opkit.op("opkit::topk_softmax_backward", shapes="*b k, *b n:grad_weights, *b k:int64 -> *b n:logits")
def topk_softmax_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, normalise: bool = True
) -> Tensor:
    """Return the gradient of topk_softmax for logits.

    With the unrounded weights w at the chosen logits: w (grad_weights - sum(grad_weights w)) there, and zero
    elsewhere. Without `normalise` it is -p sum(grad_weights w) elsewhere.

    Raises:
        ShapeError: grad_weights does not have the shape of indices, or logits other rows.
        DtypeError: grad_weights does not have the dtype of logits, or these are not floating.
        RuntimeError: an index is out of range. On CUDA this is a device-side assertion.

    Example:
        >>> import torch, opkit_kernels
        >>> opkit_kernels.topk_softmax_backward(torch.tensor([1.0, 0.0]), torch.zeros(3), torch.tensor([0, 2]))
        tensor([ 0.2500,  0.0000, -0.2500])
    """
    require_floating("opkit::topk_softmax_backward", logits=logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    grad = grad_weights.to(wide.dtype)
    weights = _weights(wide, indices, normalise)
    dot = (grad * weights).sum(-1, keepdim=True)
    everywhere = torch.zeros_like(wide) if normalise else -dot * torch.softmax(wide, -1)
    chosen = weights * (grad - dot) if normalise else weights * grad
    return everywhere.scatter_add(-1, indices, chosen).to(logits.dtype)


def check_k(k: int, n: int) -> None:
    """Raise unless rows of n logits have k elements."""
    if not 0 <= k <= n:
        raise RuntimeError(
            f"calling opkit::topk_softmax: k is {k} and the rows of logits have {n} elements; "
            "expected 0 <= k <= that. Take fewer."
        )


def _weights(logits: Tensor, indices: Tensor, normalise: bool) -> Tensor:
    """Return the probabilities of the chosen logits."""
    if not normalise:
        return torch.softmax(logits, -1).gather(-1, indices)
    return torch.softmax(logits.gather(-1, indices), -1)


topk_softmax.register_autograd(topk_softmax_backward, saves=("logits", "indices", "normalise"))
topk_softmax_backward.register_autograd(opkit.from_reference)
topk_softmax.register_jvp(opkit.from_reference)

for _op in (topk_softmax, topk_softmax_backward):
    register_files(_op)
