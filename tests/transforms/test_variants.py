from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def double():
    @opkit.op("t::double", shapes="*b -> *b")
    def double(x: Tensor, k: int = 2) -> Tensor:
        return x * k

    return double


@pytest.fixture
def both():
    @opkit.op("t::both", shapes="a b -> a b, b")
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x.sum(0)

    return both


@pytest.fixture
def accumulate():
    @opkit.op("t::accumulate", shapes="n, [n], n -> n", mutates_args=["total", "logs"])
    def accumulate(total: Tensor, logs: list[Tensor], x: Tensor) -> Tensor:
        before = total.clone()
        total.add_(x)
        for log in logs:
            log.copy_(x)
        return before

    return accumulate


def form(backend):
    return lambda f: f if backend is None else torch.compile(f, backend=backend, fullgraph=True)


EVERYWHERE = pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])


@EVERYWHERE
def test_results_are_written_into_given_tensors(double, both, backend):
    out = torch.empty(3, 4)
    assert form(backend)(lambda out, x: double.into(out, x, k=3))(out, X) is out
    assert torch.equal(out, X * 3)
    outs = torch.empty(3, 4), torch.empty(4)
    found = form(backend)(lambda a, b, x: both.into((a, b), x))(*outs, X)
    assert found[0] is outs[0]
    torch.testing.assert_close(outs, (X + 1, X.sum(0)))


@EVERYWHERE
def test_result_is_written_into_an_argument(double, backend):
    x = X.clone()
    assert form(backend)(lambda x: double.into(x, x))(x) is x
    assert torch.equal(x, X * 2)


def test_result_may_overlap_an_argument(double):
    x = torch.arange(5.0)
    double.into(x[1:], x[:-1])
    assert x.tolist() == [0, 0, 2, 4, 6]


def test_out_of_another_layout_is_kept_so(double):
    out = torch.empty(4, 3).t()
    double.into(out, X)
    assert torch.equal(out, X * 2)
    assert out.stride() == (1, 3)


def test_kernel_that_overwrites_writes_into_the_argument_itself(double):
    seen = []
    double.register_kernel(
        "cpu", lambda x, k: seen.append(x.data_ptr()) or x.mul_(k), backend="fast", inplace=["x"]
    )
    x = X.clone()
    double.into(x, x)
    assert seen == [x.data_ptr()]
    assert torch.equal(x, X * 2)
    other, x = torch.empty(3, 4), X.clone()
    double.into(other, x)
    assert torch.equal(x, X)
    assert torch.equal(other, X * 2)


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (
            torch.empty(4, 3),
            "the tensor for out has the shape (4, 3); expected (3, 4). Pass torch.empty((3, 4),",
        ),
        (torch.empty(3, 4, dtype=torch.int32), "has the dtype torch.int32; expected torch.float32"),
        (torch.empty(3, 4, device="meta"), "has the device meta; expected cpu"),
        ((X, X), "found (Tensor, Tensor); expected 1 tensors: out. Pass one for each"),
        (None, "found (NoneType); expected 1 tensors"),
    ],
    ids=["shape", "dtype", "device", "number", "kind"],
)
def test_out_that_does_not_fit_raises(double, out, text):
    with pytest.raises(opkit.OutputError, match=re.escape(text)):
        double.into(out, X)


@pytest.mark.parametrize(
    "outs",
    [
        lambda m: (m[:3], m[2]),
        lambda m: (m[0, :1].expand(3, 4), m[3]),
        lambda m: (m.view(-1).as_strided((3, 4), (1, 1)), m[3]),
    ],
    ids=["results overlap", "expanded", "strides overlap"],
)
def test_out_tensors_that_share_memory_raise(both, outs):
    with pytest.raises(opkit.OutputError, match=r"t::both with out=: .* expected memory of its own"):
        both.into(outs(torch.zeros(4, 4)), X)


def test_one_tensor_for_two_results_raises_while_compiling():
    @opkit.op("t::twins", shapes="*b -> *b, *b")
    def twins(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2

    def same(x):
        out = torch.empty_like(x)
        return twins.into((out, out), x)

    # Dynamo of torch 2.11 raises an AssertionError of its own where it resumes at a `raise`.
    text = "outputs_of" if torch.__version__.startswith("2.11.") else "expected memory of its own"
    with pytest.raises(Exception, match=text):
        torch.compile(same, backend="aot_eager")(X)


def test_out_form_of_an_op_without_tensor_results_raises(accumulate):
    @opkit.op("t::nothing", shapes="n ->", mutates_args=["x"])
    def nothing(x: Tensor) -> None:
        x.add_(1)

    with pytest.raises(
        opkit.RegistrationError, match=r"t::nothing with out=: it returns \(\); expected an op whose"
    ):
        nothing.into(X, X)


def test_out_form_refuses_gradients(double):
    double.register_autograd(opkit.from_reference)
    for out, x in (
        (torch.empty(3, 4), X.clone().requires_grad_()),
        (torch.empty(3, 4, requires_grad=True), X),
    ):
        with pytest.raises(opkit.GradientError, match="t::double with out=: an argument requires grad"):
            double.into(out, x)
        with torch.no_grad():
            assert torch.equal(double.into(out, x), X * 2)


@EVERYWHERE
def test_functional_form_mutates_nothing(accumulate, backend):
    total, log, x = torch.ones(2), torch.zeros(2), torch.full((2,), 5.0)
    before, new_total, new_logs = form(backend)(lambda t, a, x: accumulate.functional(t, [a, a], x=x))(
        total, log, x
    )
    assert (total.tolist(), log.tolist()) == ([1, 1], [0, 0])
    assert (before.tolist(), new_total.tolist()) == ([1, 1], [6, 6])
    assert [n.tolist() for n in new_logs] == [[5, 5], [5, 5]]


def test_functional_form_of_an_op_that_mutates_nothing_raises(double):
    with pytest.raises(
        opkit.RegistrationError, match=r"t::double: it mutates nothing; .* Call the op itself"
    ):
        double.functional(X)


def test_functional_form_refuses_gradients_that_would_be_lost(accumulate):
    with pytest.raises(opkit.GradientError, match="argument total requires grad and is overwritten"):
        accumulate.functional(torch.ones(2, requires_grad=True), [], torch.ones(2))
