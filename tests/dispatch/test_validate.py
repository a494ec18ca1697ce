"""OPKIT_VALIDATE=1: what a kernel returned and wrote is compared with the declaration in every call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit
from opkit import _config
from opkit.dispatch import run

pytestmark = pytest.mark.usefixtures("registry")

T = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def validate(monkeypatch):
    monkeypatch.setenv("OPKIT_VALIDATE", "1")
    _config.refresh()


def op_with(kernel, x=Tensor, returns=Tensor, shapes=None, **options):
    def f(x):
        return x.clone()

    f.__annotations__ = {"x": x, "return": returns}
    op = opkit.op("t::f", shapes=shapes, **options)(f)
    op.register_kernel("cpu", kernel, backend="fast")
    return op


def writing(x):
    x[1, 0] = 9
    return x.clone()


def test_wrong_value_lists_the_legal_ones(monkeypatch):
    monkeypatch.setenv("OPKIT_VALIDATE", "maybe")
    _config.refresh()
    with pytest.raises(
        opkit.ConfigError, match="reading OPKIT_VALIDATE: found 'maybe'; expected one of 1, true"
    ):
        op_with(writing)


def test_nothing_is_compared_without_it():
    op = op_with(writing, shapes="n m -> n m")
    assert type(op._runner) is run.Runner
    assert op(T.clone())[1, 0] == 9


@pytest.mark.parametrize(
    "make", [lambda: T.clone(), lambda: T.clone().t().contiguous().t(), lambda: T.to(torch.complex64).conj()],
    ids=["contiguous", "transposed", "conj"],
)  # fmt: skip
def test_undeclared_mutation_names_kernel_argument_and_place(validate, make):
    op = op_with(writing, shapes="n m -> n m")
    with pytest.raises(
        opkit.OutputError,
        match=r"calling t::f: the fast kernel wrote into argument x, first at \[1, 0\]; expected it to leave alone .* "
        r"Write into a copy, or declare it: mutates_args=\('x',\)\.",
    ) as caught:
        op(make())
    assert caught.value.op == "t::f"


def test_nan_that_stays_is_no_mutation(validate):
    op = op_with(lambda x: x.clone(), shapes="*b -> *b")
    for x in (torch.tensor([float("nan"), -0.0]), torch.tensor(float("nan")), torch.ones(0, 3), T[:, ::2]):
        assert op(x).shape == x.shape
    with pytest.raises(opkit.OutputError, match=r"first at \[\];"):
        opkit._registry.remove("t::f")
        op_with(lambda x: x.neg_().clone(), shapes="*b -> *b")(torch.tensor(0.0))


def test_undeclared_mutation_of_an_element_of_a_list_names_it(validate):
    def kernel(x):
        x[1].zero_()
        return x[0] * 1

    op = op_with(kernel, x=list[Tensor | None], shapes="[*s] -> 2 3")
    with pytest.raises(opkit.OutputError, match=r"wrote into argument x\[1\], first at \[0, 1\];.*\('x',\)"):
        op([T, T.clone(), None])


def test_declared_mutation_is_welcome_also_through_a_view(validate):
    @opkit.op("t::g", mutates_args=("x",), shapes="n, ... ->")
    def g(x: Tensor, y: Tensor) -> None:
        x.add_(1)

    x = torch.zeros(2)
    g(x, x.view(2, 1))
    assert x.tolist() == [1, 1]
    g(x, torch.zeros(1))


def test_kernel_that_overwrites_a_copy_is_welcome(validate):
    op = op_with(lambda x: x.clone(), shapes="n m -> n m")
    op.register_kernel("cpu", lambda x: x.neg_(), backend="inplace", inplace="x", priority=5)
    assert torch.equal(op(T), -T)


LIGHT = "#include <opkit/kernel.h>\nvoid f(opkit::Tensor x, opkit::Tensor y) { %s }"


def test_native_kernel_that_writes_into_an_argument_is_found_out(validate):
    source = LIGHT % "const_cast<float*>(x.data<const float>())[4] = 1; y.data<float>()[0] = 0;"
    op = op_with(opkit.cpp.kernel(source), shapes="n m -> n m")
    with pytest.raises(opkit.OutputError, match=r"the fast kernel wrote into argument x, first at \[1, 1\]"):
        op(T * 2)


def native(monkeypatch, returned, meta=None, shapes="n m -> n m", returns=Tensor):
    """An op whose native kernel is told what to return: what generated glue does not get wrong."""
    op = op_with(opkit.cpp.kernel(LIGHT % ""), returns=returns, shapes=shapes)
    if meta is not None:
        op.register_fake(meta)
    monkeypatch.setattr(run.Runner, "_native", lambda self, kernel, values: returned(values[0]))
    return op


@pytest.mark.parametrize(
    ("returned", "meta", "text"),
    [
        (lambda x: x.new_empty(3, 2), None, r"returned out with the shape \(3, 2\); expected \(2, 3\) by the"),
        (lambda x: x.double(), None, "returned out with the dtype torch.float64; expected torch.float32"),
        (lambda x: x.to("meta"), None, "returned out with the device meta; expected cpu"),
        (lambda x: x.t().contiguous().t(), None,
         r"returned out with the strides \(1, 2\); expected \(3, 1\) by the shape line. Change one of them"),
        (lambda x: x.clone(), lambda x: x.new_empty(3, 2).t(),
         r"returned out with the strides \(3, 1\); expected \(1, 2\) by the meta function"),
        (lambda x: x.double(), torch.empty_like,
         "returned out with the dtype torch.float64; expected torch.float32 by the meta function"),
        (lambda x: x.view(2, 3), None, "returned as out a tensor that shares storage with argument x"),
    ],
    ids=["shape", "dtype", "device", "stride", "stride of a meta function", "dtype of a meta function", "alias"],
)  # fmt: skip
def test_native_output_other_than_declared_names_kernel_output_and_field(
    validate, monkeypatch, returned, meta, text
):
    op = native(monkeypatch, returned, meta)
    with pytest.raises(opkit.OutputError, match="calling t::f: the fast kernel " + text):
        op(T)


def test_native_output_in_a_list_is_named_by_its_place(validate, monkeypatch):
    op = native(
        monkeypatch, lambda x: [x.clone(), x.t().contiguous().t()], lambda x: [torch.empty_like(x)] * 2, None,
        list[Tensor],
    )  # fmt: skip
    with pytest.raises(opkit.OutputError, match=r"returned out\[1\] with the strides"):
        op(T)


def test_right_kernels_of_all_tiers_pass(validate):
    double = "for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = 2 * x.data<float>()[i];"
    op = op_with(opkit.cpp.kernel(LIGHT % double), shapes="*b -> *b")
    assert torch.equal(op(T), T * 2)
    compiled = torch.compile(lambda x: op(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(T), T * 2 + 1)
    op.register_fake(torch.empty_like)
    assert torch.equal(op(T), T * 2)
