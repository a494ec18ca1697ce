"""The shipped ops on the CPU against what a user would otherwise run, for sizes from the L1 cache to memory.

"eager" is the best single expression that torch offers, "compiled" torch.compile of the op's reference, "floor" a copy
that moves as many bytes as the op must. Rows of the tables are sizes of x in elements.

    python tests/benchmarks/kernels.py [OP ...]
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _measure import calling, ratio, rounds, save, table
from torch import Tensor

import opkit_kernels as ops

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (4, 64, 1024, 16384)  # of 1024: in float32 16 KiB, 256 KiB, 4 MiB and 64 MiB
N = 1024
Function = Callable[..., Any]


class Case(NamedTuple):
    """An op with arguments: how torch does it, its reference, ours; and how often x moves at least."""

    eager: Function
    reference: Function
    ours: Function
    arguments: Callable[[Tensor], tuple[Any, ...]]
    moves: float  # the bytes that must be read or written, in those of x
    moves_backward: float | None = None
    single: bool = True  # whether eager is one kernel
    constants: int = 0  # how many of the last arguments have no gradient


def _first(function: Function) -> Function:
    return lambda *args: function(*args)[0]


def _row(x: Tensor) -> Tensor:
    return torch.rand(x.shape[-1], dtype=x.dtype)


def _images(function: Function) -> Function:
    """Return a function of rows of 1024 as one of images of 32 channels, 16 x 16 each."""
    return lambda x, *rest: function(x.view(-1, 32, 16, 16), *rest)


def _channels(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, torch.rand(32, dtype=x.dtype), torch.rand(32, dtype=x.dtype)


_RUNNING = torch.zeros(32), torch.ones(32)


def _batch_norm_eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    running = (r.to(weight.dtype) for r in _RUNNING)
    return F.batch_norm(x, *running, weight, bias, training=True)


def _batch_norm(function: Function) -> Function:
    return lambda x, weight, bias: function(x, weight, bias, *_RUNNING)[0]


def _op(op: Any) -> tuple[Function, Function]:
    """Return the reference and the op, of which only the first result counts."""
    return _first(op.reference), _first(op)


_STEP = 1e-3, (0.9, 0.999), 1e-8, 0.01, 3  # the numbers of adamw_step


def _heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q of 16 heads, a k of none, and the tables: rope without k, to compare what gradients take too."""
    angles = torch.outer(torch.arange(len(x)), 10_000.0 ** -(torch.arange(32) / 32))
    q = x.view(-1, 16, 64)
    return q, q[:, :0].detach(), angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _eager_topk(x: Tensor) -> Tensor:
    weights = torch.softmax(x, -1, dtype=torch.float32).topk(8).values
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


CASES: Mapping[str, Case] = {
    "vector_add": Case(torch.add, ops.vector_add.reference, ops.vector_add, lambda x: (x, x.clone()), 3, 3),
    "rms_norm": Case(
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), *_op(ops.rms_norm), lambda x: (x, _row(x)), 2, 5
    ),
    "layer_norm": Case(
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        *_op(ops.layer_norm), lambda x: (x, _row(x), _row(x)), 2, 5,
    ),
    "add_rms_norm": Case(
        lambda x, r, w: F.rms_norm(x + r, w.shape, w, 1e-6),
        *_op(ops.add_rms_norm), lambda x: (x, x.clone(), _row(x)), 4, 8, single=False,
    ),
    "group_norm": Case(
        _images(lambda x, w, b: F.group_norm(x, 8, w, b)),
        _images(lambda x, w, b: ops.group_norm.reference(x, 8, w, b)[0]),
        _images(lambda x, w, b: ops.group_norm(x, 8, w, b)[0]),
        _channels, 2, 5,
    ),
    "batch_norm": Case(
        _images(_batch_norm_eager),
        _images(_batch_norm(ops.batch_norm.reference)),
        _images(_batch_norm(ops.batch_norm)),
        _channels, 3, 8,
    ),
    "quant_fp8": Case(
        lambda x: _eager_quant(x), lambda x: ops.quant_fp8.reference(x, 128), lambda x: ops.quant_fp8(x, 128),
        lambda x: (x,), 1.25, single=False,
    ),
    "rms_norm_quant": Case(
        lambda x, w: _eager_quant(F.rms_norm(x, w.shape, w, 1e-6)), ops.rms_norm_quant.reference, ops.rms_norm_quant,
        lambda x: (x, _row(x)), 1.25, single=False,
    ),
    "swiglu": Case(
        lambda g, u: F.silu(g) * u, ops.swiglu.reference, ops.swiglu, lambda x: (x, x.clone()), 3, 8, single=False
    ),
    "cross_entropy": Case(
        lambda x, t: F.cross_entropy(x, t, reduction="none"),
        *_op(ops.cross_entropy), lambda x: (x, torch.randint(N, x.shape[:1])), 1, 3,
    ),
    "geglu": Case(
        lambda g, u: F.gelu(g, approximate="tanh") * u,
        ops.geglu.reference, ops.geglu, lambda x: (x, x.clone()), 3, 8, single=False,
    ),
    "rope": Case(
        lambda q, _, cos, sin: q * cos.repeat(1, 2)[:, None] + _half_turned(q) * sin.repeat(1, 2)[:, None],
        *_op(ops.rope), _heads, 2, 4, single=False, constants=2,
    ),
    "topk_softmax": Case(
        lambda x: _eager_topk(x.view(-1, 64)),
        lambda x: ops.topk_softmax.reference(x.view(-1, 64), 8)[0],
        lambda x: ops.topk_softmax(x.view(-1, 64), 8)[0],
        lambda x: (x,), 1.4, 4, single=False,
    ),
    "adamw_step": Case(
        lambda *tensors: torch._fused_adamw_(
            *([t] for t in tensors), [], [torch.tensor(3.0)], lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01,
            eps=1e-8, amsgrad=False, maximize=False,
        ),
        lambda *tensors: ops.adamw_step.reference(*([t] for t in tensors), *_STEP),
        lambda *tensors: ops.adamw_step(*([t] for t in tensors), *_STEP),
        lambda x: (x, x.clone(), x.clone(), x.square()), 7,
    ),
}  # fmt: skip


