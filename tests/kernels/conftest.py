"""Fixtures for the ops that opkit ships."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

import opkit


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for every backend of the CPU, with that one alone."""
    name: str = request.param
    if name == "cpp" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler: g++ was not found")
    torch.manual_seed(0)
    with opkit.use_backend(name, strict=True):
        yield name
