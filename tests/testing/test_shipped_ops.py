"""`check(op)` for every op that opkit ships, under `make soak`."""

from __future__ import annotations

import pytest

import opkit
import opkit_kernels
from opkit.testing import check

OPS = {name: value for name, value in vars(opkit_kernels).items() if isinstance(value, opkit.Op)}


@pytest.mark.soak
@pytest.mark.parametrize("name", OPS)
def test_every_op_passes(name):
    report = check(OPS[name])
    assert {"cpp", "reference"} <= set(report.backends)
    assert len(report.inputs) >= 8
