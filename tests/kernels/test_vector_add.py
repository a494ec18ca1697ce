"""opkit::vector_add: against torch, under autograd, compile and export."""

from __future__ import annotations

import pytest
import torch

import opkit
from opkit_kernels import vector_add
from tests.kernels.kernel_cases import (
    DTYPES,
    INTERPRETS,
    LAYOUTS,
    SHAPES,
    assert_compiles_once,
    assert_exports,
    assert_same_for_any_number_of_threads,
    compilers,
    layout_name,
    shape_name,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", [*SHAPES, ()], ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vector_add_equals_torch(backend, device, dtype, shape, layout):
    if backend == "cpp" and dtype == torch.float16:
        pytest.skip("float16 is left to the reference on the CPU")
    if INTERPRETS and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts digits off instead of rounding")
    layout = layout if shape else lambda x: x
    a, b = layout(torch.randn(shape, device=device).to(dtype)), torch.randn(shape, device=device).to(dtype)
    for left, right in ((a, b), (b, a), (a, a)):
        y = vector_add(left, right)
        assert torch.equal(y, left + right)
        assert y.is_contiguous()


def test_vector_add_of_many_strided_elements(device):
    a = torch.randn(17, 300, 31, device=device).permute(2, 0, 1)
    b = torch.randn(31, 300, 17, device=device).transpose(1, 2)
    assert torch.equal(vector_add(a, b), a + b)


def test_vector_add_is_deterministic(device):
    a, b = torch.randn(300_001, device=device), torch.randn(300_001, device=device)
    assert_same_for_any_number_of_threads(lambda: vector_add(a, b))


def test_vector_add_opcheck(device):
    a = torch.randn(3, 5, requires_grad=True, device=device)
    b = torch.randn(5, 3, requires_grad=True, device=device)
    torch.library.opcheck(vector_add.overload, (a, b.t()))


def test_vector_add_gradients(device):
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True, device=device) for _ in range(2))
    assert torch.autograd.gradcheck(vector_add, (a, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(vector_add, (a, b), check_fwd_over_rev=True)


@compilers
def test_vector_add_compiles_once_for_all_sizes(compiler, gradients):
    cases = [torch.randn(2, rows, 5).unbind() for rows in (3, 4, 9)]
    assert_compiles_once(lambda a, b: vector_add(a * 2, b), cases, compiler, gradients)


def test_vector_add_exports():
    assert_exports(lambda a, b: vector_add(a, b), (torch.randn(3), torch.randn(3)), vector_add)


def test_vector_add_refuses_other_shapes_and_dtypes(device):
    with pytest.raises(opkit.ShapeError, match="vector_add"):
        vector_add(torch.ones(3, device=device), torch.ones(4, device=device))
    with pytest.raises(opkit.DtypeError, match="vector_add"):
        vector_add(torch.ones(3, device=device), torch.ones(3, device=device).double())