def _eager_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).float() / 448
    return (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), scale


def with_backward(function: Function, args: tuple[Any, ...], constants: int) -> Callable[[], object]:
    """Return a call of a function and of its gradients for all floating arguments but the last `constants`."""
    count = len(args) - constants
    leaves = [a.clone().requires_grad_(i < count) if a.is_floating_point() else a for i, a in enumerate(args)]
    grad = torch.randn_like(function(*args))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(function(*leaves), wanted, grad, allow_unused=True)


def copying(size: float) -> Callable[[], object]:
    """Return a copy that reads and writes so many bytes together."""
    source = torch.ones(max(int(size / 2), 1), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(case: Case, rows: int, dtype: torch.dtype, backward: bool) -> dict[str, list[float]]:
    """Return the seconds of each candidate in each round."""
    x = torch.randn(rows, N).to(dtype)
    args = case.arguments(x)
    torch._dynamo.reset()
    functions = {
        "eager": case.eager,
        "compiled": torch.compile(case.reference, dynamic=False),
        "opkit": case.ours,
    }
    moves = case.moves_backward if backward else case.moves
    assert moves is not None
    calls: dict[str, Callable[[], object]] = {"floor": copying(moves * x.numel() * x.element_size())}
    for name, function in functions.items():
        calls[name] = (
            with_backward(function, args, case.constants) if backward else (lambda f=function: f(*args))
        )
        calls[name]()
    return rounds({name: calling(call) for name, call in calls.items()}, repeats=9, at_least=0.004)


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    found: dict[str, dict[str, float]] = {}
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for backward in (False, True):
            lines = []
            for name in names:
                if backward and CASES[name].moves_backward is None:
                    continue
                for rows in ROWS:
                    times = measure(CASES[name], rows, dtype, backward)
                    faster = {
                        other: 1 / ratio(times, "opkit", other) for other in ("eager", "compiled", "floor")
                    }
                    way = "forward + backward" if backward else "forward"
                    found[f"{name}, {short}, {way}, {rows * N}"] = faster
                    ours = statistics.median(times["opkit"]) * 1e6
                    lines.append(
                        (name, str(rows * N), f"{ours:.1f}", *(f"{f:.2f}x" for f in faster.values()))
                    )
            title = (
                f"{short}, {'forward + backward' if backward else 'forward'}: how many times as fast opkit is"
            )
            header = ("", "size of x", "opkit, us", "as eager", "as compiled", "as the floor")
            table(title, header, lines, note="medians of 9 rounds; ")
    means = {
        other: math.exp(statistics.mean(math.log(f[other]) for f in found.values()))
        for other in ("eager", "compiled")
    }
    print(
        ", ".join(f"{mean:.2f}x of {other}" for other, mean in means.items()),
        "(geometric means over all rows)",
    )
    save("kernels", {"ratios": found, "means": means})


if __name__ == "__main__":
    main()
