"""opkit::cross_entropy and its gradient: against float64, under autograd, compile and export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit
from opkit_kernels import cross_entropy, cross_entropy_backward
from tests.kernels.kernel_cases import (
    DTYPES,
    INTERPRETS,
    LAYOUTS,
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

WITH_CLASSES = [shape for shape in SHAPES if shape[-1] > 0]


def logits_and_target(shape, dtype, layout=lambda x: x, device="cpu") -> tuple[Tensor, Tensor]:
    target = torch.randint(shape[-1], shape[:-1], device=device)
    return layout(3 * torch.randn(shape, device=device).to(dtype)), layout(target) if target.dim() else target


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", WITH_CLASSES, ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_and_its_backward_match_float64(device, dtype, shape, layout):
    logits, target = logits_and_target(shape, dtype, layout, device=device)
    assert_matches_float64(cross_entropy, (logits, target), dtype)
    lse = torch.logsumexp(logits.double(), -1)
    grads = torch.randn(shape[:-1], device=device).to(dtype), torch.randn(shape[:-1], device=device).double()
    assert_matches_float64(cross_entropy_backward, (*grads, logits, target, lse), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_agrees_with_torch(device, dtype):
    logits, target = logits_and_target((50, 101), dtype, device=device)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    loss = cross_entropy(logits, target).loss
    assert loss.dtype == expected.dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=4 * eps, atol=16 * eps)


def test_cross_entropy_of_rows_without_classes(device):
    loss, lse = cross_entropy(
        torch.empty(0, 0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    )
    assert loss.shape == lse.shape == (0,)
    with pytest.raises(RuntimeError):
        cross_entropy(torch.empty(2, 0, device=device), torch.zeros(2, dtype=torch.int64, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cross_entropy_of_large_logits(device, dtype):
    logits = torch.tensor(
        [[1e30, 0.0], [-1e9, -1e9], [1e4, 1e4], [800.0, 0.0], [-800.0, 0.0]], dtype=dtype, device=device
    )
    target = torch.tensor([1, 0, 1, 0, 0], device=device)
    loss, lse = cross_entropy(logits, target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    ones = torch.ones(5, dtype=dtype, device=device)
    grad = cross_entropy_backward(ones, torch.zeros(5, device=device).double(), logits, target, lse)
    expected = torch.softmax(logits.double(), -1) - torch.nn.functional.one_hot(target, 2)
    torch.testing.assert_close(grad.double(), expected)


def test_cross_entropy_of_rows_that_are_not_finite(device):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[-inf, 0.0], [-inf, -inf], [inf, 0.0], [nan, 0.0]], device=device)
    loss, lse = cross_entropy(logits, torch.tensor([1, 0, 1, 1], device=device))
    torch.testing.assert_close(lse, torch.logsumexp(logits.double(), -1), equal_nan=True)
    assert loss[0] == 0
    assert loss[1].isnan()
    assert loss[2] == inf
    assert loss[3].isnan()


def test_cross_entropy_gradient_of_a_masked_class_is_zero(device):
    logits = torch.tensor([[float("-inf"), 1.0, 1.0]], requires_grad=True, device=device)
    (grad,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([1], device=device)).loss.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[0.0, -0.5, 0.5]], device=device))


@pytest.mark.parametrize("bad", [-1, 5, -99, 2**62])
def test_cross_entropy_refuses_a_target_out_of_range(backend, device, bad):
    if device == "cuda":
        pytest.skip("a device-side assertion, after which the process cannot use the device")
    logits, target = torch.randn(40, 5, device=device), torch.zeros(40, dtype=torch.int64, device=device)
    target[17] = bad
    zeros = torch.zeros(40, device=device)
    text = str(bad) if backend != "triton" else "a target is out of range"
    with pytest.raises(RuntimeError, match=text):
        cross_entropy(logits, target)
    with pytest.raises(RuntimeError, match=text):
        cross_entropy_backward(zeros, zeros.double(), logits, target, zeros.double())
    assert cross_entropy(logits, target, ignore_index=bad).loss[17] == 0


def test_cross_entropy_names_the_row_of_a_target_out_of_range():
    target = torch.zeros(40_000, dtype=torch.int64)
    target[31_007] = 5
    with (
        opkit.use_backend("cpp"),
        pytest.raises(RuntimeError, match=r"cross_entropy: target 5 of row 31007 .* < 5"),
    ):
        cross_entropy(torch.randn(40_000, 5), target)


def test_cross_entropy_is_deterministic(device):
    logits, target = logits_and_target((301, 203), torch.float32, device=device)
    lse = torch.logsumexp(logits.double(), -1)
    ones = torch.ones(301, device=device)
    assert_same_for_any_number_of_threads(lambda: cross_entropy(logits, target))
    assert_same_for_any_number_of_threads(
        lambda: cross_entropy_backward(ones, ones.double(), logits, target, lse)
    )


def test_cross_entropy_opcheck(device):
    logits, target = logits_and_target((3, 5), torch.float32, device=device)
    torch.library.opcheck(cross_entropy.overload, (logits.requires_grad_(), target))
    grads = torch.ones(3, device=device), torch.ones(3, device=device).double()
    lse = torch.logsumexp(logits.detach().double(), -1)
    torch.library.opcheck(cross_entropy_backward.overload, (*grads, logits, target, lse))


def test_cross_entropy_gradients_of_both_orders(device):
    logits, target = logits_and_target((2, 3, 5), torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda x: tuple(cross_entropy(x, target)), logits.requires_grad_(), check_forward_ad=True
    )
    assert torch.autograd.gradgradcheck(
        lambda x: tuple(cross_entropy(x, target)), logits, check_fwd_over_rev=True
    )


def test_cross_entropy_z_loss(device):
    logits, target = logits_and_target((7, 11), torch.float64, device=device)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, lse = cross_entropy(leaf, target)
    (loss.mean() + 1e-2 * lse.square().mean()).backward()
    expected = (
        torch.nn.functional.cross_entropy(other, target) + 1e-2 * torch.logsumexp(other, -1).square().mean()
    )
    expected.backward()
    torch.testing.assert_close(leaf.grad, other.grad)


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"label_smoothing": 1.0, "ignore_index": 3, "z_loss": 1e-4},
    ],
    ids=["plain", "smooth", "z", "all"],
)


@OPTIONS
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_with_options_matches_float64(device, dtype, layout, options):
    for shape in ((4,), (6, 9), (2, 3, 65)):
        logits, target = logits_and_target(shape, dtype, layout, device=device)
        ignored = options.get("ignore_index", -100)
        target = torch.where(torch.rand(shape[:-1], device=device) < 0.3, ignored, target)
        assert_matches_float64(cross_entropy, (logits, target, *settings(options)), dtype)
        lse = torch.logsumexp(logits.double(), -1)
        grads = (
            torch.randn(shape[:-1], device=device).to(dtype),
            torch.randn(shape[:-1], device=device).double(),
        )
        args = (*grads, logits, target, lse, *settings(options))
        assert_matches_float64(cross_entropy_backward, args, dtype)


def settings(options):
    return options.get("label_smoothing", 0.0), options.get("ignore_index", -100), options.get("z_loss", 0.0)


@OPTIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_is_as_exact_as_torch(device, dtype, options):
    if INTERPRETS and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts digits off instead of rounding")
    logits, target = logits_and_target((400, 103), dtype, device=device)

    def torch_loss(x):
        smoothing, ignored, z_loss = settings(options)
        loss = torch.nn.functional.cross_entropy(
            x, target, reduction="none", label_smoothing=smoothing, ignore_index=ignored
        )
        return (
            loss + (z_loss * torch.logsumexp(x, -1).square()).where(target != ignored, 0) if z_loss else loss
        )

    ours, theirs, exact = (x.clone().requires_grad_() for x in (logits, logits, logits.double()))
    losses = cross_entropy(ours, target, **options).loss, torch_loss(theirs), torch_loss(exact)
    assert_as_exact_as(*losses)
    for loss in losses:
        loss.sum().backward()
    assert_as_exact_as(ours.grad, theirs.grad, exact.grad)


@OPTIONS
def test_cross_entropy_with_options_has_gradients_of_both_orders(device, options):
    logits, target = logits_and_target((2, 3, 5), torch.float64, device=device)
    target[0, 1] = options.get("ignore_index", -100)

    def call(x):
        return tuple(cross_entropy(x, target, **options))

    assert torch.autograd.gradcheck(call, logits.requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, logits, check_fwd_over_rev=True)


def test_cross_entropy_of_an_ignored_row_has_a_loss_of_zero_and_its_own_lse(device):
    inf = float("inf")
    logits = torch.tensor([[1.0, 2.0], [inf, 0.0], [-inf, -inf]], device=device, requires_grad=True)
    target = torch.full((3,), -100, device=device)
    loss, lse = cross_entropy(logits, target, label_smoothing=0.1, z_loss=1.0)
    assert loss.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(lse, torch.logsumexp(logits.double(), -1))
    assert not torch.autograd.grad(loss[0], logits)[0][0].any()


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_cross_entropy_refuses_a_smoothing_that_is_no_share(device, bad):
    logits, target = logits_and_target((3, 5), torch.float32, device=device)
    zeros = torch.zeros(3, device=device)
    with pytest.raises(RuntimeError, match="label_smoothing is .*, expected 0 to 1"):
        cross_entropy(logits, target, bad)
    with pytest.raises(RuntimeError, match="label_smoothing is .*, expected 0 to 1"):
        cross_entropy_backward(zeros, zeros.double(), logits, target, zeros.double(), bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_trains_like_torch(device, dtype):
    logits, target = logits_and_target((64, 33), dtype, device=device)
    target[5] = -100
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    cross_entropy(leaf, target, 0.1).loss.sum().backward()
    torch.nn.functional.cross_entropy(exact, target, reduction="sum", label_smoothing=0.1).backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad, exact.grad.to(dtype), rtol=4 * eps, atol=2 * eps)


@compilers
def test_cross_entropy_compiles_once_for_all_sizes(compiler, gradients):
    cases = [logits_and_target((rows, n), torch.float32) for rows, n in ((3, 8), (4, 9), (7, 100))]
    assert_compiles_once(lambda x, t: cross_entropy(x * 2, t), cases, compiler, gradients)


@compilers
def test_cross_entropy_backward_compiles_once_for_all_sizes(compiler, gradients):
    cases = []
    for rows, n in ((3, 8), (4, 9), (7, 100)):
        logits, target = logits_and_target((rows, n), torch.float32)
        lse = torch.logsumexp(2 * logits.double(), -1)
        cases.append((torch.randn(rows), torch.randn(rows).double(), logits, target, lse))
    assert_compiles_once(
        lambda g, h, x, t, lse: cross_entropy_backward(g, h, x * 2, t, lse), cases, compiler, gradients
    )


def test_cross_entropy_exports():
    args = logits_and_target((3, 8), torch.float32)
    assert_exports(lambda x, t: cross_entropy(x, t).loss, args, cross_entropy)


def test_cross_entropy_refuses_other_shapes_and_dtypes(device):
    with pytest.raises(opkit.ShapeError, match="target"):
        cross_entropy(torch.ones(3, 4, device=device), torch.zeros(2, dtype=torch.int64, device=device))
    with pytest.raises(opkit.DtypeError, match="target"):
        cross_entropy(torch.ones(3, 4, device=device), torch.zeros(3, dtype=torch.int32, device=device))
