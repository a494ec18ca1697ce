"""Fixtures for the ops that opkit ships."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

import opkit
from opkit.cpp.toolchain import find_nvcc


@pytest.fixture(params=["reference", "cpp", pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once for every backend, with that one alone; its tensors belong on `device`."""
    name: str = request.param
    if name == "cpp" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler: g++ was not found")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is false")
    if name == "cuda" and find_nvcc() is None:
        pytest.skip("no CUDA compiler: nvcc was not found")
    torch.manual_seed(0)
    with opkit.use_backend(name, strict=True):
        yield name


@pytest.fixture
def device(backend: str) -> str:
    """Return the device of the backend's kernels; the reference runs on the CPU."""
    return "cuda" if backend == "cuda" else "cpu"
