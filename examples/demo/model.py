"""The demo's network, and the two sets of ops it can be made of: plain torch, or opkit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


@dataclass(frozen=True)
class Ops:
    """The normalisation, the activation and the loss of a network."""

    rms_norm: Callable[[Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    cross_entropy: Callable[[Tensor, Tensor], Tensor]


def plain() -> Ops:
    """The ops as torch has them."""
    return Ops(
        rms_norm=lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
        swiglu=lambda gate, up: F.silu(gate) * up,
        cross_entropy=lambda logits, target: F.cross_entropy(logits, target, reduction="none"),
    )


def with_opkit() -> Ops:
    """The ops as opkit ships them."""
    from opkit_kernels import cross_entropy, rms_norm, swiglu

    return Ops(
        rms_norm=lambda x, weight: rms_norm(x, weight).y,
        swiglu=lambda gate, up: swiglu(gate, up),
        cross_entropy=lambda logits, target: cross_entropy(logits, target).loss,
    )


class Block(nn.Module):
    """x + down(swiglu(gate, up)), the two halves of one linear layer over the normalised x."""

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.scale = nn.Parameter(torch.ones(width))
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.expand(self.ops.rms_norm(x, self.scale)).chunk(2, dim=-1)
        return x + self.down(self.ops.swiglu(gate, up))


class Network(nn.Module):
    """A residual network over the 64 pixels of a digit; calling it gives the loss of each row."""

    def __init__(self, ops: Ops, *, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.ops = ops
        self.embed = nn.Linear(64, width)
        self.blocks = nn.ModuleList(Block(width, ops) for _ in range(depth))
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, CLASSES)

    def logits(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ops.rms_norm(x, self.scale))

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        return self.ops.cross_entropy(self.logits(pixels), target)
