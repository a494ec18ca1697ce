"""opkit::rms_norm and its gradient: against float64, under autograd, compile and export."""

from __future__ import annotations

import pytest
import torch

import opkit
from opkit_kernels import rms_norm, rms_norm_backward
from tests.kernels.kernel_cases import (
    DTYPES,
    LAYOUTS,
    MANY_ROWS,
    SHAPES,
    assert_as_exact_as,
    assert_compiles_once,
    assert_exports,
    assert_matches_float64,
    assert_same_for_any_number_of_threads,
    compilers,
    layout_name,
    shape_name,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_matches_float64(device, dtype, shape, layout):
    x = layout(torch.randn(shape, device=device).to(dtype))
    weight = layout(torch.randn(shape[-1:], device=device).to(dtype))
    assert_matches_float64(rms_norm, (x, weight, 1e-5), dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", [*SHAPES, MANY_ROWS], ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_backward_matches_float64(device, dtype, shape, layout):
    x = layout(torch.randn(shape, device=device).to(dtype))
    grad = layout(torch.randn(shape, device=device).to(dtype))
    weight = layout(torch.randn(shape[-1:], device=device).to(dtype))
    assert_matches_float64(rms_norm_backward, (grad, x, weight, 1e-5), dtype)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_takes_a_weight_of_another_dtype(device, dtype, weight_dtype):
    x, grad, weight = (
        torch.randn(5, 33, device=device).to(dtype),
        torch.randn(5, 33, device=device).to(dtype),
        torch.randn(33, device=device).to(weight_dtype),
    )
    coarser = max(dtype, weight_dtype, key=lambda d: torch.finfo(d).eps)
    assert_matches_float64(rms_norm, (x, weight), dtype)
    assert_matches_float64(rms_norm_backward, (grad, x, weight), coarser)
    assert rms_norm(x, weight).y.dtype == dtype
    assert rms_norm_backward(grad, x, weight).weight.dtype == weight_dtype


def test_rms_norm_agrees_with_torch(device):
    x, weight = torch.randn(4, 9, 65, device=device), torch.randn(65, device=device)
    expected = torch.nn.functional.rms_norm(x, (65,), weight, eps=1e-6)
    torch.testing.assert_close(rms_norm(x, weight).y, expected)


def test_rms_norm_of_extreme_rows(device):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, 0.0], [1.0, nan], [inf, 1.0], [1e18, 1e18], [1e-30, 1e-30]], device=device)
    y, rstd = (out.cpu() for out in rms_norm(x, torch.ones(2, device=device), 1e-6))
    assert torch.equal(y[0], torch.zeros(2))
    assert rstd[0] == pytest.approx(1e3)
    assert y[1].isnan().all()
    assert rstd[1].isnan()
    assert y[2, 0].isnan()
    assert y[2, 1] == 0
    assert rstd[2] == 0
    assert y[3].tolist() == pytest.approx([1.0, 1.0])
    assert y[4].tolist() == pytest.approx([1e-27, 1e-27])


def test_rms_norm_backward_is_deterministic(backend, device):
    x, grad = (torch.randn(3001, 65, device=device) for _ in range(2))
    weight = torch.randn(65, device=device)
    assert_same_for_any_number_of_threads(lambda: rms_norm(x, weight))
    if backend != "reference":  # torch's own sum, in the reference, depends on the number of threads
        assert_same_for_any_number_of_threads(lambda: rms_norm_backward(grad, x, weight))


def test_rms_norm_opcheck(device):
    x = torch.randn(3, 5, requires_grad=True, device=device)
    weight = torch.randn(5, requires_grad=True, device=device)
    torch.library.opcheck(rms_norm.overload, (x, weight, 1e-5))
    torch.library.opcheck(rms_norm_backward.overload, (torch.randn(3, 5, device=device), x, weight, 1e-5))


def test_rms_norm_gradients_of_both_orders(device):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True, device=device)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True, device=device)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w).y, (x, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w).y, (x, weight), check_fwd_over_rev=True)


def test_rms_norm_rstd_has_no_gradient(device):
    x = torch.randn(2, 5, requires_grad=True, device=device)
    y, rstd = rms_norm(x, torch.ones(5, device=device))
    assert y.requires_grad
    assert not rstd.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_trains_like_torch(device, dtype):
    x = torch.randn(6, 40, device=device).to(dtype).requires_grad_()
    weight = torch.randn(40, device=device).to(dtype).requires_grad_()
    grad = torch.randn(6, 40, device=device).to(dtype)
    found = torch.autograd.grad(rms_norm(x, weight, 1e-5).y, (x, weight), grad)
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y = torch.nn.functional.rms_norm(x64, (40,), weight64, 1e-5)
    expected = torch.autograd.grad(y, (x64, weight64), grad.double())
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(
            got, want.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )


@compilers
def test_rms_norm_compiles_once_for_all_sizes(compiler, gradients):
    cases = [(torch.randn(rows, n), torch.randn(n)) for rows, n in ((3, 8), (4, 9), (7, 100))]
    assert_compiles_once(lambda x, w: rms_norm(x * 2, w), cases, compiler, gradients)


@compilers
def test_rms_norm_backward_compiles_once_for_all_sizes(compiler, gradients):
    cases = [(torch.randn(m, n), torch.randn(m, n), torch.randn(n)) for m, n in ((3, 8), (4, 9), (7, 100))]
    assert_compiles_once(lambda g, x, w: rms_norm_backward(g, x * 2, w), cases, compiler, gradients)


def test_rms_norm_exports():
    assert_exports(lambda x, w: rms_norm(x, w).y, (torch.randn(3, 8), torch.randn(8)), rms_norm)


def test_rms_norm_refuses_a_weight_of_another_size(device):
    with pytest.raises(opkit.ShapeError, match="weight"):
        rms_norm(torch.ones(3, 4, device=device), torch.ones(5, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 3])
def test_rms_norm_is_as_exact_as_torch(kernels_device, dtype, offset):
    x, grad = (torch.randn(64, 1000, device=kernels_device).to(dtype) for _ in range(2))
    x, weight = x + offset, torch.randn(1000, device=kernels_device).to(dtype)

    def both(function, *args):
        leaves = [a.detach().clone().requires_grad_() for a in args]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    def in_torch(x, weight):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)

    ours, theirs = both(lambda *a: rms_norm(*a).y, x, weight), both(in_torch, x, weight)
    exact = both(in_torch, x.double(), weight.double())
    for found, other, true in zip(ours, theirs, exact, strict=True):
        assert_as_exact_as(found, other, true)
