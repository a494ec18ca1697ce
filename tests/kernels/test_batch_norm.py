"""opkit::batch_norm and its gradient: against float64, beside torch's own op, for every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import opkit
from opkit_kernels import batch_norm, batch_norm_backward
from tests.kernels.kernel_cases import (
    DTYPES,
    INTERPRETS,
    LAYOUTS,
    assert_as_exact_as,
    assert_compiles_once,
    assert_matches_float64,
    assert_same_for_any_number_of_threads,
    compilers,
    layout_name,
    shape_name,
)

# No samples, no elements, no channels, odd sizes, rows of channels with one and with many samples, short planes, and
# planes of more than a chunk.
SHAPES = (
    (0, 4, 3), (2, 4, 0), (2, 0, 3), (2, 1, 1), (2, 6, 5), (3, 6, 7, 5), (50, 8), (30, 70), (2, 2, 3, 5, 7),
    (80, 3) if INTERPRETS else (3000, 33), (50, 5, 2, 3), (2, 3, 41, 103),
)  # fmt: skip


def arguments(shape, dtype, device, layout=lambda x: x):
    """Return x, a gradient of y, weight and bias."""
    x, grad = (layout(torch.randn(shape, device=device).to(dtype)) for _ in range(2))
    weight, bias = (layout(torch.randn(shape[1], device=device).to(dtype)) for _ in range(2))
    return x, grad, weight, bias


def running(channels, device, dtype=torch.float32):
    """Return running statistics."""
    return torch.randn(channels, device=device).to(dtype), torch.rand(channels, device=device).to(dtype)


def skip_where_torch_is_inexact(backend, layout):
    """Skip the reference on samples that are all alike: the error of torch's mean is all that it divides by."""
    if backend == "reference" and layout.__name__ == "expanded":
        pytest.skip("torch's mean of equal numbers is another number")


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_matches_float64(backend, device, dtype, shape, layout):
    skip_where_torch_is_inexact(backend, layout)
    x, _, weight, bias = arguments(shape, dtype, device, layout)
    assert_matches_float64(batch_norm, (x, weight, bias, *running(shape[1], device), 0.1, 1e-5), dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_backward_matches_float64(backend, device, dtype, shape, layout):
    skip_where_torch_is_inexact(backend, layout)
    x, grad, weight, bias = arguments(shape, dtype, device, layout)
    mean = batch_norm(x, weight, bias, *running(shape[1], device)).mean
    assert_matches_float64(batch_norm_backward, (grad, x, weight, bias, mean, 1e-5), dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("running_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 8), (4, 3, 7)], ids=shape_name)
def test_batch_norm_updates_running_statistics_as_torch_does(device, shape, running_dtype, layout):
    x, _, weight, bias = arguments(shape, torch.float32, device)
    mean, var = (layout(r) for r in running(shape[1], device, running_dtype))
    expected = mean.double().clone(), var.double().clone()
    batch_norm(x, weight, bias, mean, var, momentum=0.3)
    F.batch_norm(x.double(), *expected, training=True, momentum=0.3)
    tolerance = 2 * torch.finfo(running_dtype).eps
    torch.testing.assert_close(mean.double(), expected[0], rtol=tolerance, atol=max(tolerance, 1e-6))
    torch.testing.assert_close(var.double(), expected[1], rtol=max(tolerance, 1e-6), atol=tolerance)


def test_batch_norm_leaves_running_statistics_where_x_has_no_elements(device):
    mean, var = running(4, device)
    before = mean.clone(), var.clone()
    batch_norm(torch.ones(0, 4, 3, device=device), None, None, mean, var)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_batch_norm_of_one_value_has_no_unbiased_variance(device):
    mean, var = running(2, device)
    expected = 0.9 * mean + 0.1
    y, _, _ = batch_norm(torch.ones(1, 2, device=device), None, None, mean, var)
    torch.testing.assert_close(mean, expected)
    assert var.isnan().all()
    assert torch.equal(y.cpu(), torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_takes_weight_and_bias_of_another_dtype_or_none(device, dtype):
    x, grad, weight, bias = arguments((3, 6, 9), dtype, device)
    for given in ((weight.double(), bias.float()), (None, None), (weight, None), (None, bias)):
        assert_matches_float64(batch_norm, (x, *given, *running(6, device)), dtype)
        mean = batch_norm(x, *given, *running(6, device)).mean
        found = batch_norm_backward(grad, x, *given, mean)
        assert [g.dtype for g in found[1:]] == [dtype if v is None else v.dtype for v in given]
        assert_matches_float64(batch_norm_backward, (grad, x, *given, mean), dtype)


@pytest.mark.parametrize("shape", [(16, 8, 30, 31), (3000, 20)], ids=shape_name)
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_is_as_exact_as_torch(kernels_device, dtype, offset, shape):
    x, grad, weight, bias = arguments(shape, dtype, kernels_device)
    x = x + offset
    stats = running(shape[1], kernels_device)

    def both(function, *args):
        leaves = [a.detach().clone().requires_grad_() for a in args]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    def in_torch(x, w, b):
        return F.batch_norm(x, *(s.to(w.dtype) for s in stats), w, b, training=True)

    args = x, weight, bias
    ours, theirs = both(lambda *a: batch_norm(*a, *stats).y, *args), both(in_torch, *args)
    exact = both(in_torch, *(a.double() for a in args))
    for found, other, true in zip(ours, theirs, exact, strict=True):
        assert found.dtype == dtype
        assert_as_exact_as(found, other, true)


def test_batch_norm_gradient_is_the_same_for_any_number_near_the_mean(device):
    x, grad, weight, bias = arguments((4, 3, 50), torch.float64, device)
    mean = batch_norm(x, weight, bias, *running(3, device)).mean
    expected = batch_norm_backward(grad, x, weight, bias, mean)
    torch.testing.assert_close(batch_norm_backward(grad, x, weight, bias, mean + 1), expected)


def test_batch_norm_of_extreme_channels(device):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, 1.0, inf, 7.0], [0.0, nan, 1.0, 7.0]], device=device)
    y, mean, rstd = (out.cpu() for out in batch_norm(x, None, None, *running(4, device), 0.1, 1e-6))
    expected = F.batch_norm(x.cpu(), None, None, training=True, eps=1e-6)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert mean[3] == 7
    assert rstd[3] == pytest.approx(1e3)


def test_batch_norm_is_deterministic(backend, device):
    for shape in ((7, 6, 11, 13), (80, 3) if INTERPRETS else (3001, 65)):
        x, grad, weight, bias = arguments(shape, torch.float32, device)
        stats = running(shape[1], device)
        if backend != "reference":  # torch's own sum, in the reference, depends on the number of threads
            assert_same_for_any_number_of_threads(
                lambda: batch_norm(x, weight, bias, *(s.clone() for s in stats))
            )
            assert_same_for_any_number_of_threads(
                lambda: batch_norm_backward(grad, x, weight, bias, stats[0] * 0)
            )


@compilers
def test_batch_norm_compiles_once_for_all_sizes(compiler, gradients):
    def call(x, weight, bias):
        stats = torch.zeros_like(weight), torch.ones_like(weight)
        return (*batch_norm(x * 2, weight, bias, *(s.detach() for s in stats)), *stats)

    cases = [
        (torch.randn(b, c, n), torch.randn(c), torch.randn(c))
        for b, c, n in ((2, 4, 8), (3, 6, 9), (4, 8, 5))
    ]
    assert_compiles_once(call, cases, compiler, gradients)


def test_batch_norm_refuses_statistics_of_another_size(device):
    x, ones = torch.ones(3, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(opkit.ShapeError, match="running_var"):
        batch_norm(x, None, None, ones, torch.ones(5, device=device))
    with pytest.raises(opkit.ShapeError, match="x"):
        batch_norm(ones, None, None, ones, ones)
