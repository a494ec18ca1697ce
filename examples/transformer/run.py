"""Train a small transformer on Python's own sources, once with opkit's ops and once in plain torch, and compare.

    python examples/transformer/run.py [--steps 100] [--autocast] [--device cuda] [--processes 2]

Both start from the same weights and read the same text. Prints the loss on the way, how far the two curves are
apart, and what a step takes: all four take turns, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from text import batches, sources
from torch.profiler import ProfilerActivity, profile
from train import Run, curve_of_ranks, stepper

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "scaled_dot_product")  # matrix products, and attention
console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--timed", type=int, default=30, help="rounds of timed steps")
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16 where autocast does")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--processes", type=int, default=1, help="train with DistributedDataParallel over gloo"
    )
    options = parser.parse_args()
    run = Run("opkit", steps=options.steps, autocast=options.autocast, device=options.device)
    if options.processes > 1:
        spread(run, options.processes)
    else:
        compare(run, options.timed)


def spread(run: Run, processes: int) -> None:
    """Train both on several processes, and compare their losses."""
    run = replace(run, compiled=False)
    ours, plain = (curve_of_ranks(replace(run, ops=ops), processes) for ops in ("opkit", "plain"))
    for at in shown(run.steps):
        console.print(f"step {at + 1:4}   loss {ours[at]:.4f} opkit   {plain[at]:.4f} plain torch")
    console.print(f"{processes} processes: the curves are {apart(ours, plain):.1e} apart")


def compare(run: Run, rounds: int) -> None:
    """Train both side by side, then time them."""
    candidates = {
        "opkit, compiled": run,
        "plain torch, compiled": replace(run, ops="plain"),
        "opkit": replace(run, compiled=False),
        "plain torch": replace(run, ops="plain", compiled=False),
    }
    steps = {name: stepper(one) for name, one in candidates.items()}
    data = batches(sources(), run.batch, run.size.context)
    curves: dict[str, list[float]] = {name: [] for name in steps}
    for at in track(range(run.steps), "training", console=console, transient=True):
        tokens = next(data)
        for name in list(steps)[:2]:
            curves[name].append(steps[name](tokens))
        if at in shown(run.steps):
            losses = "   ".join(f"{curve[-1]:.4f} {name}" for name, curve in curves.items() if curve)
            console.print(f"step {at + 1:4}   loss {losses}")
    ours, plain = list(curves.values())[:2]
    console.print(f"the curves are {apart(ours, plain):.1e} apart, in times the loss")
    tokens = next(data)
    for step in steps.values():
        step(tokens)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in track(range(rounds), "timing", console=console, transient=True):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            times[name].append(timed(steps[name], tokens, run.device))
    outside = share_outside_products(steps["plain torch"], tokens)
    table = Table(box=SIMPLE_HEAD, caption=f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("", "ms a step", "times opkit, compiled"):
        table.add_column(column, justify="right" if column else "left")
    first = times["opkit, compiled"]
    for name, own in times.items():
        ratio = statistics.median(b / a for a, b in zip(first, own, strict=True))
        table.add_row(name, f"{statistics.median(own) * 1e3:.1f}", f"{ratio:.2f}x")
    console.print(table)
    console.print(f"{outside:.0%} of plain torch's step is neither a matrix product nor attention")


def shown(steps: int) -> tuple[int, ...]:
    """Return the steps whose loss is printed."""
    return tuple(
        sorted({0, *range(steps // 5 - 1, steps, max(steps // 5, 1)), steps - 1} & set(range(steps)))
    )


def apart(ours: list[float], plain: list[float]) -> float:
    """Return the largest difference of two curves in times the loss."""
    return max(abs(a - b) / b for a, b in zip(ours, plain, strict=True))


def timed(step: Any, tokens: torch.Tensor, device: str) -> float:
    start = time.perf_counter()
    step(tokens)  # it returns the loss, so the device has finished
    if device == "cuda":
        torch.cuda.synchronize()  # the optimiser
    return time.perf_counter() - start


def share_outside_products(step: Any, tokens: torch.Tensor) -> float:
    """Return which part of a step's time in kernels is not spent in matrix products and attention."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as taken:
        for _ in range(3):
            step(tokens)
    events = taken.key_averages()
    device = any(event.self_device_time_total for event in events)
    own = {e.key: e.self_device_time_total if device else e.self_cpu_time_total for e in events}
    products = sum(time for name, time in own.items() if any(word in name for word in PRODUCTS))
    return 1 - products / sum(own.values())


if __name__ == "__main__":
    main()
