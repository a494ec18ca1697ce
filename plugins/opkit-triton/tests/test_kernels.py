"""The kernels against the references in float64, and through what torch does to an op."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import opkit

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

SHAPES = [(1,), (7,), (3, 1), (5, 8), (2, 3, 33), (3, 4096), (2, 9001), (0, 5), (2, 0, 3), (4, 0)]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def exact(x, scale):
    return (x.double() * scale).softmax(-1)


@pytest.mark.parametrize("scale", [1.0, 0.125, -3.0, 0.0])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_softmax_matches_the_reference(softmax, device, dtype, scale):
    for shape in SHAPES:
        x = torch.randn(shape, device=device).to(dtype)
        y = softmax(x, scale)
        torch.testing.assert_close(y.double(), exact(x, scale), rtol=TOLERANCES[dtype], atol=1e-7)


def test_large_numbers_do_not_overflow_and_odd_ones_are_as_in_torch(softmax, device):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[3e38, -3e38], [1e4, 1e4], [-inf, 0], [inf, 0], [-inf, -inf], [nan, 0]], device=device)
    torch.testing.assert_close(softmax(x), x.softmax(-1), equal_nan=True)
    wide = torch.full(
        (1, 5000), -inf, device=device
    )  # blocks with nothing in them, before and after one number
    wide[0, 4500] = 2.0
    torch.testing.assert_close(softmax(wide), wide.softmax(-1))


def test_strided_rows_are_read_in_place(softmax, device):
    x = torch.randn(64, 2, 9, device=device)
    for view in (x[:, 0], x.transpose(0, 2), x[..., ::2], x[:, :, :1].expand(64, 2, 9)):
        torch.testing.assert_close(softmax(view, 0.5).double(), exact(view, 0.5), rtol=2e-6, atol=1e-7)
        backward = opkit.get("opkit_triton::scaled_softmax_backward")
        expected = backward.reference(view.double(), view.double(), 0.5)
        torch.testing.assert_close(backward(view, view, 0.5).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (5, 8), (2, 3, 33), (2, 5000), (0, 5)], ids=str)
def test_gradients_are_those_of_the_reference(softmax, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    grad = torch.randn(shape, device=device)
    softmax(x, 0.5).backward(grad)
    wide = x.detach().double().requires_grad_()
    exact(wide, 0.5).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)


def test_the_formulas_hold_to_the_second_derivative(device):
    op = opkit.get("opkit_triton::scaled_softmax")
    x = torch.randn(3, 8, device=device)
    assert opkit.testing.check(op, x, 0.5).ok
    with opkit.use_backend("reference"):
        assert torch.autograd.gradgradcheck(op, (x.double().requires_grad_(), 0.5))


@pytest.mark.slow
def test_compiled_with_gradients(softmax, device):
    x = torch.randn(4, 32, device=device, requires_grad=True)

    @torch.compile(fullgraph=True)
    def attend(x):
        return softmax(x * 2, 0.5) + 1

    attend(x).square().sum().backward()
    compiled, x.grad = x.grad, None
    (x.softmax(-1) + 1).square().sum().backward()
    torch.testing.assert_close(compiled, x.grad, rtol=1e-5, atol=1e-6)


def test_what_the_kernels_do_not_take_is_said(softmax, device):
    x = torch.ones(2, 4, device=device, dtype=torch.float64)
    with pytest.raises(
        opkit.NoKernelError, match="triton: dtype float64 is not among float32, bfloat16, float16"
    ):
        softmax(x)


@pytest.mark.usefixtures("device")
def test_the_readme_runs():
    text = Path(__file__).parents[1].joinpath("README.md").read_text()
    namespace: dict[str, object] = {}
    with opkit.use_backend():
        for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            exec(block, namespace)
