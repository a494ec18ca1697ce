"""The shipped ops on the CPU against what a user would otherwise run, for sizes from the L1 cache to memory.

"eager" is the best single expression that torch offers, "compiled" torch.compile of the op's reference with all its
results. "copy" moves as many bytes as the op must between arrays that are there; "copy anew" writes as many of them
into new memory as the op returns, on large pages: what the op cannot do without. Sizes are elements of x.

    python tests/benchmarks/kernels.py [OP ...]
"""

from __future__ import annotations

import ctypes
import functools
import math
import statistics
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _measure import FOLDER, Run, calling, machine, ratio, rounds, save, table
from torch import Tensor

import opkit_kernels as ops

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (8, 64, 1024, 16384)  # of 1024: in float32 32 KiB, 256 KiB, 4 MiB and 64 MiB
N = 1024
ROWS_ON_GPU = (64, 16384, 131072)  # 256 KiB, 64 MiB and 512 MiB
PAGE = 2 << 20
STREAMING = ("vector_add", "rms_norm", "layer_norm", "add_rms_norm", "swiglu", "geglu", "rope", "adamw_step")
Function = Callable[..., Any]


class Bytes(NamedTuple):
    """What must move at least, in times the bytes of x, and what is written besides, in bytes for each element of x."""

    read: float
    written: float
    besides: float = 0


class Case(NamedTuple):
    """An op with arguments: how torch does it, its reference, ours; and what must move."""

    eager: Function
    reference: Function
    ours: Function
    arguments: Callable[[Tensor], tuple[Any, ...]]
    forward: Bytes
    both: Bytes | None = None  # forward and backward, where there is a gradient
    single: bool = True  # whether eager is one kernel
    constants: int = 0  # how many of the last arguments have no gradient


def _row(x: Tensor) -> Tensor:
    return torch.rand(x.shape[-1], dtype=x.dtype)


def _images(function: Function) -> Function:
    """Return a function of rows of 1024 as one of images of 32 channels, 16 x 16 each."""
    return lambda x, *rest: function(x.view(-1, 32, 16, 16), *rest)


def _channels(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, torch.rand(32, dtype=x.dtype), torch.rand(32, dtype=x.dtype)


@functools.cache
def _running(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros(32, device=device), torch.ones(32, device=device)


def _batch_norm_eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, var = (r.to(weight.dtype) for r in _running(x.device))
    return F.batch_norm(x, mean, var, weight, bias, training=True)


def _batch_norm(function: Function) -> Function:
    return lambda x, weight, bias: function(x, weight, bias, *_running(x.device))


def _op(op: Any) -> tuple[Function, Function]:
    return op.reference, op


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
    "vector_add": Case(
        torch.add, *_op(ops.vector_add), lambda x: (x, x.clone()), Bytes(2, 1), Bytes(2, 1)
    ),
    "rms_norm": Case(
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), *_op(ops.rms_norm),
        lambda x: (x, _row(x)), Bytes(1, 1), Bytes(3, 2),
    ),
    "layer_norm": Case(
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        *_op(ops.layer_norm), lambda x: (x, _row(x), _row(x)), Bytes(1, 1), Bytes(3, 2),
    ),
    "add_rms_norm": Case(
        lambda x, r, w: F.rms_norm(x + r, w.shape, w, 1e-6),
        *_op(ops.add_rms_norm), lambda x: (x, x.clone(), _row(x)), Bytes(2, 2), Bytes(4, 3), single=False,
    ),
    "group_norm": Case(
        _images(lambda x, w, b: F.group_norm(x, 8, w, b)),
        _images(lambda x, w, b: ops.group_norm.reference(x, 8, w, b)),
        _images(lambda x, w, b: ops.group_norm(x, 8, w, b)),
        _channels, Bytes(1, 1), Bytes(3, 2),
    ),
    "batch_norm": Case(
        _images(_batch_norm_eager),
        _images(_batch_norm(ops.batch_norm.reference)),
        _images(_batch_norm(ops.batch_norm)),
        _channels, Bytes(2, 1), Bytes(6, 2),
    ),
    "quant_fp8": Case(
        lambda x: _eager_quant(x), lambda x: ops.quant_fp8.reference(x, 128), lambda x: ops.quant_fp8(x, 128),
        lambda x: (x,), Bytes(1, 0, 1), single=False,
    ),
    "rms_norm_quant": Case(
        lambda x, w: _eager_quant(F.rms_norm(x, w.shape, w, 1e-6)), ops.rms_norm_quant.reference, ops.rms_norm_quant,
        lambda x: (x, _row(x)), Bytes(1, 0, 1), single=False,
    ),
    "swiglu": Case(
        lambda g, u: F.silu(g) * u, ops.swiglu.reference, ops.swiglu, lambda x: (x, x.clone()),
        Bytes(2, 1), Bytes(5, 3), single=False,
    ),
    "cross_entropy": Case(
        lambda x, t: F.cross_entropy(x, t, reduction="none"),
        *_op(ops.cross_entropy), lambda x: (x, torch.randint(N, x.shape[:1])), Bytes(1, 0), Bytes(2, 1),
    ),
    "geglu": Case(
        lambda g, u: F.gelu(g, approximate="tanh") * u,
        ops.geglu.reference, ops.geglu, lambda x: (x, x.clone()),
        Bytes(2, 1), Bytes(5, 3), single=False,
    ),
    "rope": Case(
        lambda q, _, cos, sin: q * cos.repeat(1, 2)[:, None] + _half_turned(q) * sin.repeat(1, 2)[:, None],
        *_op(ops.rope), _heads, Bytes(1, 1), Bytes(2, 2), single=False, constants=2,
    ),
    "topk_softmax": Case(
        lambda x: _eager_topk(x.view(-1, 64)),
        lambda x: ops.topk_softmax.reference(x.view(-1, 64), 8),
        lambda x: ops.topk_softmax(x.view(-1, 64), 8),
        lambda x: (x,), Bytes(1, 1 / 8, 1), Bytes(2 + 1 / 8, 1 + 1 / 8, 1), single=False,
    ),
    "adamw_step": Case(
        lambda *tensors: torch._fused_adamw_(  # type: ignore[call-overload]
            *([t] for t in tensors), [], [tensors[0].new_tensor(3.0, dtype=torch.float32)],
            lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01,
            eps=1e-8, amsgrad=False, maximize=False,
        ),
        lambda *tensors: ops.adamw_step.reference(*([t] for t in tensors), *_STEP),
        lambda *tensors: ops.adamw_step(*([t] for t in tensors), *_STEP),
        lambda x: (x, x.clone(), x.clone(), x.square()), Bytes(7, 0),
    ),
}  # fmt: skip


