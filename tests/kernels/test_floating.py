"""What the references of the shipped ops say to dtypes that are not floating: refused, never rounded or cut."""

from __future__ import annotations

import pytest
import torch

import opkit
from opkit_kernels import (
    cross_entropy,
    cross_entropy_backward,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)

T, X, W = torch.tensor([0, 2]), torch.ones(2, 3), torch.ones(3)
R = torch.zeros(2, dtype=torch.float64)

# An op, its arguments for a dtype, and the argument that it names.
CASES = {
    "rms_norm-x": (rms_norm, lambda d: (X.to(d), W), "x"),
    "rms_norm-weight": (rms_norm, lambda d: (X, W.to(d)), "weight"),
    "rms_norm_backward-x": (rms_norm_backward, lambda d: (X.to(d), X.to(d), W), "x"),
    "rms_norm_backward-weight": (rms_norm_backward, lambda d: (X, X, W.to(d)), "weight"),
    "swiglu": (swiglu, lambda d: (X.to(d), X.to(d)), "gate"),
    "swiglu_backward": (swiglu_backward, lambda d: (X.to(d), X.to(d), X.to(d)), "gate"),
    "cross_entropy": (cross_entropy, lambda d: (X.to(d), T), "logits"),
    "cross_entropy_backward": (
        cross_entropy_backward,
        lambda d: (R.to(d), R, X.to(d), T, R),
        "logits",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_op_refuses_a_dtype_that_is_not_floating(case, dtype):
    op, args, name = CASES[case]
    advice = f"Pass its real part: {name}.real." if dtype.is_complex else f"Convert it: {name}.float()."
    with opkit.use_backend("reference"), pytest.raises(TypeError) as caught:
        op(*args(dtype))
    assert isinstance(caught.value, opkit.DtypeError)
    assert caught.value.op == op.name
    assert str(caught.value) == (
        f"calling {op.name}: argument {name} has dtype {dtype}, expected a floating-point one. {advice}"
    )


@pytest.mark.parametrize("case", CASES)
def test_op_refuses_integers_where_compiled_code_calls_it(case):
    op, args, name = CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op(*args), backend="aot_eager", fullgraph=True)
    with (
        opkit.use_backend("reference"),
        pytest.raises(opkit.DtypeError, match=f"{name} has dtype torch.int32"),
    ):
        compiled(*args(torch.int32))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_kernel_refuses_a_weight_that_is_not_floating(backend, device, dtype):
    x, weight = X.to(device), W.to(device, dtype)
    with pytest.raises((opkit.DtypeError, RuntimeError), match=f"rms_norm.*{str(dtype).split('.')[1]}"):
        rms_norm(x, weight)


def test_reference_is_compiled_without_a_break_for_its_check():
    compiled = torch.compile(rms_norm.reference, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, W), rms_norm.reference(X, W))
