"""How the cost of calls grows: with threads, with the number of ops, and with the number of calls.

    python tests/benchmarks/grow.py [--long] [threads] [ops] [memory]

`--long` makes ten million calls in the place of one million.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import define
import torch
from _measure import save, table
from torch import Tensor

import opkit

THREADS = (1, 2, 4)
REPEATS = 5
SLICE = 0.15  # seconds
OPS = 10_000
CALLS, MANY_CALLS = 1_000_000, 10_000_000
GROWTH = 2**20  # bytes that the allocators' own keeping may come to


def rss() -> int:
    """Return the bytes of memory that this process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- threads


def rate(call: Callable[[], object], threads: int) -> float:
    """Return calls per second of all threads together."""
    barrier, stop, counts = threading.Barrier(threads + 1), threading.Event(), [0] * threads

    def work(index: int) -> None:
        barrier.wait()
        count = 0
        while not stop.is_set():
            for _ in range(100):
                call()
            count += 100
        counts[index] = count

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    time.sleep(SLICE)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - start)


def in_threads() -> dict[str, Any]:
    import _peers as peers

    x, ones = torch.randn(16), torch.ones(16)

    def forward(op: Callable[..., Any]) -> Callable[[], object]:
        return lambda: op(x)

    def backward(op: Callable[..., Any]) -> Callable[[], object]:
        def call() -> object:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(op(leaf), leaf, ones)

        return call

    measured = {}
    for title, make, ours, others in (
        ("no grad", forward, peers.native_sine, peers.SINE),
        ("forward + backward", backward, peers.native_sine, peers.SINE_WITH_GRAD),
    ):
        named = {"opkit, Python kernel": others[peers.OPKIT], "opkit, C++ kernel": ours}
        named |= {name: op for name, op in others.items() if name != peers.OPKIT}
        calls = {name: make(op) for name, op in named.items()}
        found: dict[str, dict[int, list[float]]] = {name: {n: [] for n in THREADS} for name in calls}
        for call in calls.values():
            call()
        for _ in range(REPEATS):
            for name, call in calls.items():
                for threads in THREADS:
                    found[name][threads].append(rate(call, threads))
        rows = {name: {n: statistics.median(r) for n, r in rates.items()} for name, rates in found.items()}
        header = ("", *(f"{n} thread{'s' * (n > 1)}" for n in THREADS), f"{THREADS[-1]} to {THREADS[0]}")
        table(
            f"thousand calls per second, {title}",
            header,
            [
                (name, *(f"{r[n] / 1e3:.0f}" for n in THREADS), f"{r[THREADS[-1]] / r[THREADS[0]]:.2f}x")
                for name, r in rows.items()
            ],
            note=f"{os.cpu_count()} CPUs; ",
        )
        measured[title] = rows
    return measured


# ---------------------------------------------------------------- ops


def define_many(way: str) -> None:
    """Define many ops, call each, and print what that took, as JSON."""
    new, args = define.CANDIDATES[way], (torch.ones(2, 4), torch.ones(4))
    new()(*args)  # imports
    before, start = rss(), time.perf_counter()
    ops = [new() for _ in range(OPS)]
    seconds = {"define": time.perf_counter() - start}
    for title, called in (("first", ops), ("second", ops), ("one", ops[:1] * OPS)):
        start = time.perf_counter()
        for op in called:
            op(*args)
        seconds[title] = time.perf_counter() - start
    print(json.dumps({**seconds, "bytes": rss() - before}))


def many_ops() -> dict[str, Any]:
    print(f"defining {OPS} ops in {len(define.CANDIDATES)} ways, about a minute ...", flush=True)
    measured = {}
    for way in define.CANDIDATES:
        command = [sys.executable, __file__, "--define", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        measured[way] = json.loads(done.stdout.splitlines()[-1])
    header = ("", "define, s", "first calls, s", "again, us a call", "one op, us", "MiB", "KiB an op")
    rows = []
    for way, m in measured.items():
        again, one = (f"{m[title] / OPS * 1e6:.2f}" for title in ("second", "one"))
        memory = f"{m['bytes'] / 2**20:.0f}", f"{m['bytes'] / OPS / 2**10:.1f}"
        rows.append((way, f"{m['define']:.2f}", f"{m['first']:.2f}", again, one, *memory))
    table(f"{OPS} ops, each called", header, rows)
    return measured


# ---------------------------------------------------------------- memory


def kinds() -> Mapping[str, Callable[[], object]]:
    """Return calls of every kind that leaves something to clean up."""
    import _peers as peers

    @opkit.op("opkit_bench::refusing", shapes="n, n -> n")
    def refusing(x: Tensor, y: Tensor) -> Tensor:
        raise ValueError("never")

    x, grad, ones, other = torch.randn(16), torch.randn(16, requires_grad=True), torch.ones(16), torch.ones(3)
    out, many = torch.empty(16), [x] * 9

    def raising(*args: Tensor) -> Callable[[], object]:
        def call() -> object:
            try:
                return refusing(*args)
            except (ValueError, opkit.ShapeError):
                return None

        return call

    return {
        "Python kernel": lambda: peers.python_sine(x),
        "C++ kernel": lambda: peers.native_sine(x),
        "NamedTuple": lambda: peers.THREE[peers.OPKIT](x),
        "mutating": lambda: peers.TEN[peers.OPKIT](out, *many),
        "forward only": lambda: peers.native_sine(grad),
        "backward, Op in C++": lambda: peers.native_sine(grad).backward(ones),
        "backward, Python formula": lambda: peers.python_sine(grad).backward(ones),
        "kernel raises": raising(x, x),
        "call is refused": raising(x, other),
    }


def memory(calls: int) -> dict[str, Any]:
    measured, each = {}, calls // len(kinds())
    print(f"{calls} calls ...", flush=True)
    for name, call in kinds().items():
        for _ in range(each // 10):  # what is kept once, and what allocators keep
            call()
        before, blocks, start = rss(), sys.getallocatedblocks(), time.perf_counter()
        for _ in range(each - each // 10):
            call()
        seconds = time.perf_counter() - start
        after = rss()
        measured[name] = {
            "calls": each,
            "us": seconds / (each - each // 10) * 1e6,
            "rss": (before, after),
            "blocks": sys.getallocatedblocks() - blocks,
        }
    table(
        f"memory over {calls} calls of opkit's ops",
        ("", "calls", "us", "MiB before", "MiB after", "KiB grown", "Python blocks", "no growth"),
        [
            (
                name,
                str(m["calls"]),
                f"{m['us']:.2f}",
                f"{m['rss'][0] / 2**20:.1f}",
                f"{m['rss'][1] / 2**20:.1f}",
                f"{(m['rss'][1] - m['rss'][0]) / 2**10:.0f}",
                f"{m['blocks']:+d}",
                "yes" if m["rss"][1] - m["rss"][0] <= GROWTH and m["blocks"] < each // 100 else "no",
            )
            for name, m in measured.items()
        ],
    )
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="of threads, ops and memory; by default all")
    parser.add_argument("--long", action="store_true", help=f"make {MANY_CALLS} calls")
    parser.add_argument("--define", choices=define.CANDIDATES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.define:
        return define_many(arguments.define)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "threads": in_threads,
        "ops": many_ops,
        "memory": lambda: memory(MANY_CALLS if arguments.long else CALLS),
    }
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; expected some of {', '.join(parts)}")
    measured = {
        name: part() for name, part in parts.items() if name in arguments.parts or not arguments.parts
    }
    if not arguments.parts:
        save("grow", measured)


if __name__ == "__main__":
    main()