def _eager_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).float() / 448
    return (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), scale


def with_backward(function: Function, args: tuple[Any, ...], constants: int) -> Callable[[], object]:
    """Return a call of a function and of its gradients for all floating arguments but the last `constants`."""

    def result(*args: Any) -> Tensor:
        found = function(*args)
        return found if isinstance(found, Tensor) else found[0]

    count = len(args) - constants
    leaves = [a.clone().requires_grad_(i < count) if a.is_floating_point() else a for i, a in enumerate(args)]
    grad = torch.randn_like(result(*args))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(result(*leaves), wanted, grad, allow_unused=True)


def copying(size: float) -> Callable[[], object]:
    """Return a copy that reads and writes so many bytes together."""
    source = torch.ones(max(int(size / 2), 1), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copying_anew(size: float, written: float) -> Callable[[], object]:
    """Return the same where so many bytes are written into new memory, as an op's results are.

    malloc asks the system for memory from 32 MiB on, and gives it back; on pages of 2 MiB that costs least.
    """
    source = torch.ones(int(written), dtype=torch.uint8)
    rest = copying(max(size - 2 * written, 0))
    libc = ctypes.CDLL(None)

    def call() -> None:
        new = torch.empty_like(source)
        start = -(-new.data_ptr() // PAGE) * PAGE
        if (length := new.data_ptr() + new.numel() - start) > PAGE:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length // PAGE * PAGE), 14)  # MADV_HUGEPAGE
        new.copy_(source)
        rest()

    return call


def calling_on(device: str, call: Callable[[], object]) -> Run:
    """Return what calls a number of times; on a GPU the time is that between two events of its stream."""
    if device == "cpu":
        return calling(call)

    def run(number: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return run


def measure(case: Case, rows: int, dtype: torch.dtype, backward: bool, device: str) -> dict[str, list[float]]:
    """Return the seconds of each candidate in each round."""
    with torch.device(device):
        calls = candidates(case, rows, dtype, backward)
    for call in calls.values():
        call()
    return rounds({name: calling_on(device, call) for name, call in calls.items()}, repeats=9, at_least=0.004)


def candidates(case: Case, rows: int, dtype: torch.dtype, backward: bool) -> dict[str, Callable[[], object]]:
    """Return a call of each, with arguments on the default device."""
    x = torch.randn(rows, N).to(dtype)
    args = case.arguments(x)
    torch._dynamo.reset()
    functions = {
        "eager": case.eager,
        "compiled": torch.compile(case.reference, dynamic=False),
        "opkit": case.ours,
    }
    moved = case.both if backward else case.forward
    assert moved is not None
    written = (moved.written * x.element_size() + moved.besides) * x.numel()
    size = moved.read * x.numel() * x.element_size() + written
    calls: dict[str, Callable[[], object]] = {
        "copy": copying(size),
        # On a GPU, torch has had the memory before.
        "copy anew": copying_anew(size, written) if written >= 32 << 20 and not x.is_cuda else copying(size),
    }
    for name, function in functions.items():
        calls[name] = (
            with_backward(function, args, case.constants) if backward else functools.partial(function, *args)
        )
    return calls


PEERS = ("eager", "compiled", "copy", "copy anew")
Found = dict[tuple[str, str, str], dict[int, dict[str, float]]]


def draw(name: str, found: Found, device: str) -> Path:
    """Draw how many times as fast as its peers an op is, and return the picture's path."""
    from matplotlib.figure import Figure

    panels = [(key, sizes) for key, sizes in found.items() if key[0] == name]
    figure = Figure(figsize=(4.2 * ((len(panels) + 1) // 2), 6), layout="constrained")
    for place, ((_, dtype, way), sizes) in enumerate(panels):
        axes = figure.add_subplot(2, (len(panels) + 1) // 2, place + 1)
        for peer, colour in zip(PEERS, ("#d55e00", "#0067b1", "#8d96a0", "#3b434d"), strict=True):
            dashes = ":" if peer.startswith("copy") else "-"
            axes.plot(
                list(sizes),
                [times[peer] for times in sizes.values()],
                dashes,
                color=colour,
                marker="o",
                label=peer,
            )
        axes.axhline(1, color="#1f2328", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=f"{dtype}, {way}", xlabel="elements of x")
        axes.set_ylabel("times as fast as")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"opkit::{name} on {device} ({machine()})")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"kernels-{device}-{name}.svg"
    figure.savefig(path)
    return path


def show(found: Found, times: dict[tuple[str, str, str], dict[int, float]]) -> None:
    for dtype, way in dict.fromkeys(key[1:] for key in found):
        lines = [
            (key[0], str(size), f"{times[key][size]:.1f}", *(f"{faster[peer]:.2f}x" for peer in PEERS))
            for key, sizes in found.items()
            if key[1:] == (dtype, way)
            for size, faster in sizes.items()
        ]
        header = ("", "size of x", "opkit, us", *(f"as {peer}" for peer in PEERS))
        table(f"{dtype}, {way}: how many times as fast opkit is", header, lines, note="medians of 9 rounds; ")


def summary(found: Found, large: int) -> dict[str, float]:
    """Return what the goals are about."""

    def mean(peer: str, names: Collection[str]) -> float:
        logs = [math.log(f[peer]) for key, sizes in found.items() for f in sizes.values() if key[0] in names]
        return math.exp(statistics.mean(logs)) if logs else math.nan

    several = {name for name, case in CASES.items() if not case.single}
    return {
        "as compiled": mean("compiled", CASES),
        "as eager, where that is several kernels": mean("eager", several),
        "as eager, where that is one kernel": mean("eager", CASES.keys() - several),
        "rows below 0.9x of the faster of both": float(
            sum(min(f["eager"], f["compiled"]) < 0.9 for sizes in found.values() for f in sizes.values())
        ),
        "streaming ops at the largest size, as a copy into new memory": math.exp(
            statistics.mean(
                [math.log(s[large]["copy anew"]) for key, s in found.items() if key[0] in STREAMING]
                or [math.nan]
            )
        ),
    }


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    run(names, "cpu", ROWS)
    if torch.cuda.is_available():
        run(names, "cuda", ROWS_ON_GPU)
    else:
        print("on a GPU: not measured, as torch.cuda finds none")


def run(names: list[str], device: str, sizes: tuple[int, ...]) -> None:
    found: Found = {}
    times: dict[tuple[str, str, str], dict[int, float]] = {}
    measure(CASES[names[0]], sizes[0], DTYPES[0], False, device)  # what is compiled first is slow for a while
    for name in names:
        for dtype in DTYPES:
            for backward in (False, True) if CASES[name].both else (False,):
                key = name, str(dtype).removeprefix("torch."), "forward + backward" if backward else "forward"
                found[key], times[key] = {}, {}
                for rows in sizes:
                    taken = measure(CASES[name], rows, dtype, backward, device)
                    found[key][rows * N] = {peer: 1 / ratio(taken, "opkit", peer) for peer in PEERS}
                    times[key][rows * N] = statistics.median(taken["opkit"]) * 1e6
        path = draw(name, found, device)
        print(f"{name}: measured, and drawn as {path}", file=sys.stderr)
    show(found, times)
    means = summary(found, max(sizes) * N)
    for text, value in means.items():
        print(f"{value:.2f}  {text}")
    save(
        f"kernels-{device}",
        {"ratios": {f"{', '.join(key)}": sizes for key, sizes in found.items()}, "means": means},
    )


if __name__ == "__main__":
    main()
