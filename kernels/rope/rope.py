"""opkit::rope and its gradient, opkit::rope_backward: rotary position embedding.

Each pair (x1, x2) of a head's elements is turned by an angle that grows with the position:

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv:2104.09864.

Which elements are a pair is the one thing that models disagree on: element i with element c + i, where c is the
number of pairs (GPT-NeoX, Llama as Hugging Face has it, Qwen; here the default), or element 2 i with 2 i + 1
(RoFormer, GPT-J, Llama as Meta has it; `interleaved=True`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating

_SHAPES = "*b s h d, *b s g d:q, m c, m c:cos, *b s:int64 -> *b s h d:q, *b s g d:q"


class RoPE(NamedTuple):
    """What rope returns: q and k, turned."""

    q: Tensor
    k: Tensor


class RoPEGradients(NamedTuple):
    """What rope_backward returns."""

    q: Tensor
    k: Tensor


@opkit.op("opkit::rope", shapes=_SHAPES)
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> RoPE:
    """Turn each pair of elements of q and k by the angle of its position.

    q is [*b, s, h, d] and k [*b, s, g, d]: batch, sequence, heads, elements of a head, as flash attention takes
    them; with grouped heads k has fewer. [s, h, d] is a packed sequence. What lies as [b, h, s, d] goes in
    as `q.transpose(1, 2)`: any strides are read where they are. The results are contiguous.

    cos and sin are tables [m, c] with a row for each position and a column for each pair, so with the angles
    `outer(arange(m), base ** -(arange(c) / c))`. Where 2 c < d, the elements from 2 c on are copied (partial rotary
    embedding). Of a table that says each number twice, as Hugging Face's [s, d], pass the first half of the columns.
    Without positions, row i of the table is for element i of the sequence; with them, positions[..., i] is its row.
    The tables may have another floating dtype than q and k, such as float32, and are constants: they get no gradient.

    Computed in float32, or in float64 where q is float64, and rounded once.

    Raises:
        ShapeError: shapes are not as above.
        DtypeError: q and k, or cos and sin, have different dtypes or are not floating; positions are not int64.
        RuntimeError: the table has fewer than s rows, or twice its columns are more than d, or a position is not
            one of its rows. The last is a device-side assertion on CUDA.

    Example:
        >>> import torch, opkit_kernels
        >>> angles = torch.tensor([[0.0], [torch.pi / 2]])
        >>> q = k = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
        >>> opkit_kernels.rope(q, k, angles.cos(), angles.sin()).q.round().flatten() + 0
        tensor([1., 0., 0., 1.])
    """
    require_floating("opkit::rope", q=q, cos=cos)
    return RoPE(*_turned("opkit::rope", q, k, cos, sin, positions, interleaved, 1))


@opkit.op("opkit::rope_backward", shapes=_SHAPES.replace(":q", ":grad_q"))
def rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> RoPEGradients:
    """Return the gradients of rope for q and k: those of its results, turned back.

    Raises:
        ShapeError: as rope.
        DtypeError: as rope.
        RuntimeError: as rope.

    Example:
        >>> import torch, opkit_kernels
        >>> grad, angles = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[torch.pi / 2]])
        >>> opkit_kernels.rope_backward(grad, grad, angles.cos(), angles.sin()).q.round().flatten() + 0
        tensor([ 0., -1.])
    """
    require_floating("opkit::rope_backward", grad_q=grad_q, cos=cos)
    return RoPEGradients(
        *_turned("opkit::rope_backward", grad_q, grad_k, cos, sin, positions, interleaved, -1)
    )


def _turned(
    op: str,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    sign: int,
) -> tuple[Tensor, Tensor]:
    """Return q and k, turned by the angles or, where sign is -1, by their negatives."""
    check_tables(op, q, cos, positions)
    chosen = slice(0, q.shape[-3]) if positions is None else positions
    wide = torch.promote_types(q.dtype, torch.float32)
    c, s = (table[chosen].to(wide).unsqueeze(-2) for table in (cos, sin))
    return tuple(_pairs_turned(x.to(wide), c, sign * s, interleaved).to(q.dtype) for x in (q, k))


def check_tables(op: str, q: Tensor, cos: Tensor, positions: Tensor | None) -> None:
    """Raise unless the tables fit heads of q, and have a row for each position."""
    length, (rows, pairs) = q.shape[-3], cos.shape
    if 2 * pairs > q.shape[-1]:
        raise RuntimeError(
            f"calling {op}: cos has {pairs} columns, one for each pair, and heads have {q.shape[-1]} elements; "
            f"expected at most half as many. Pass the first half of a table that says each number twice."
        )
    if positions is not None:
        torch._assert_async(
            ((positions >= 0) & (positions < rows)).all(), f"calling {op}: a position is out of range"
        )
    elif length > rows:
        raise RuntimeError(
            f"calling {op}: the sequence has {length} elements and cos {rows} rows; expected a row for each. "
            "Make a longer table, or pass positions."
        )


def _pairs_turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return [..., d] with the pairs of its first elements turned, one for each column of cos."""
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    axis = -1 if interleaved else -2
    first, second = turned.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(axis)
    both = torch.stack((first * cos - second * sin, second * cos + first * sin), axis)
    return torch.cat((both.flatten(-2), rest), -1)


_SAVES = ("cos", "sin", "positions", "interleaved")
rope.register_autograd(rope_backward, saves=_SAVES, non_differentiable=("cos", "sin"))
rope_backward.register_autograd(rope, saves=_SAVES, non_differentiable=("cos", "sin"))
rope.register_jvp(opkit.from_reference)
rope_backward.register_jvp(opkit.from_reference)

for _op in (rope, rope_backward):
    register_files(_op)
