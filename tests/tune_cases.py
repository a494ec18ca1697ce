"""An op whose kernels are fast at different sizes, and what became of a call: for the tests of tuning."""

from __future__ import annotations

import time

import torch
from torch import Tensor

import opkit

SMALL, LARGE = torch.ones(4), torch.ones(1000)  # buckets 3 and 10
RAN: list[str] = []


def wait(backend, slow):
    RAN.append(backend)
    if slow:
        time.sleep(0.002)


def make(name="t::tuned"):
    """An op with a kernel for small sizes, one for large ones, and a reference that is always slow."""

    @opkit.op(name, shapes="*b -> *b")
    def copy(x: Tensor) -> Tensor:
        wait("reference", True)
        return x.clone()

    add_small(copy)
    add_large(copy)
    return copy


def add_small(op):
    @op.register_kernel("cpu", backend="small")
    def _(x):
        wait("small", x.numel() > 100)
        return x.clone()


def add_large(op):
    @op.register_kernel("cpu", backend="large", priority=1)
    def _(x):
        wait("large", x.numel() <= 100)
        return x.clone()


def tune(op, *cases, **options):
    return opkit.tune(
        op, [case if isinstance(case, tuple) else (case,) for case in cases], **{"min_run_time": 0, **options}
    )


def ran(op, *args):
    RAN.clear()
    op(*args)
    return RAN[0]


def selected(op, *args):
    return next(c for c in op.explain(*args).candidates if c.status == "selected")


def files(cache_dir):
    return list((cache_dir / "tuned").glob("*/*.json"))
