"""opkit::geglu and its gradient: against float64, under autograd, compile and export."""

from __future__ import annotations

import pytest
import torch

import opkit
from opkit_kernels import geglu, geglu_backward
from tests.kernels.kernel_cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_compiles_once,
    assert_exports,
    assert_matches_float64,
    assert_same_for_any_number_of_threads,
    compilers,
    layout_name,
    shape_name,
)


def gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", [*SHAPES, ()], ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_and_its_backward_match_float64(device, dtype, shape, layout):
    layout = layout if shape else lambda x: x
    gate, up, grad = (
        layout(3 * torch.randn(shape, device=device).to(dtype)),
        torch.randn(shape, device=device).to(dtype),
        torch.randn(shape, device=device).to(dtype),
    )
    assert_matches_float64(geglu, (gate, up), dtype)
    assert_matches_float64(geglu, (up, gate), dtype)
    assert_matches_float64(geglu_backward, (grad, gate, up), dtype)
    assert_matches_float64(geglu_backward, (gate, up, layout(grad)), dtype)


def test_geglu_of_the_halves_of_one_tensor(device):
    gate, up = torch.randn(50, 2, 3000, device=device).chunk(2, -1)
    assert_matches_float64(geglu, (gate, up), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_geglu_of_extreme_gates(device, dtype):
    gates = torch.tensor(
        [-1e30, -1e3, -100.0, -9.0, -0.0, 1e-30, 90.0, 1e30, float("inf"), float("nan")],
        dtype=dtype,
        device=device,
    )
    ones = torch.ones_like(gates)
    torch.testing.assert_close(geglu(gates, ones), gelu(gates), equal_nan=True)
    gates = gates[1:-3]  # the gradient at 1e30 is 0 inf, no number, in torch too
    ones, leaf = ones[1:-3], gates.clone().requires_grad_()
    (expected,) = torch.autograd.grad(gelu(leaf).sum(), leaf)
    torch.testing.assert_close(geglu_backward(ones, gates, ones).gate, expected)


def test_geglu_is_deterministic(device):
    gate, up, grad = (torch.randn(300, 101, device=device) for _ in range(3))
    assert_same_for_any_number_of_threads(lambda: geglu(gate, up))
    assert_same_for_any_number_of_threads(lambda: geglu_backward(grad, gate, up))


def test_geglu_opcheck(device):
    gate, up = (torch.randn(3, 5, requires_grad=True, device=device) for _ in range(2))
    torch.library.opcheck(geglu.overload, (gate, up))
    torch.library.opcheck(geglu_backward.overload, (torch.randn(5, 3, device=device).t(), gate, up))


def test_geglu_gradients_of_both_orders(device):
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True, device=device) for _ in range(2))
    assert torch.autograd.gradcheck(geglu, (gate, up), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(geglu, (gate, up), check_fwd_over_rev=True)


@compilers
def test_geglu_compiles_once_for_all_sizes(compiler, gradients):
    cases = [torch.randn(2, rows, n).unbind() for rows, n in ((3, 8), (4, 9), (7, 100))]
    assert_compiles_once(lambda gate, up: geglu(gate * 2, up), cases, compiler, gradients)


@compilers
def test_geglu_backward_compiles_once_for_all_sizes(compiler, gradients):
    cases = [torch.randn(3, rows, n).unbind() for rows, n in ((3, 8), (4, 9), (7, 100))]
    assert_compiles_once(lambda g, gate, up: geglu_backward(g, gate * 2, up), cases, compiler, gradients)


def test_geglu_exports():
    assert_exports(lambda gate, up: geglu(gate, up), (torch.randn(3, 8), torch.randn(3, 8)), geglu)


def test_geglu_refuses_other_shapes_and_dtypes(device):
    with pytest.raises(opkit.ShapeError, match="up"):
        geglu(torch.ones(3, 4, device=device), torch.ones(4, device=device))
    with pytest.raises(opkit.DtypeError, match="up"):
        geglu(torch.ones(3, device=device), torch.ones(3, device=device).half())
