"""A part of the OpInfo sweep, see sweep.py, in a process that has not differentiated yet: a forked child could not."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SWEEP = Path(__file__).with_name("sweep.py")


@pytest.mark.parametrize("options", [["--part", "4/20"], ["--only", "fft."]], ids=["one in twenty", "fft"])
def test_ops_are_those_of_the_cpu(options, environment):
    done = subprocess.run(
        [sys.executable, str(SWEEP), *options], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    equal, ran = map(int, re.search(r"(\d+) of (\d+) equal", done.stdout).groups())
    differentiated = int(re.search(r"'with backward': (\d+)", done.stdout)[1])
    assert equal >= 0.9 * ran
    assert ran > 15
    assert differentiated > 15


def test_the_sweep_finds_what_differs():
    spec = importlib.util.spec_from_file_location("sweep", SWEEP)
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    one = [torch.ones(2)]
    assert sweep.difference(one, [torch.ones(2)]) == ""
    assert sweep.difference(one, [torch.ones(2) * 1.01]) == "other values"
    assert (
        sweep.difference(one, [torch.ones(2).double()]) == "torch.float64 (2,) instead of torch.float32 (2,)"
    )
    assert sweep.difference(one, []) == "0 results instead of 1"
