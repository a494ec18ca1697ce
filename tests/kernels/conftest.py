"""Fixtures for the ops that opkit ships."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import opkit
from opkit.cpp import compilers
from tests.kernels.kernel_cases import INTERPRETS, contiguous

_FEW = ((0, 5), (3, 7), (2, 3, 65), (300, 200))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most pairs of shape and layout to `make soak`: a layout that is not contiguous meets few shapes here."""
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        others = given.get("layout", contiguous) is not contiguous and given.get("shape", _FEW[0]) not in _FEW
        if others and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.soak)


@pytest.fixture(params=["reference", "cpp", pytest.param("cuda", marks=pytest.mark.cuda), "triton"])
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
    """Return the device of the backend's kernels; the reference runs on the CPU, and so does Triton's interpreter."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not INTERPRETS) else "cpu"


@pytest.fixture
def kernels_device(backend: str, device: str) -> str:
    """Return `device` for what is promised of kernels: not of the reference, nor of Triton's interpreter."""
    if backend == "reference" or (backend == "triton" and INTERPRETS):
        pytest.skip("promised of compiled kernels")
    return device


@functools.cache
def missing_for(backend: str) -> str | None:
    """Return what a backend would need that this machine does not have."""
    if backend == "cpp" and shutil.which("g++") is None:
        return "no C++ compiler: g++ was not found"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "no Triton: triton is not installed"
    if backend == "triton" and not INTERPRETS and not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET=1 is not set: Triton's kernels could not run"
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is false"
    if backend == "cuda" and compilers.find_nvcc() is None:
        return "no CUDA compiler: nvcc was not found"
    return None
