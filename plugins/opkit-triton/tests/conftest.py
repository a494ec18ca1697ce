"""Where the kernels run: on CUDA, or without a GPU in Triton's interpreter, which takes tensors on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

import opkit

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # said before triton is imported, which decides then
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device():
    """Return where the kernels take tensors in this process."""
    if HAS_GPU:
        return "cuda"
    from opkit_triton import kernels

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for name in ("scaled_softmax", "scaled_softmax_backward"):
        op = opkit.get(f"opkit_triton::{name}")
        op.register_kernel("cpu", getattr(kernels, name)(), backend="triton", dtypes=dtypes)
    return "cpu"


@pytest.fixture
def softmax(device):
    """Return the op, whose Triton kernels alone are used."""
    torch.manual_seed(0)
    with opkit.use_backend("triton", strict=True):
        yield opkit.get("opkit_triton::scaled_softmax")
