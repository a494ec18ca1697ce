"""Calls to check those ops with of which a shape line does not say enough: indices, divisors, sizes of tables.

`opkit.testing.check` makes them, the first one of each op in other dtypes and layouts too. Nothing is made before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opkit_kernels.adamw_step.adamw_step import adamw_step
from opkit_kernels.batch_norm.batch_norm import batch_norm_backward
from opkit_kernels.cross_entropy.cross_entropy import cross_entropy, cross_entropy_backward
from opkit_kernels.group_norm.group_norm import group_norm_backward
from opkit_kernels.quant_fp8.quant_fp8 import quant_fp8
from opkit_kernels.rope.rope import rope, rope_backward
from opkit_kernels.topk_softmax.topk_softmax import topk_softmax_backward

Cases = list[tuple[Any, ...]]


def _numbers(device: str) -> Callable[..., Tensor]:
    """Return a function that draws standard normal numbers of a shape, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device)


@adamw_step.register_samples
def _adamw_step(device: str) -> Cases:
    def lists(*shapes: tuple[int, ...]) -> tuple[Any, ...]:
        draw = _numbers(device)
        values = [[draw(*shape) for shape in shapes] for _ in range(4)]
        return *values[:3], [v.abs() for v in values[3]], 0.1, (0.9, 0.99), 1e-8, 0.01, 2

    return [lists((3, 5), (7,)), lists(()), lists((0,), (64, 32)), lists()]


@cross_entropy.register_samples
def _cross_entropy(device: str) -> Cases:
    draw = _numbers(device)

    def target(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return [
        (draw(3, 7), target(0, 6, 2)),
        (draw(2, 2, 33), target(0, 4, 32, 2).view(2, 2), 0.1, 2, 0.01),
        (draw(0, 5), target()),
        (draw(5), target(3).view(())),
        (draw(64, 300), torch.arange(64, device=device) * 3),
    ]


@cross_entropy_backward.register_samples
def _cross_entropy_backward(device: str) -> Cases:
    draw, made = _numbers(device), []
    for logits, target, *rest in _cross_entropy(device):
        lse = torch.logsumexp(logits.double(), -1)
        made.append((draw(*target.shape), draw(*target.shape).double(), logits, target, lse, *rest))
    return made


@batch_norm_backward.register_samples
def _batch_norm_backward(device: str) -> Cases:
    """The mean must be that of x, to a rounding."""
    draw, made = _numbers(device), []
    for shape, has_weight, has_bias in (
        ((5, 3, 2), True, True),
        ((5, 3, 2), False, True),
        ((7, 3), True, False),
        ((2, 3, 5, 5), False, False),
        ((0, 3, 2), True, True),
        ((8, 16, 128), True, True),
    ):
        x, channels = draw(*shape), shape[1]
        mean = x.mean([0, *range(2, x.dim())]) if x.numel() else draw(channels)
        weight, bias = (draw(channels) if has else None for has in (has_weight, has_bias))
        made.append((draw(*shape), x, weight, bias, mean, 1e-5))
    return made


@group_norm_backward.register_samples
def _group_norm_backward(device: str) -> Cases:
    draw = _numbers(device)
    return [
        (draw(2, 6, 5), draw(2, 6, 5), 3, draw(6), draw(6), 1e-5),
        (draw(2, 6, 5), draw(2, 6, 5), 2, None, draw(6), 1e-5),
        (draw(2, 6), draw(2, 6), 1, draw(6), None, 1e-5),
        (draw(0, 4, 3), draw(0, 4, 3), 2, None, None, 1e-5),
        (draw(4, 32, 100), draw(4, 32, 100), 4, draw(32), draw(32), 1e-5),
    ]


@quant_fp8.register_samples
def _quant_fp8(device: str) -> Cases:
    draw = _numbers(device)
    return [(draw(3, 8), 2), (draw(2, 3, 30), 10), (draw(0, 8), 4), (draw(64, 512), 128)]


def _rope(device: str) -> Cases:
    draw = _numbers(device)

    def heads(batch: tuple[int, ...], length: int, q: int, k: int, size: int, pairs: int, rows: int) -> Any:
        angles = draw(rows, pairs)
        return draw(*batch, length, q, size), draw(*batch, length, k, size), angles.cos(), angles.sin()

    places = torch.tensor([[0, 8, 1], [2, 2, 3]], device=device)
    return [
        heads((5,), 3, 4, 2, 7, 1, 9),
        (*heads((2,), 3, 4, 2, 6, 3, 9), places, True),
        heads((), 6, 2, 1, 32, 16, 8),
        heads((0,), 3, 2, 1, 4, 2, 3),
        (*heads((2,), 64, 4, 2, 64, 32, 64), None, True),
    ]


rope.register_samples(_rope)
rope_backward.register_samples(_rope)


@topk_softmax_backward.register_samples
def _topk_softmax_backward(device: str) -> Cases:
    draw, made = _numbers(device), []
    for shape, k, normalise in (
        ((2, 7), 3, True),
        ((2, 7), 3, False),
        ((3, 1, 5), 1, True),
        ((0, 4), 2, True),
    ):
        logits = draw(*shape)
        made.append((draw(*shape[:-1], k), logits, logits.topk(k).indices, normalise))
    return made
