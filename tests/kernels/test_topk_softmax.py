"""opkit::topk_softmax and its gradient: against float64, under autograd, compile and export."""

from __future__ import annotations

import pytest
import torch

import opkit
from opkit_kernels import topk_softmax, topk_softmax_backward
from tests.kernels.kernel_cases import (
    DTYPES,
    INTERPRETS,
    LAYOUTS,
    assert_as_exact_as,
    assert_compiles_once,
    assert_exports,
    assert_matches_float64,
    assert_same_for_any_number_of_threads,
    compilers,
    layout_name,
    shape_name,
)

# Rows and k: none, one, all of a row, sizes off the vector width, and those beyond what a warp holds in registers.
SHAPES = (
    ((0, 5), 2), ((3, 5), 0), ((3, 0), 0), ((1,), 1), ((7,), 7), ((3, 16), 2), ((2, 3, 65), 4), ((4, 129), 129),
    ((2, 300), 3), ((7, 600), 40), ((5, 60) if INTERPRETS else (150, 60), 8),
)  # fmt: skip
both = pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "plain"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=[f"{shape_name(s)}-{k}" for s, k in SHAPES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_softmax_and_its_backward_match_float64(device, dtype, shape, k, layout):
    logits = layout(2 * torch.randn(shape).to(device, dtype))  # some are equal, in 16 bits
    grad = layout(torch.randn(*shape[:-1], k).to(device, dtype))
    for normalise in (True, False):
        assert_matches_float64(topk_softmax, (logits, k, normalise), dtype)
        indices = topk_softmax(logits, k, normalise).indices
        assert_matches_float64(topk_softmax_backward, (grad, logits, indices, normalise), dtype)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_softmax_is_as_exact_as_torch(device, dtype, normalise):
    if INTERPRETS and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts digits off instead of rounding")
    logits = torch.randn(300 if INTERPRETS else 2000, 64).to(device, dtype)
    found = topk_softmax(logits, 4, normalise)
    theirs, exact = (x.softmax(-1).gather(-1, found.indices) for x in (logits, logits.double()))
    if normalise:
        theirs, exact = (x / x.sum(-1, keepdim=True) for x in (theirs, exact))
    assert_as_exact_as(found.weights, theirs, exact)


@both
def test_topk_softmax_takes_the_first_of_equal_logits(device, normalise):
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0], [0.0, -0.0, 0.0, -0.0, 0.0]], device=device)
    assert topk_softmax(logits, 3, normalise).indices.tolist() == [[1, 3, 0], [0, 1, 2]]


@both
def test_topk_softmax_orders_what_rounds_to_the_same_probability(device, normalise):
    logits = torch.tensor([-300.0, 0.0, -200.0], device=device)
    weights, indices = topk_softmax(logits, 3, normalise)
    assert indices.tolist() == [1, 2, 0]
    assert weights.tolist() == [1.0, 0.0, 0.0]


@both
def test_topk_softmax_of_rows_that_are_not_finite(device, normalise):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor(
        [[-inf, 0.0, -inf], [-inf, -inf, -inf], [0.0, inf, 1.0], [0.0, nan, inf], [nan, 2.0, -nan]],
        device=device,
    )
    weights, indices = topk_softmax(logits, 2, normalise)
    assert indices.tolist() == [[1, 0], [0, 1], [1, 2], [1, 2], [0, 2]]
    assert weights[0].tolist() == [1.0, 0.0]
    assert weights[1:].isnan().all()


@both
def test_topk_softmax_agrees_with_torch(device, normalise):
    logits = torch.randn(40, 60, device=device)
    weights, indices = logits.softmax(-1).topk(8)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    found = topk_softmax(logits, 8, normalise)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.weights, weights)


@both
def test_topk_softmax_gradients_of_both_orders(device, normalise):
    logits = torch.randn(2, 3, 7, dtype=torch.float64).to(device).requires_grad_()

    def call(logits):
        return topk_softmax(logits, 3, normalise).weights

    assert torch.autograd.gradcheck(call, (logits,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (logits,), check_fwd_over_rev=True)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_softmax_trains_like_torch(device, dtype, normalise):
    logits = torch.randn(30, 16).to(device, dtype).requires_grad_()
    grad = torch.randn(30, 4).to(device, dtype)
    weights, indices = topk_softmax(logits, 4, normalise)
    assert not indices.requires_grad
    (found,) = torch.autograd.grad(weights, logits, grad)
    exact = logits.detach().double().requires_grad_()
    chosen = exact.softmax(-1).gather(-1, indices)
    chosen = chosen / chosen.sum(-1, keepdim=True) if normalise else chosen
    (expected,) = torch.autograd.grad(chosen, exact, grad.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected.to(dtype), rtol=4 * eps, atol=2 * eps)


def test_topk_softmax_backward_adds_up_what_an_index_gets_twice(device):
    grad, indices = torch.tensor([1.0, 2.0, 4.0], device=device), torch.tensor([2, 0, 2], device=device)
    for normalise in (True, False):
        assert_matches_float64(
            topk_softmax_backward, (grad, torch.randn(5, device=device), indices, normalise), torch.float32
        )


@pytest.mark.parametrize("k", [-1, 6])
def test_topk_softmax_refuses_a_k_that_rows_do_not_have(device, k):
    with pytest.raises((RuntimeError, opkit.ShapeError), match=str(k)):
        topk_softmax(torch.zeros(3, 5, device=device), k)


@pytest.mark.parametrize("bad", [-1, 5])
def test_topk_softmax_backward_refuses_an_index_out_of_range(backend, device, bad):
    if device == "cuda":
        pytest.skip("a device-side assertion, after which the process cannot use the device")
    with pytest.raises((RuntimeError, AssertionError), match="out of (range|bounds)"):
        topk_softmax_backward(
            torch.ones(1, device=device), torch.zeros(5, device=device), torch.tensor([bad], device=device)
        )


def test_topk_softmax_refuses_other_shapes(device):
    with pytest.raises(opkit.ShapeError, match="indices"):
        topk_softmax_backward(
            torch.ones(2, 3, device=device),
            torch.zeros(2, 5, device=device),
            torch.zeros(2, 2, dtype=torch.int64, device=device),
        )


@both
def test_topk_softmax_is_deterministic(device, normalise):
    logits = torch.randn(3 if INTERPRETS else 301, 101, device=device)
    found = topk_softmax(logits, 7, normalise)
    assert_same_for_any_number_of_threads(lambda: tuple(topk_softmax(logits, 7, normalise)))
    assert_same_for_any_number_of_threads(
        lambda: topk_softmax_backward(found.weights, logits, found.indices, normalise)
    )


@compilers
def test_topk_softmax_compiles_once_for_all_sizes(compiler, gradients):
    cases = [(torch.randn(rows, n),) for rows, n in ((3, 8), (4, 9), (7, 100))]
    assert_compiles_once(lambda x: topk_softmax(x * 2, 4).weights, cases, compiler, gradients)


def test_topk_softmax_exports():
    assert_exports(lambda x: topk_softmax(x, 2), (torch.randn(3, 8),), topk_softmax)
