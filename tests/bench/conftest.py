"""A clock that stands still but for what a test says has passed, and an op to compare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit
from opkit.bench import caches, timing


class Time:
    """Seconds that pass when a test says so, and a millisecond whenever they are asked for."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now

    def taking(self, seconds, function):
        """The function, taking that long."""

        def slow(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return slow


@pytest.fixture
def time(monkeypatch):
    made = Time()
    monkeypatch.setattr(timing, "clock", made)
    return made


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """Emptying caches of a kilobyte takes no time."""
    monkeypatch.setattr(caches, "last_cache", lambda device: 1024)


@pytest.fixture
def scale(registry, time):
    """An op of which the reference takes 4 seconds, fast 1, slow 8; and broken is wrong."""

    @opkit.op("benched::scale", shapes="*b n, n -> *b n")
    def scale(x: Tensor, weight: Tensor, power: int = 1) -> Tensor:
        time.now += 4
        return x * weight**power

    def right(x, weight, power):
        return x * weight**power

    scale.register_kernel("cpu", time.taking(1, right), backend="fast", priority=2)
    scale.register_kernel("cpu", time.taking(8, right), backend="slow", priority=1)
    scale.register_kernel("cpu", lambda x, w, p: x * w**p + 1e-3, backend="broken")
    scale.register_kernel("cuda", right, backend="far")
    scale.register_autograd(opkit.from_reference)
    return scale


def case(n, rows=2):
    return (torch.randn(rows, n), torch.rand(n) + 1), {}


@pytest.fixture
def compare():
    """`opkit.bench.compare`, quickly and quietly, of the case that fits `scale`."""

    def run(op, case=case, **options):
        quick = {"min_run_time": 1e-4, "progress": False, "caches": ["warm"], "backward": False}
        return opkit.bench.compare(op, case, **{**quick, **options})

    return run
