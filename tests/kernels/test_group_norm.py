"""opkit::group_norm and its gradient: against float64, beside torch's own op, for every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import opkit
from opkit_kernels import group_norm, group_norm_backward
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

# Shapes of x and groups: no samples, no elements, no channels, one of each, layer norm, instance norm, odd sizes,
# channels without more, and more elements than a chunk.
CASES = [
    ((0, 4, 3), 2), ((2, 4, 0), 2), ((2, 0, 3), 1), ((1, 1, 1), 1), ((2, 6, 5), 1), ((2, 6, 5), 6),
    ((3, 6, 7, 5), 2), ((5, 80), 4), ((2, 2, 3, 5, 7), 1), ((1, 4, 41, 103), 2), ((2, 1, 5001), 1),
]  # fmt: skip
EVERY_CASE = pytest.mark.parametrize(
    ("shape", "groups"),
    CASES[:-2] if INTERPRETS else CASES,
    ids=lambda v: v if isinstance(v, int) else shape_name(v),
)


def arguments(shape, dtype, device, layout=lambda x: x):
    """Return x, a gradient of y, weight and bias."""
    x, grad = (layout(torch.randn(shape, device=device).to(dtype)) for _ in range(2))
    weight, bias = (layout(torch.randn(shape[1], device=device).to(dtype)) for _ in range(2))
    return x, grad, weight, bias


@EVERY_CASE
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_matches_float64(device, dtype, shape, groups, layout):
    x, _, weight, bias = arguments(shape, dtype, device, layout)
    assert_matches_float64(group_norm, (x, groups, weight, bias, 1e-5), dtype)


@EVERY_CASE
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_backward_matches_float64(device, dtype, shape, groups, layout):
    x, grad, weight, bias = arguments(shape, dtype, device, layout)
    assert_matches_float64(group_norm_backward, (grad, x, groups, weight, bias, 1e-5), dtype)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_takes_weight_and_bias_of_another_dtype(device, dtype, weight_dtype):
    x, grad, weight, bias = arguments((3, 6, 9), dtype, device)
    weight, bias = weight.to(weight_dtype), bias.float()
    coarser = max(dtype, weight_dtype, torch.float32, key=lambda d: torch.finfo(d).eps)
    assert_matches_float64(group_norm, (x, 2, weight, bias), dtype)
    assert_matches_float64(group_norm_backward, (grad, x, 2, weight, bias), coarser)
    found = group_norm_backward(grad, x, 2, weight, bias)
    assert [g.dtype for g in found] == [dtype, weight_dtype, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_does_without_weight_and_bias(device, dtype):
    x, grad, weight, bias = arguments((3, 6, 9), dtype, device)
    for given in ((None, None), (weight, None), (None, bias)):
        assert_matches_float64(group_norm, (x, 3, *given), dtype)
        assert_matches_float64(group_norm_backward, (grad, x, 3, *given), dtype)


@pytest.mark.parametrize("case", [((4, 8, 30, 31), 2), ((2, 4, 90, 91), 4)], ids=str)
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_is_as_exact_as_torch(kernels_device, dtype, offset, case):
    shape, groups = case
    x, grad, weight, bias = arguments(shape, dtype, kernels_device)
    x = x + offset

    def both(function, *args):
        leaves = [a.detach().clone().requires_grad_() for a in args]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    args = x, weight, bias
    ours = both(lambda x, w, b: group_norm(x, groups, w, b).y, *args)
    theirs = both(lambda x, w, b: F.group_norm(x, groups, w, b), *args)
    exact = both(lambda x, w, b: F.group_norm(x, groups, w, b), *(a.double() for a in args))
    for found, other, true in zip(ours, theirs, exact, strict=True):
        assert found.dtype == dtype
        assert_as_exact_as(found, other, true)


def test_group_norm_is_layer_norm_and_instance_norm(device):
    x, _, weight, bias = arguments((3, 4, 5, 6), torch.float32, device)
    torch.testing.assert_close(group_norm(x, 4, weight, bias).y, F.instance_norm(x, None, None, weight, bias))
    torch.testing.assert_close(group_norm(x, 1, None, None).y, F.layer_norm(x, x.shape[1:]))


def test_group_norm_of_extreme_groups(device):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[[0.0, 0.0], [1.0, nan], [inf, 1.0], [7.0, 7.0]]], device=device)
    y, mean, rstd = (out.cpu() for out in group_norm(x, 4, None, None, 1e-6))
    torch.testing.assert_close(y, F.group_norm(x.cpu(), 4, eps=1e-6), equal_nan=True)
    assert mean[0, 3] == 7
    assert rstd[0, 3] == pytest.approx(1e3)


def test_group_norm_is_deterministic(backend, device):
    x, grad, weight, bias = arguments((7, 6, 11, 13), torch.float32, device)
    assert_same_for_any_number_of_threads(lambda: group_norm(x, 2, weight, bias))
    if backend != "reference":  # torch's own sum, in the reference, depends on the number of threads
        assert_same_for_any_number_of_threads(lambda: group_norm_backward(grad, x, 2, weight, bias))


@compilers
def test_group_norm_compiles_once_for_all_sizes(compiler, gradients):
    cases = [
        (torch.randn(b, c, n), torch.randn(c), torch.randn(c))
        for b, c, n in ((2, 4, 8), (3, 6, 9), (4, 8, 5))
    ]
    assert_compiles_once(lambda x, w, b: group_norm(x * 2, 2, w, b), cases, compiler, gradients)


@pytest.mark.parametrize("groups", [0, 3])
def test_group_norm_refuses_groups_that_do_not_divide_the_channels(backend, device, groups):
    x = torch.ones(2, 4, 5, device=device)
    with pytest.raises((opkit.ShapeError, RuntimeError), match=f"groups is {groups}, and x has 4 channels"):
        group_norm(x, groups, None, None)
    with pytest.raises((opkit.ShapeError, RuntimeError), match=f"groups is {groups}, and x has 4 channels"):
        group_norm_backward(x, x, groups, None, None)


def test_group_norm_refuses_a_weight_of_another_size(device):
    with pytest.raises(opkit.ShapeError, match="weight"):
        group_norm(torch.ones(3, 4, device=device), 2, torch.ones(5, device=device), None)
