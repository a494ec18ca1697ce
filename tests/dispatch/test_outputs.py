"""Layout, dtype and aliasing of what Python kernels return: held to the declaration in every call."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

T = torch.arange(6.0).reshape(2, 3)


def op_returning(make, shapes="n m -> n m", returns=Tensor, kernel=True):
    """An op `t::f` whose `fast` kernel (or its reference) returns what `make(x)` does."""

    def f(x):
        return make(x) if not kernel else x.clone()

    f.__annotations__ = {"x": Tensor, "return": returns}
    op = opkit.op("t::f", shapes=shapes)(f)
    if kernel:
        op.register_kernel("cpu", lambda x: make(x), backend="fast")
    return op


@pytest.mark.parametrize(
    "make",
    [lambda x: x.t().clone(memory_format=torch.preserve_format), lambda x: x[0, :1].expand(3, 2) * 1,
     lambda x: torch.zeros(6, 4)[::2, ::2], lambda x: torch.zeros(1, 1).expand(3, 2)],
    ids=["transposed", "dense", "strided", "expanded"],
)  # fmt: skip
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
def test_output_is_brought_to_contiguous(make, kernel):
    op = op_returning(make, "n m -> m n", kernel=kernel)
    found = op(T)
    assert found.stride() == (2, 1)
    assert torch.equal(found, make(T))


def test_fitting_output_is_not_copied():
    made = []
    op = op_returning(lambda x: made.append(x + 1) or made[-1])
    assert op(T).data_ptr() == made[0].data_ptr()


@pytest.mark.parametrize("lazy", [torch.conj, torch._neg_view], ids=["conj", "neg"])
def test_lazy_bits_of_an_output_are_resolved(lazy):
    op = op_returning(lambda x: lazy(x.clone()))
    x = torch.tensor([[1 + 2j]])
    assert not op(x).is_conj()
    assert not op(x).is_neg()
    assert torch.equal(op(x), lazy(x).resolve_conj().resolve_neg())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda x: x.new_empty(3, 2),
            r"returned out with the shape \(3, 2\); expected \(2, 3\) by the shape line",
        ),
        (lambda x: x.double(), r"returned out with the dtype torch.float64; expected torch.float32"),
        (lambda x: x.to("meta"), r"returned out with the device meta; expected cpu"),
        (lambda x: None, "returned NoneType as out; expected a Tensor"),
        (lambda x: 3.0, "returned float as out"),
        (lambda x: (x + 1, x + 2), "returned tuple as out"),
        (lambda x: [x + 1], "returned list as out"),
    ],
    ids=["shape", "dtype", "device", "None", "float", "tuple", "list"],
)
def test_output_that_is_not_as_declared_raises(make, text):
    with pytest.raises(opkit.OutputError, match=r"calling t::f: the fast kernel " + text) as caught:
        op_returning(make)(T)
    assert "t::f(Tensor x) -> (Tensor)" in str(caught.value)
    assert caught.value.op == "t::f"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x: x.clone(), "returned 1 values; expected 2"),
        (lambda x: (x + 1, x + 2, x + 3), "returned 3 values; expected 2"),
        (lambda x: None, "returned 1 values; expected 2"),
        (lambda x: (x + 1, None), "returned NoneType as out1"),
    ],
    ids=["one", "three", "None", "None in it"],
)
def test_wrong_number_of_outputs_raises(make, text):
    op = op_returning(make, "n m -> n m, n m", tuple[Tensor, Tensor])
    with pytest.raises(opkit.OutputError, match="the fast kernel " + text):
        op(T)


def test_op_without_results_must_return_none():
    op = op_returning(lambda x: x + 1, "n m -> ", None)
    with pytest.raises(opkit.OutputError, match="returned a value; expected none"):
        op(T)


def test_list_result_must_be_a_list_of_tensors():
    op = op_returning(lambda x: [x + 1, 3], None, list[Tensor])
    with pytest.raises(opkit.OutputError, match="returned list as out; expected a list of tensors"):
        op(T)


def test_error_names_the_field_of_the_named_tuple():
    class Out(NamedTuple):
        low: Tensor
        high: Tensor

    op = op_returning(lambda x: Out(x + 1, x.double()), "n m -> n m, n m", Out)
    with pytest.raises(opkit.OutputError, match="returned high with the dtype"):
        op(T)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda x: (x, x + 1), "as out0 a tensor that shares storage with argument x"),
        (lambda x: (x + 1, x.view(3, 2).t()), "as out1 .* argument x"),
        (lambda x: (x + 1, x.detach()), "as out1 .* argument x"),
        (lambda x: (y := x + 1, y), "as out1 .* shares storage with another output"),
        (lambda x: (y := x + 1, y.view(2, 3)), "as out1 .* another output"),
    ],
    ids=["input", "view of input", "detached input", "same twice", "view of output"],
)
@pytest.mark.parametrize("shapes", ["n m -> n m, n m", None], ids=["shape line", "no shape line"])
def test_output_that_shares_storage_raises(make, what, shapes):
    op = op_returning(make, shapes, tuple[Tensor, Tensor])
    with pytest.raises(
        opkit.OutputError, match=f"the fast kernel returned {what}; expected fresh storage.*clone"
    ):
        op(T)


def test_output_that_shares_storage_with_a_tensor_in_a_list_raises():
    @opkit.op("t::f")
    def f(xs: list[Tensor]) -> list[Tensor]:
        return [xs[0] + 1, xs[1]]

    with pytest.raises(opkit.OutputError, match="shares storage with argument xs"):
        f([T, T + 1])


def test_device_of_a_factory_may_name_its_index():
    @opkit.op("t::f", shapes="-> n:float32")
    def f(n: int, device: torch.device) -> Tensor:
        return torch.zeros(n, device=device)

    assert f(3, torch.device("cpu", 0)).shape == (3,)


class RMSNorm(NamedTuple):
    y: Tensor
    rstd: Tensor


@pytest.mark.parametrize("transposed", [False, True], ids=["row-major", "transposed"])
def test_readme_rms_norm_is_the_same_in_eager_and_inductor(transposed):
    @opkit.op("t::rms_norm", shapes="*b n, n -> *b n:x, *b 1:float32")
    def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> RMSNorm:
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return RMSNorm((x * rstd * weight).to(x.dtype), rstd)

    x = torch.randn(4, 8, dtype=torch.bfloat16)
    x = x.t() if transposed else x
    weight = torch.rand(x.shape[-1])
    torch.library.opcheck(rms_norm.overload, (x, weight))

    def twice(x, w):
        y, rstd = rms_norm(x, w)
        return RMSNorm(y * 2, rstd + 1)

    eager, compiled = twice(x, weight), torch.compile(twice, fullgraph=True)(x, weight)
    expected = rms_norm.reference(x, weight)
    torch.testing.assert_close(eager, RMSNorm(expected.y * 2, expected.rstd + 1), check_stride=False)
    torch.testing.assert_close(compiled, eager, check_stride=True)
    assert (compiled.y.dtype, compiled.rstd.dtype) == (torch.bfloat16, torch.float32)
    assert rms_norm(x, weight).y.is_contiguous()
