"""opkit::quant_fp8: numbers as float8_e4m3fn with scales.

    scale = max(|x|) / 448        q = x / scale, rounded to nearest even

448 is the largest number of float8_e4m3fn. x is about q scale.

Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433; scales for groups of 128 as in
DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating

LARGEST = 448.0
LEAST_SCALE = 2.0**-126


class QuantFP8(NamedTuple):
    """What quant_fp8 returns: x divided by its scales, and these."""

    q: Tensor
    scale: Tensor


@opkit.op("opkit::quant_fp8")
def quant_fp8(x: Tensor, group: int | None = None) -> QuantFP8:
    """Divide x by scales with which it just fits into float8_e4m3fn.

    group says how many neighbours share a scale, which is float32:

    - None: all of x; scale has no dimensions
    - -1: each row, along the last dimension; scale is [..., 1]
    - n > 0: every n elements of a row, the last ones of a row perhaps fewer; scale is [..., ceil(size / n)]

    A scale is at least 2^-126, so of zeros it is that. Where x has an infinity, the scale is infinite and what
    shares it becomes 0 or nan; where x has a nan, all that share its scale become nan. Computed in float32, as
    x (1 / scale). Any strides.

    There is no gradient, as rounding has none: quantise under torch.no_grad().

    Raises:
        ArgumentError: group is 0, or less than -1, or x has no dimensions and group is not None.
        DtypeError: x is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> q, scale = opkit_kernels.quant_fp8(torch.tensor([[1.0, -2.0], [112.0, 0.0]]), group=-1)
        >>> q.float() * scale
        tensor([[  1.,  -2.],
                [112.,   0.]])
    """
    require_floating("opkit::quant_fp8", x=x)
    blocks, _ = _checked(x, group)
    wide = x.to(torch.float32)
    if group is None:
        scale = _scales(wide.abs().amax() if x.numel() else wide.new_zeros(()))
        return QuantFP8(_rounded(wide * scale.reciprocal()), scale)
    size = x.shape[-1]
    each = size if group == -1 else group
    padded = torch.nn.functional.pad(wide, (0, blocks * each - size)).unflatten(-1, (blocks, each))
    largest = padded.abs().amax(-1) if each else wide.new_zeros(*x.shape[:-1], blocks)
    scale = _scales(largest)
    return QuantFP8(_rounded((padded * scale.reciprocal().unsqueeze(-1)).flatten(-2)[..., :size]), scale)


@quant_fp8.register_fake
def _(x: Tensor, group: int | None = None) -> QuantFP8:
    blocks, lead = _checked(x, group)
    scale = () if group is None else (*lead, blocks)
    return QuantFP8(x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(scale, dtype=torch.float32))


def _checked(x: Tensor, group: int | None) -> tuple[int, tuple[int, ...]]:
    """Return how many scales a row of x has, and the dimensions before."""
    if group is None:
        return 1, ()
    if group == 0 or group < -1:
        raise opkit.ArgumentError(
            f"calling opkit::quant_fp8: argument group is {group}; expected None for one scale, -1 for one per row, or "
            "how many elements of a row share one. Pass one of these.",
            op="opkit::quant_fp8",
        )
    if x.dim() == 0:
        raise opkit.ArgumentError(
            f"calling opkit::quant_fp8: x has no dimensions, and argument group is {group}; expected x with rows. Pass "
            "group=None, or x.unsqueeze(0).",
            op="opkit::quant_fp8",
        )
    return (1 if group == -1 else -(-x.shape[-1] // group)), tuple(x.shape[:-1])


def _scales(largest: Tensor) -> Tensor:
    return (largest / LARGEST).clamp_min(LEAST_SCALE)


def _rounded(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


register_files(quant_fp8)
