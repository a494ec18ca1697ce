"""opkit::layer_norm and its gradient: against float64, beside torch's own op, for every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import opkit
from opkit_kernels import layer_norm, layer_norm_backward
from tests.kernels.kernel_cases import (
    DTYPES,
    LAYOUTS,
    MANY_ROWS,
    SHAPES,
    assert_as_exact_as,
    assert_compiles_once,
    assert_matches_float64,
    assert_same_for_any_number_of_threads,
    compilers,
    layout_name,
    shape_name,
)


def arguments(shape, dtype, device, layout=lambda x: x):
    """Return x, a gradient of y, weight and bias."""
    x, grad = (layout(torch.randn(shape, device=device).to(dtype)) for _ in range(2))
    weight, bias = (layout(torch.randn(shape[-1:], device=device).to(dtype)) for _ in range(2))
    return x, grad, weight, bias


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_matches_float64(device, dtype, shape, layout):
    x, _, weight, bias = arguments(shape, dtype, device, layout)
    assert_matches_float64(layer_norm, (x, weight, bias, 1e-5), dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", [*SHAPES, MANY_ROWS], ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_backward_matches_float64(device, dtype, shape, layout):
    x, grad, weight, bias = arguments(shape, dtype, device, layout)
    assert_matches_float64(layer_norm_backward, (grad, x, weight, bias, 1e-5), dtype)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_takes_weight_and_bias_of_another_dtype(device, dtype, weight_dtype):
    x, grad, weight, bias = arguments((5, 33), dtype, device)
    weight, bias = weight.to(weight_dtype), bias.float()
    coarser = max(dtype, weight_dtype, torch.float32, key=lambda d: torch.finfo(d).eps)
    assert_matches_float64(layer_norm, (x, weight, bias), dtype)
    assert_matches_float64(layer_norm_backward, (grad, x, weight, bias), coarser)
    found = layer_norm_backward(grad, x, weight, bias)
    assert [g.dtype for g in found] == [dtype, weight_dtype, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_does_without_weight_and_bias(device, dtype):
    x, grad, weight, bias = arguments((5, 33), dtype, device)
    for given in ((None, None), (weight, None), (None, bias)):
        assert_matches_float64(layer_norm, (x, *given), dtype)
        assert_matches_float64(layer_norm_backward, (grad, x, *given), dtype)
    x.requires_grad_()
    (found,) = torch.autograd.grad(layer_norm(x, None, None).y, x, grad)
    assert torch.equal(found, layer_norm_backward(grad, x, None, None).x)


@pytest.mark.parametrize("shape", [(64, 1000), (5, 20000)], ids=shape_name)
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_is_as_exact_as_torch(kernels_device, dtype, offset, shape):
    device = kernels_device
    x, grad, weight, bias = arguments(shape, dtype, device)
    x = x + offset

    def both(function, *args):
        leaves = [a.detach().clone().requires_grad_() for a in args]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    args = x, weight, bias
    ours = both(lambda *a: layer_norm(*a).y, *args)
    theirs = both(lambda x, w, b: F.layer_norm(x, w.shape, w, b), *args)
    exact = both(lambda x, w, b: F.layer_norm(x, w.shape, w, b), *(a.double() for a in args))
    for found, other, true in zip(ours, theirs, exact, strict=True):
        assert found.dtype == dtype
        assert_as_exact_as(found, other, true)


def test_layer_norm_of_extreme_rows(device):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, 0.0], [1.0, nan], [inf, 1.0], [7.0, 7.0], [1e6, 1e6 + 1]], device=device)
    y, mean, rstd = (out.cpu() for out in layer_norm(x, None, None, 1e-6))
    expected = F.layer_norm(x.cpu(), (2,), eps=1e-6)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert torch.equal(y[3], torch.zeros(2))
    assert mean[3] == 7
    assert rstd[3] == pytest.approx(1e3)


def test_layer_norm_of_rows_without_elements(device):
    _, mean, rstd = layer_norm(torch.ones(3, 0, device=device), None, None)
    assert mean.isnan().all()
    assert rstd.isnan().all()


def test_layer_norm_of_a_row_that_begins_far_from_its_mean(device):
    """Where the gradient guesses the mean from the beginning of the row."""
    x, grad, weight, bias = arguments((2, 10000), torch.float32, device)
    x[:, :4096] += 1000
    assert_matches_float64(layer_norm_backward, (grad, x, weight, bias), torch.float32)


def test_layer_norm_is_deterministic(backend, device):
    x, grad, weight, bias = arguments(MANY_ROWS, torch.float32, device)
    assert_same_for_any_number_of_threads(lambda: layer_norm(x, weight, bias))
    if backend != "reference":  # torch's own sum, in the reference, depends on the number of threads
        assert_same_for_any_number_of_threads(lambda: layer_norm_backward(grad, x, weight, bias))


def test_layer_norm_statistics_have_no_gradient(device):
    x = torch.randn(2, 5, requires_grad=True, device=device)
    y, mean, rstd = layer_norm(x, None, None)
    assert [out.requires_grad for out in (y, mean, rstd)] == [True, False, False]


@compilers
def test_layer_norm_compiles_once_for_all_sizes(compiler, gradients):
    cases = [(torch.randn(rows, n), torch.randn(n), torch.randn(n)) for rows, n in ((3, 8), (4, 9), (7, 100))]
    assert_compiles_once(lambda x, w, b: layer_norm(x * 2, w, b), cases, compiler, gradients)


def test_layer_norm_refuses_a_weight_of_another_size(device):
    with pytest.raises(opkit.ShapeError, match="weight"):
        layer_norm(torch.ones(3, 4, device=device), torch.ones(5, device=device), None)
    with pytest.raises(opkit.ShapeError, match="bias"):
        layer_norm(torch.ones(3, 4, device=device), None, torch.ones(5, device=device))
