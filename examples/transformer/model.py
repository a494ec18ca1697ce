"""A small decoder-only transformer, and the two sets of ops that it can be made of: plain torch, or opkit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Size:
    """How large a network is."""

    width: int = 128
    heads: int = 4
    layers: int = 4
    context: int = 128


@dataclass(frozen=True)
class Ops:
    """What a network and its training are made of, beside matrix products and attention."""

    rms_norm: Callable[[Tensor, Tensor], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    cross_entropy: Callable[[Tensor, Tensor], Tensor]
    adamw: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


def plain() -> Ops:
    """The ops as torch has them."""

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, 1e-6), total

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    return Ops(
        rms_norm=lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6),
        add_rms_norm=add_rms_norm,
        rope=lambda q, k, cos, sin: (turned(q, cos, sin), turned(k, cos, sin)),
        swiglu=lambda gate, up: F.silu(gate) * up,
        cross_entropy=F.cross_entropy,
        adamw=lambda parameters, lr: torch.optim.AdamW(
            parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        ),
    )


def with_opkit() -> Ops:
    """The ops as opkit ships them."""
    import opkit_kernels as ops

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, total, _ = ops.add_rms_norm(x, residual, weight)
        return y, total

    return Ops(
        rms_norm=lambda x, weight: ops.rms_norm(x, weight).y,
        add_rms_norm=add_rms_norm,
        rope=lambda q, k, cos, sin: ops.rope(q, k, cos, sin),
        swiglu=lambda gate, up: ops.swiglu(gate, up),
        cross_entropy=lambda logits, target: ops.cross_entropy(logits, target).loss.mean(),
        adamw=AdamW,
    )


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW over opkit::adamw_step: one call for all parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(
            parameters, {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 0}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        import opkit_kernels

        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            opkit_kernels.adamw_step(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                *(group[name] for name in ("lr", "betas", "eps", "weight_decay", "step")),
            )


class Block(nn.Module):
    """Attention, and a gated network over the sum of what there was and what attention adds."""

    def __init__(self, size: Size, ops: Ops) -> None:
        super().__init__()
        self.ops, self.heads = ops, size.heads
        self.q, self.k, self.v = (nn.Linear(size.width, size.width, bias=False) for _ in range(3))
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.norm = nn.Parameter(torch.ones(size.width))
        self.gate, self.up = (nn.Linear(size.width, 3 * size.width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * size.width, size.width, bias=False)

    def forward(self, x: Tensor, total: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Take the normalised total and the total itself; return what is to be added to the second result."""
        x, total = self.ops.add_rms_norm(self.attend(x, cos, sin).to(total.dtype), total, self.norm)
        return self.down(self.ops.swiglu(self.gate(x), self.up(x))), total

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v))
        q, k = self.ops.rope(q, k, cos, sin)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Transformer(nn.Module):
    """Predicts the next byte; calling it with bytes [batch, context + 1] gives the mean loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.embed = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList(Block(size, ops) for _ in range(size.layers))
        self.norms = nn.ParameterList(torch.ones(size.width) for _ in range(size.layers + 1))
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        half = size.width // size.heads // 2
        angles = torch.outer(torch.arange(size.context), 10_000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def logits(self, tokens: Tensor) -> Tensor:
        total = self.embed(tokens)
        first, *others = self.norms
        x = self.ops.rms_norm(total, first)
        for block, norm in zip(self.blocks, others, strict=True):
            added, total = block(x, total, self.cos, self.sin)
            x, total = self.ops.add_rms_norm(added.to(total.dtype), total, norm)
        return self.head(x)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.logits(tokens[:, :-1])
        return self.ops.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
