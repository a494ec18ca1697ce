"""What the references of the shipped ops say to dtypes that are not floating: refused, never rounded or cut."""

from __future__ import annotations

import pytest
import torch

import opkit
from opkit_kernels import (
    adamw_step,
    add_rms_norm,
    add_rms_norm_backward,
    batch_norm,
    batch_norm_backward,
    cross_entropy,
    cross_entropy_backward,
    geglu,
    geglu_backward,
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
    quant_fp8,
    rms_norm,
    rms_norm_backward,
    rms_norm_quant,
    rope,
    rope_backward,
    swiglu,
    swiglu_backward,
    topk_softmax,
    topk_softmax_backward,
)

T, X, W = torch.tensor([0, 2]), torch.ones(2, 3), torch.ones(3)
R = torch.zeros(2, dtype=torch.float64)
H, I = torch.ones(1, 2, 3), torch.tensor([[0, 1, 2], [0, 1, 2]])

# An op, its arguments for a dtype, and the argument that it names.
CASES = {
    "rms_norm-x": (rms_norm, lambda d: (X.to(d), W), "x"),
    "rms_norm-weight": (rms_norm, lambda d: (X, W.to(d)), "weight"),
    "rms_norm_backward-x": (rms_norm_backward, lambda d: (X.to(d), X.to(d), W), "x"),
    "rms_norm_backward-weight": (rms_norm_backward, lambda d: (X, X, W.to(d)), "weight"),
    "layer_norm-x": (layer_norm, lambda d: (X.to(d), W, None), "x"),
    "layer_norm-bias": (layer_norm, lambda d: (X, None, W.to(d)), "bias"),
    "layer_norm_backward": (layer_norm_backward, lambda d: (X.to(d), X.to(d), W, None), "x"),
    "add_rms_norm": (add_rms_norm, lambda d: (X.to(d), X.to(d), W), "x"),
    "add_rms_norm_backward": (add_rms_norm_backward, lambda d: (X.to(d), X.to(d), X.to(d), W), "sum"),
    "group_norm": (group_norm, lambda d: (X.to(d), 1, W, W), "x"),
    "group_norm_backward": (group_norm_backward, lambda d: (X.to(d), X.to(d), 1, W, W), "x"),
    "batch_norm": (batch_norm, lambda d: (X.to(d), None, None, W.clone(), W.clone()), "x"),
    "batch_norm-running_var": (batch_norm, lambda d: (X, None, None, W.clone(), W.to(d)), "running_var"),
    "batch_norm_backward": (batch_norm_backward, lambda d: (X.to(d), X.to(d), W, W, W), "x"),
    "quant_fp8": (quant_fp8, lambda d: (X.to(d), -1), "x"),
    "rms_norm_quant": (rms_norm_quant, lambda d: (X.to(d), W), "x"),
    "geglu": (geglu, lambda d: (X.to(d), X.to(d)), "gate"),
    "geglu_backward": (geglu_backward, lambda d: (X.to(d), X.to(d), X.to(d)), "gate"),
    "rope-q": (rope, lambda d: (H.to(d), H.to(d), W[None, :1], W[None, :1]), "q"),
    "rope-cos": (rope, lambda d: (H, H, W[None, :1].to(d), W[None, :1].to(d)), "cos"),
    "rope_backward": (rope_backward, lambda d: (H.to(d), H.to(d), W[None, :1], W[None, :1]), "grad_q"),
    "topk_softmax": (topk_softmax, lambda d: (X.to(d), 2), "logits"),
    "topk_softmax_backward": (topk_softmax_backward, lambda d: (X.to(d), X.to(d), I), "logits"),
    "adamw_step": (
        adamw_step,
        lambda d: (*([X.to(d)] for _ in range(4)), 0.1, (0.9, 0.99), 1e-8, 0.0, 1),
        "params",
    ),
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
