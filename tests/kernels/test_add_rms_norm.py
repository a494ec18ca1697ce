"""opkit::add_rms_norm and its gradient: rms_norm of a sum, for every backend."""

from __future__ import annotations

import pytest
import torch

import opkit
from opkit_kernels import add_rms_norm, add_rms_norm_backward, rms_norm
from tests.kernels.kernel_cases import (
    DTYPES,
    LAYOUTS,
    MANY_ROWS,
    SHAPES,
    TOLERANCES,
    assert_as_exact_as,
    assert_compiles_once,
    assert_matches_float64,
    assert_same_for_any_number_of_threads,
    compilers,
    layout_name,
    shape_name,
)


def arguments(shape, dtype, device, layout=lambda x: x):
    """Return x, residual, a gradient and weight."""
    x, residual, grad = (layout(torch.randn(shape, device=device).to(dtype)) for _ in range(3))
    return x, residual, grad, layout(torch.randn(shape[-1:], device=device).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_is_rms_norm_of_the_rounded_sum(device, dtype, shape, layout):
    x, residual, _, weight = arguments(shape, dtype, device, layout)
    y, total, rstd = add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, (x + residual).contiguous())
    expected = rms_norm.reference(total.double(), weight.double(), 1e-5)
    relative, absolute = TOLERANCES[dtype]
    torch.testing.assert_close(y.double(), expected.y, rtol=relative, atol=absolute, equal_nan=True)
    torch.testing.assert_close(rstd, expected.rstd, equal_nan=True)
    assert y.is_contiguous()
    assert total.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", [*SHAPES, MANY_ROWS], ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_backward_matches_float64(device, dtype, shape, layout):
    total, grad_sum, grad_y, weight = arguments(shape, dtype, device, layout)
    assert_matches_float64(add_rms_norm_backward, (grad_y, grad_sum, total, weight, 1e-5), dtype)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_takes_a_weight_of_another_dtype(device, dtype, weight_dtype):
    x, residual, grad, weight = arguments((5, 33), dtype, device)
    weight = weight.to(weight_dtype)
    coarser = max(dtype, weight_dtype, key=lambda d: torch.finfo(d).eps)
    assert add_rms_norm(x, residual, weight).y.dtype == dtype
    assert_matches_float64(add_rms_norm_backward, (grad, residual, x, weight), coarser)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_is_as_exact_as_torch(kernels_device, dtype):
    x, residual, grad, weight = arguments((64, 1000), dtype, kernels_device)

    def both(function, *args):
        leaves = [a.detach().clone().requires_grad_() for a in args]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    def in_torch(x, residual, weight):
        return torch.nn.functional.rms_norm(x + residual, weight.shape, weight, 1e-6)

    args = x, residual, weight
    ours, theirs = both(lambda *a: add_rms_norm(*a).y, *args), both(in_torch, *args)
    exact = both(in_torch, *(a.double() for a in args))
    for found, other, true in zip(ours, theirs, exact, strict=True):
        assert found.dtype == dtype
        assert_as_exact_as(found, other, true)


def test_add_rms_norm_gradients_of_both_outputs_meet(device):
    x, residual, grad, weight = arguments((4, 9), torch.float64, device)
    leaves = [a.clone().requires_grad_() for a in (x, residual, weight)]
    y, total, rstd = add_rms_norm(*leaves)
    assert not rstd.requires_grad
    found = torch.autograd.grad((y, total), leaves, (grad, 3 * grad))
    y, total = (
        torch.nn.functional.rms_norm(leaves[0] + leaves[1], (9,), leaves[2], 1e-6),
        leaves[0] + leaves[1],
    )
    torch.testing.assert_close(found, torch.autograd.grad((y, total), leaves, (grad, 3 * grad)))


def test_add_rms_norm_of_one_output_alone(device):
    x, residual, grad, weight = arguments((4, 9), torch.float64, device)
    x.requires_grad_()
    (found,) = torch.autograd.grad(add_rms_norm(x, residual, weight).sum, x, grad)
    assert torch.equal(found, grad)


def test_add_rms_norm_is_deterministic(backend, device):
    x, residual, grad, weight = arguments(MANY_ROWS, torch.float32, device)
    assert_same_for_any_number_of_threads(lambda: add_rms_norm(x, residual, weight))
    if backend != "reference":  # torch's own sum, in the reference, depends on the number of threads
        assert_same_for_any_number_of_threads(lambda: add_rms_norm_backward(grad, x, residual, weight))


@compilers
def test_add_rms_norm_compiles_once_for_all_sizes(compiler, gradients):
    cases = [(torch.randn(m, n), torch.randn(m, n), torch.randn(n)) for m, n in ((3, 8), (4, 9), (7, 100))]
    assert_compiles_once(lambda x, r, w: add_rms_norm(x * 2, r, w), cases, compiler, gradients)


def test_add_rms_norm_refuses_other_shapes(device):
    x = torch.ones(3, 4, device=device)
    with pytest.raises(opkit.ShapeError, match="weight"):
        add_rms_norm(x, x, torch.ones(5, device=device))
    with pytest.raises(opkit.ShapeError, match="residual"):
        add_rms_norm(x, x[:2], x[0])
    with pytest.raises(opkit.DtypeError, match="residual"):
        add_rms_norm(x, x.half(), x[0])
