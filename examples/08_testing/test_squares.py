"""Tests of the op in 08_testing.py, once for each backend that can run here."""

import importlib.util
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("testing_example", Path(__file__).parents[1] / "08_testing.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
example.register("for (; i < x.numel(); ++i) out[i] = in[i] * in[i];")


@pytest.mark.opkit_op("demo::squares")
def test_squares_are_never_negative(opkit_backend):
    assert (example.squares(torch.randn(1001)) >= 0).all()


@pytest.mark.opkit_op("demo::squares")
def test_gradient_is_twice_the_argument(opkit_backend):
    x = torch.randn(7, requires_grad=True)
    example.squares(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
