"""Reports made up for tests."""

from __future__ import annotations

from opkit.bench.report import Report, Row

MACHINE = {
    "processor": "A processor", "architecture": "x86_64", "device": "cpu", "threads": 2, "calls": "native core",
    "torch": "2.13.0", "python": "3.11.2", "opkit": "0.1.0",
}  # fmt: skip


def row(name, times=(), *, n=4, kind="backend", **other):
    given = {
        "sizes": {"n": n}, "dtype": "float32", "direction": "forward", "caches": "warm", "name": name, "kind": kind,
        "status": "timed" if times else "rejected", "times": tuple(times), "number": 1, "bytes": 1000,
    }  # fmt: skip
    return Row(**{**given, **other})


def report(*rows, **other):
    return Report(**{"op": "a::b", "machine": MACHINE, "settings": {}, "rows": rows, **other})
