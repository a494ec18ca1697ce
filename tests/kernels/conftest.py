"""Fixtures for the ops that opkit ships."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator

import pytest
import torch

import opkit
from opkit.cpp import compilers


@pytest.fixture(params=["reference", "cpp", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for every backend, with that one alone; its tensors belong on `device`."""
    name: str = request.param
    if missing := missing_for(name):
        pytest.skip(missing)
    torch.manual_seed(0)
    with opkit.use_backend(name, strict=True):
        yield name


@pytest.fixture
def device(backend: str) -> str:
    """Return the device of the backend's kernels; the reference runs on the CPU."""
    return "cuda" if backend == "cuda" else "cpu"


@functools.cache
def missing_for(backend: str) -> str | None:
    """Return what a backend would need that this machine does not have."""
    if backend == "cpp" and shutil.which("g++") is None:
        return "no C++ compiler: g++ was not found"
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is false"
    if backend == "cuda" and compilers.find_nvcc() is None:
        return "no CUDA compiler: nvcc was not found"
    return None
