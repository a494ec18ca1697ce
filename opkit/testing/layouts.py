"""The same tensor in other memory: what a kernel must read wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from opkit._op import Op
from opkit.testing.arguments import mapped


def contiguous(tensor: Tensor) -> Tensor:
    """Return it as it is usually made."""
    return tensor.contiguous()


def transposed(tensor: Tensor) -> Tensor:
    """Return it with its dimensions in the opposite order in memory."""
    turned = tuple(reversed(range(tensor.dim())))
    return tensor.permute(turned).contiguous().permute(turned)


def sliced(tensor: Tensor) -> Tensor:
    """Return it as every second element of a longer last dimension, after a first one that is left out."""
    if tensor.dim() == 0:
        return tensor
    wide = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1))
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def expanded(tensor: Tensor) -> Tensor:
    """Return its first row for every row, in the memory of one; of a single dimension the first element."""
    return tensor[:1].expand(tensor.shape) if tensor.dim() and tensor.numel() else tensor


def misaligned(tensor: Tensor) -> Tensor:
    """Return it contiguous, one element after where an allocation begins: no vector register loads it aligned."""
    memory = tensor.new_zeros(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (contiguous, transposed, sliced, expanded, misaligned)
}


def laid(op: Op[..., Any], given: Sequence[Any], layout: str) -> tuple[Any, ...]:
    """Return arguments in schema order with all tensors in a layout; what the op writes to is never expanded."""
    mutated = {p.name for p in op.schema.params if p.mutated}
    kept = mutated if layout == "expanded" else set()
    return mapped(op, given, lambda n, t: t if n.split("[")[0] in kept else LAYOUTS[layout](t))
